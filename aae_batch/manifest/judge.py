"""Decides whether manifest rows can be generated, for `validate`, the dry run and the job.

It calls the functions of `aae_batch.sampling.resolve` that the engine calls, and caches their results,
since most rows repeat settings and prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from aae_batch.columns import OVERRIDES
from aae_batch.errors import RowError
from aae_batch.manifest.row import Row
from aae_batch.methods import METHODS
from aae_batch.request import Request
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.families import SIZES, STABLE_DIFFUSION, Family, Sizes
from aae_batch.sampling.resolve import check_settings, settings_of, subjects_of
from aae_batch.sampling.words import KNOWN_WORDS, plainly_named, streams_of, why_unknown

if TYPE_CHECKING:
    from aae_batch.sampling.model.loading import Index

_KEPT = 100_000

T = TypeVar("T")


class Judge:
    """Resolves and checks the rows of one run.

    Args:
        reads: how the model reads prompts: its streams, or its only tokenizer, from transformers.
        config: the run's settings, which the columns of a row override.
        sizes: of images that the model can make.
        family: the model's.
        plugin: modules that register methods, to be loaded in other processes too.
    """

    def __init__(
        self,
        reads: Any,
        config: GuidanceConfig,
        sizes: Sizes = SIZES,
        plugin: Sequence[str] = (),
        family: Family = STABLE_DIFFUSION,
    ) -> None:
        self.plugin = plugin
        self.streams = tuple(
            replace(stream, tokenizer=ManyTexts(stream.tokenizer)) for stream in streams_of(reads)
        )
        self.config = config
        self.family = family
        self._sizes = sizes
        self._others: Judge | None = None
        self._settings: dict[Hashable, GuidanceConfig | RowError] = {}
        self._counts: dict[Hashable, int | RowError] = {}

    @classmethod
    def load(
        cls,
        model: str,
        config: GuidanceConfig,
        *,
        revision: str | None = None,
        s3_endpoint: str | None = None,
        plugin: Sequence[str] = (),
        index: Index | None = None,
    ) -> Judge:
        """Load only the model's tokenizers and its VAE configuration.

        Args:
            index: the model's, if it has been read.

        Raises:
            ModelError: the model does not exist, cannot be guided, or lacks a tokenizer.
            SettingsError: the run's negative prompt has words that the model does not know, or its
                prompts have a fixed length.
        """
        from aae_batch.sampling.model import loading

        index = index or loading.index_of(model, revision=revision, s3_endpoint=s3_endpoint)
        streams = loading.load_streams(model, config.max_sequence_length, index=index)
        check_settings(streams, config)
        return cls(streams, config, loading.sizes_of(index, config.attn_res), plugin, index.family)

    def resolve(self, row: Row) -> tuple[GuidanceConfig, int]:
        """Return the settings of a row and its number of subjects, by the first method that can sample
        it.

        Raises:
            RowError: the row cannot be generated.
        """
        try:
            return self._resolve(row)
        except RowError:
            if self._others is None or self._others.error_of(row) is not None:
                raise
            return self._others.resolve(row)

    def _resolve(self, row: Row) -> tuple[GuidanceConfig, int]:
        if row.error is not None:
            raise row.error
        request = row.request
        settings = _recall(
            self._settings,
            _own_settings(request),
            request,
            lambda: settings_of(request, self.config, self.family, self._sizes),
        )
        count, needs = len(request.subjects or ()), METHODS[settings.method]
        enough = count >= needs.least_subjects and "modifiers" not in needs.needs
        if enough and self.plainly_has(request):
            return settings, count
        texts = (request.prompt, request.negative_prompt)
        named = (request.subjects, request.token_indices)
        return settings, _recall(
            self._counts,
            (texts, named, settings.method),
            request,
            lambda: len(subjects_of(request, settings.method, self.streams)),
        )

    def by(self, methods: Sequence[str]) -> Judge:
        """Return a judge of rows that are tried by several methods if they name none: one of these must be
        able to sample them."""
        other = copy(self)
        other.config = self.config.updated(method=methods[0])
        other._settings, other._counts = {}, {}
        other._others = self.by(methods[1:]) if len(methods) > 1 else None
        return other

    def prepare(self, prompts: Sequence[str]) -> None:
        """Tokenize prompts in one batch beforehand."""
        for stream in self.streams:
            stream.tokenizer.prepare([*map(stream.written, prompts)])  # type: ignore[attr-defined]

    def plainly_has(self, request: Request) -> bool:
        """Return True if a cheap check proves that all subjects are in the prompt, as is usual, and the
        prompt is not truncated. On False, `resolve_subjects` decides."""
        if not request.subjects or request.token_indices is not None:
            return False
        prompt, streams = request.prompt, self.streams
        if not plainly_named(prompt, request.subjects):
            return False
        if any(stream.count(prompt) > stream.length for stream in streams):
            return False
        return not any(
            why_unknown(streams, text) for text in (prompt, request.negative_prompt or "")
        )

    def error_of(self, row: Row) -> RowError | None:
        """Return why a row cannot be generated, or None."""
        try:
            self.resolve(row)
        except RowError as error:
            return error
        return None


_own_settings = attrgetter(*OVERRIDES)


def _recall(
    known: dict[Hashable, T | RowError], key: Hashable, request: Request, decide: Callable[[], T]
) -> T:
    """Return the cached result for `key`, or compute it. Raise an error under this request's name."""
    said = known.get(key)
    if said is None:
        try:
            said = decide()
        except RowError as error:  # copied: a raised error keeps its traceback and cause alive
            said = type(error)(request.name, error.reason)
        if len(known) >= _KEPT:
            known.clear()
        known[key] = said
    if isinstance(said, RowError):
        raise type(said)(request.name, said.reason)
    return said


class _Encoded(NamedTuple):
    input_ids: list[int]
    offset_mapping: list[tuple[int, int]] | None = None


class ManyTexts:
    """A tokenizer for `aae_batch.sampling.words` that can tokenize prompts in batches beforehand.

    Args:
        tokenizer: a fast tokenizer from transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self.model_max_length: int = tokenizer.model_max_length
        self.init_kwargs = {KNOWN_WORDS: tokenizer.init_kwargs.get(KNOWN_WORDS)}
        vocabulary = range(self._backend.get_vocab_size())
        self._names = [self._backend.id_to_token(i) or "" for i in vocabulary]
        self._whole: dict[str, list[int]] = {}
        self._bare: dict[str, list[int]] = {}

    def prepare(self, prompts: Sequence[str]) -> None:
        new = list(dict.fromkeys(prompts))
        encoded = self._backend.encode_batch_fast(new)
        self._whole = {text: one.ids for text, one in zip(new, encoded, strict=True)}

    def __call__(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        **_: Any,
    ) -> _Encoded:
        if return_offsets_mapping:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
            return _Encoded(encoding.ids, encoding.offsets)
        known = self._whole if add_special_tokens else self._bare
        ids = known.get(text)
        if ids is None:
            ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            if len(known) >= _KEPT:
                known.clear()
            known[text] = ids
        return _Encoded(ids)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self._names[i] for i in ids]
