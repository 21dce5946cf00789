"""Every row of a manifest judged before the job: what will fail, and what is probably not meant.

The rows are read and judged by the code that the job uses, in several processes, and their prompts
tokenized many at a time.
"""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aae_batch.errors import JobError, RowError
from aae_batch.manifest.check import check_size, check_subjects
from aae_batch.manifest.reader import Manifest, Part
from aae_batch.manifest.row import Row
from aae_batch.request import Request
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.phrases import conjuncts
from aae_batch.sampling.words import KNOWN_WORDS, resolve_subjects, why_unknown

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

PART_ROWS = 2_000
_ALONE = 4 * PART_ROWS
"""Manifests up to this are judged in this process: others take a while to start."""

TRUNCATED, TRUNCATED_NEGATIVE, REPEATED = "TruncatedPrompt", "TruncatedNegative", "RepeatedRow"
_KEPT = 100_000
_PLAIN = re.compile(r"[a-z]+(?: [a-z]+)*")
_COLUMN = re.compile(r"column (\w+): ")


class Problem(NamedTuple):
    """Something about one row. `fails`: it will have no picture; otherwise it is a warning.

    `row` counts from 1, as a person does; `kind` is the error's class or the warning's name.
    """

    row: int
    id: str
    column: str
    kind: str
    fails: bool
    problem: str


class Work(NamedTuple):
    """What the price of a picture depends on; `height` and `width` None where the model decides.
    `conjuncts` are those of composable-diffusion, which are denoised one by one."""

    method: str
    num_inference_steps: int
    classifier_free: bool
    height: int | None
    width: int | None
    subjects: int
    conjuncts: int = 1


@dataclass(frozen=True)
class Rules:
    """What rows are judged by.

    Attributes:
        backend: the model's tokenizer, as the `tokenizers` package has it.
        model_max_length: the positions of the text encoder.
        config: the run's settings, where a row has none of its own.
        vae_scale_factor: pixels to a cell of the latents.
        known_words: the only words that the model knows, where it says so.
    """

    backend: Backend
    model_max_length: int
    config: GuidanceConfig
    vae_scale_factor: int = 8
    known_words: Sequence[str] | None = None

    @classmethod
    def of(cls, tokenizer: Any, config: GuidanceConfig, vae_scale_factor: int = 8) -> Rules:
        """By a tokenizer of transformers."""
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        known = tokenizer.init_kwargs.get(KNOWN_WORDS)
        return cls(backend, tokenizer.model_max_length, config, vae_scale_factor, known)


@dataclass
class Summary:
    """What was found in all.

    Attributes:
        rows: of the manifest.
        totals: problems by kind.
        failing: rows that will have no picture.
        work: the others, by what their price depends on.
    """

    rows: int
    totals: Counter[str] = field(default_factory=Counter)
    failing: int = 0
    work: Counter[Work] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Findings:
    """Of one part. `digests`: 16 bytes a row, of all that the picture depends on; a failing row's are
    those of its own place."""

    rows: int
    problems: list[Problem]
    digests: bytes
    work: Counter[Work]


def validate(
    manifest: Manifest,
    rules: Rules,
    found: Callable[[Problem], None],
    report: Callable[[int, int], None] = lambda done, total: None,
    processes: int | None = None,
) -> Summary:
    """Judge every row.

    Args:
        found: is told of every problem in the order of the rows, and at the end of rows that repeat
            another.
        report: is told how many rows of how many are done.
        processes: default: one for each core, and none besides this for a small manifest.

    Raises:
        ManifestError: the manifest cannot be read to its end.
        JobError: one of the processes was killed.
    """
    summary = Summary(len(manifest))
    digests = []
    done = 0
    starts = range(0, len(manifest), PART_ROWS)
    parts = (manifest.part(start, min(start + PART_ROWS, len(manifest))) for start in starts)
    for findings in _all_findings(parts, rules, _processes(len(manifest), processes)):
        for problem in findings.problems:
            summary.totals[problem.kind] += 1
            summary.failing += problem.fails
            found(problem)
        summary.work += findings.work
        digests.append(np.frombuffer(findings.digests, np.uint64).reshape(-1, 2))
        done += findings.rows
        report(done, len(manifest))
    for problem in _repeated(manifest, _repeats(np.concatenate(digests))):
        summary.totals[REPEATED] += 1
        found(problem)
    return summary


