"""Finds the subjects of a prompt, by default its nouns.

The tagger is HanTa (Wartena 2019, "A probabilistic morphology model for German lemmatization"), whose
package includes its English model, so nothing is downloaded. Adjacent nouns form one subject ("teddy
bear"), which includes adjectives only on request. Nouns that describe the kind of image or a location are
excluded ("a photo of", "in front of").
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

from aae_batch.errors import SettingsError

NO_THINGS = frozenset((files(__package__) / "no_things.txt").read_text(encoding="utf-8").split())
"""Nouns that are no subjects when "of" follows."""

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]")
_NOUN, _ADJECTIVE = ("NN", "NP0"), "AJ"  # BNC tags: common nouns and names; adjectives
_BETWEEN_ADJECTIVES = ("and", ",")


@dataclass(frozen=True)
class Nouns:
    """Finds the nouns of English prompts.

    Args:
        ignored: words that are never a subject, case-insensitive.
        adjectives: include leading adjectives in a subject, "red and blue bird".

    Raises:
        SettingsError: the tagger is not installed.
    """

    ignored: Collection[str] = ()
    adjectives: bool = False

    def __post_init__(self) -> None:
        _ = self._tagger  # fail early if the package is missing

    def __call__(self, prompt: str) -> tuple[str, ...]:
        """Return the subjects of a prompt in order, spelled as in the prompt, repeated nouns included."""
        words = list(_WORD.finditer(prompt))
        if not words:
            return ()
        tagged = self._tagger.tag_sent([word.group() for word in words])
        ignored = {word.lower() for word in self.ignored}
        subjects: list[tuple[int, int]] = []
        names_nothing = False  # drop the last subject if "of" follows
        begun: int | None = None  # start of the adjectives before this word
        for word, (text, _, tag) in zip(words, tagged, strict=True):
            if not tag.startswith(_NOUN) or text.lower() in ignored:
                if names_nothing and text.lower() == "of":
                    subjects.pop()
                names_nothing = False
                if self.adjectives and tag.startswith(_ADJECTIVE):
                    begun = word.start() if begun is None else begun
                elif text.lower() not in _BETWEEN_ADJECTIVES:
                    begun = None
                continue
            start, end = word.span()
            if begun is not None:
                start, begun = begun, None
            elif (
                subjects and not prompt[subjects[-1][1] : start].strip()
            ):  # only whitespace between
                start = subjects.pop()[0]
            subjects.append((start, end))
            names_nothing = text.lower() in NO_THINGS
        return tuple(prompt[start:end] for start, end in subjects)

    @cached_property
    def _tagger(self) -> Any:
        try:
            from HanTa.HanoverTagger import HanoverTagger
        except ImportError:
            raise SettingsError(
                "Some prompts have no subjects, and finding them needs `pip install HanTa`; "
                'or give them in a column subjects, e.g. "cat;frog", or for a template with '
                '--subjects "{animal};{object}"; or leave them out with --no-find-subjects.'
            ) from None
        return HanoverTagger("morphmodel_en.pgz")