def _processes(rows: int, asked: int | None) -> int:
    if asked is not None:
        return asked
    if rows <= _ALONE:
        return 1
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


# --- many processes ------------------------------------------------------------------------------


def _all_findings(parts: Iterable[Part], rules: Rules, processes: int) -> Iterator[_Findings]:
    """Of all parts in their order. Few are read ahead, so that memory does not grow."""
    if processes == 1:
        judge = _Judge(rules)
        yield from map(judge.look_at, parts)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, (rules,)) as pool:
        pending: deque[Future[_Findings]] = deque()
        try:
            for part in parts:
                pending.append(pool.submit(_look_at, part))
                if len(pending) > 3 * processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise JobError(
                "A process that judged rows was killed, perhaps for its memory; close others."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_judge: _Judge


def _begin(rules: Rules) -> None:
    global _judge
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as the cores
    _judge = _Judge(rules)
    gc.freeze()  # what was imported is not looked through for garbage again and again
    gc.set_threshold(100_000)  # the rows of a part are many objects and no garbage


def _look_at(part: Part) -> _Findings:
    return _judge.look_at(part)


# --- one of them ---------------------------------------------------------------------------------


class _Judge:
    """Judges parts of a manifest, and remembers what it has said of a prompt and its subjects."""

    def __init__(self, rules: Rules) -> None:
        self._config, self._factor = rules.config, rules.vae_scale_factor
        self._tokenizer = _ManyTexts(rules.backend, rules.model_max_length, rules.known_words)
        self._said: dict[Any, int | tuple[type[RowError], str]] = {}

    def look_at(self, part: Part) -> _Findings:
        rows = part.rows()
        requests = [row.request for row in rows if row.error is None]
        self._tokenizer.prepare([request.prompt for request in requests])
        problems: list[Problem] = []
        digests: list[bytes] = []
        work: Counter[Work] = Counter()
        for row in rows:
            try:
                subjects = self._subjects(row)
            except RowError as error:
                problems.append(_problem(row, type(error).__name__, error.reason, fails=True))
                digests.append(_digest(("row", row.index)))
                continue
            problems += self._warnings(row)
            digests.append(_digest(_picture(row.request, self._config)))
            work[self._work(row.request, subjects)] += 1
        return _Findings(len(rows), problems, b"".join(digests), work)

    def _subjects(self, row: Row) -> int:
        """How many subjects a row has. Raises: RowError: it will fail; see `check_row`."""
        if row.error is not None:
            raise row.error
        request = row.request
        check_size(request, self._config, self._factor)
        if self._tokenizer.plainly_has(request):
            return len(request.subjects or ())
        key = (
            request.prompt,
            request.negative_prompt,
            request.subjects,
            request.token_indices,
            request.method,
        )
        said = self._said.get(key)
        if said is None:
            try:
                said = check_subjects(self._tokenizer, request, self._config)
            except RowError as error:
                said = (type(error), error.reason)
            if len(self._said) >= _KEPT:
                self._said.clear()
            self._said[key] = said
        if isinstance(said, int):
            return said
        kind, reason = said
        raise kind(request.name, reason)

    def _warnings(self, row: Row) -> Iterator[Problem]:
        request, most = row.request, self._tokenizer.model_max_length
        texts = [(TRUNCATED, "prompt", request.prompt)]
        if request.negative_prompt:
            texts.append((TRUNCATED_NEGATIVE, "negative_prompt", request.negative_prompt))
        for kind, column, text in texts:
            length = self._tokenizer.length(text)
            if length > most:
                yield Problem(
                    row.index + 1,
                    row.id,
                    column,
                    kind,
                    False,
                    f"has {length - 2} tokens and the text encoder sees {most - 2}; shorten it",
                )

    def _work(self, request: Request, subjects: int) -> Work:
        config = self._config
        scale = request.guidance_scale
        return Work(
            request.method or config.method,
            request.num_inference_steps or config.num_inference_steps,
            (config.guidance_scale if scale is None else scale) > 1,
            request.height or config.height,
            request.width or config.width,
            subjects,
            self._conjuncts(request),
        )

    def _conjuncts(self, request: Request) -> int:
        if (request.method or self._config.method) != "composable-diffusion":
            return 1
        subjects = resolve_subjects(self._tokenizer, request)
        return len(conjuncts(self._tokenizer, request.prompt, subjects))


class _Encoded(NamedTuple):
    input_ids: list[int]
    offset_mapping: list[tuple[int, int]] | None = None


class _ManyTexts:
    """A tokenizer as `aae_batch.sampling.words` uses it, which has tokenized the prompts beforehand."""

    def __init__(
        self, backend: Backend, model_max_length: int, known_words: Sequence[str] | None
    ) -> None:
        self.model_max_length = model_max_length
        self.init_kwargs = {KNOWN_WORDS: known_words}
        self._backend = backend
        self._names = [backend.id_to_token(i) or "" for i in range(backend.get_vocab_size())]
        self._whole: dict[str, list[int]] = {}
        self._bare: dict[str, list[int]] = {}

    def prepare(self, prompts: Sequence[str]) -> None:
        new = list(dict.fromkeys(prompts))
        encoded = self._backend.encode_batch_fast(new)
        self._whole = {text: one.ids for text, one in zip(new, encoded, strict=True)}

    def length(self, text: str) -> int:
        """With the start and the end token."""
        return len(self(text).input_ids)

    def plainly_has(self, request: Request) -> bool:
        """Whether it is seen at a glance that all subjects are found, which they mostly are: all are
        letters between blanks, no two have a word in common, and nothing is cut off. Where it is not,
        `resolve_subjects` has the word."""
        if not request.subjects or request.token_indices is not None:
            return False
        if self.length(request.prompt) > self.model_max_length:
            return False
        if any(why_unknown(self, text) for text in (request.prompt, request.negative_prompt or "")):
            return False
        prompt = f" {request.prompt.lower()} "
        subjects = [subject.lower() for subject in request.subjects]
        words = [word for subject in subjects for word in subject.split()]
        return len(set(words)) == len(words) and all(
            _PLAIN.fullmatch(subject) and (f" {subject} " in prompt or f" {subject}," in prompt)
            for subject in subjects
        )

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
        names = self._names
        return [names[i] for i in ids]


def _problem(row: Row, kind: str, reason: str, fails: bool) -> Problem:
    match = _COLUMN.match(reason)
    if match:
        column, reason = match[1], reason[match.end() :]
    elif reason.startswith(("height is", "width is", "negative_prompt has")):
        column = reason.split()[0]
    elif reason.startswith("token"):
        column = "token_indices"
    else:
        column = "prompt" if reason.startswith("the prompt") else "subjects"
    return Problem(row.index + 1, row.id, column, kind, fails, reason)


# --- rows that repeat another --------------------------------------------------------------------


def _picture(request: Request, config: GuidanceConfig) -> tuple[Any, ...]:
    """All that a row's picture depends on, the run's settings where it has none of its own; what is left
    open there, the size, the model decides for all alike. stable-diffusion looks at no subjects."""
    method = request.method or config.method
    scale, negative = request.guidance_scale, request.negative_prompt
    named = method != "stable-diffusion"
    return (
        request.prompt,
        request.seed,
        method,
        tuple(request.subjects or ()) if named else (),
        tuple(request.token_indices or ()) if named else (),
        (config.negative_prompt if negative is None else negative) or "",
        float(config.guidance_scale if scale is None else scale),
        request.num_inference_steps or config.num_inference_steps,
        request.height or config.height,
        request.width or config.width,
    )


def _digest(value: tuple[Any, ...]) -> bytes:
    return hashlib.blake2b(repr(value).encode("utf-8", "backslashreplace"), digest_size=16).digest()


def _repeats(digests: np.ndarray) -> list[tuple[int, int]]:
    """Rows whose digest an earlier row has, and the first such row. digests: [rows, 2], uint64."""
    order = np.lexsort((np.arange(len(digests)), digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    firsts = order[is_new][np.cumsum(is_new) - 1]
    pairs = zip(order[~is_new].tolist(), firsts[~is_new].tolist(), strict=True)
    return sorted(pairs)


def _repeated(manifest: Manifest, pairs: list[tuple[int, int]]) -> Iterator[Problem]:
    """The warnings; the rows' ids are read again, a part at a time."""
    for part, some in groupby(pairs, key=lambda pair: pair[0] // PART_ROWS):
        start = part * PART_ROWS
        rows, _ = manifest.read(start, min(start + PART_ROWS, len(manifest)))
        for row, first in some:
            reason = (
                f"asks for the same picture as row {first + 1}; give it another seed, or remove one "
                "of them"
            )
            yield Problem(row + 1, rows[row - start].id, "seed", REPEATED, False, reason)
