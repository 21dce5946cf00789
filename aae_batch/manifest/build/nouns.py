"""Subjects found in a prompt when nobody has named them: its nouns.

The tagger is HanTa (Wartena 2019, "A probabilistic morphology model for German lemmatization"),
whose English model lies in its package, so that nothing is downloaded. Neighbouring nouns are one
subject ("teddy bear"); adjectives are part of it only on request. Nouns that say what kind of picture it is, or where
something is, are left out ("a photo of", "in front of").
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
"""Nouns that name nothing when "of" follows."""

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]")
_NOUN, _ADJECTIVE = ("NN", "NP0"), "AJ"  # of the BNC's tags: common nouns and names; adjectives
_BETWEEN_ADJECTIVES = ("and", ",")


@dataclass(frozen=True)
class Nouns:
    """Finds the nouns of English prompts.

    Args:
        ignored: words that are never a subject, in any case.
        adjectives: a subject begins with its adjectives, "red and blue bird".

    Raises:
        SettingsError: the tagger is not installed.
    """

    ignored: Collection[str] = ()
    adjectives: bool = False

    def __post_init__(self) -> None:
        _ = self._tagger  # a missing package is told at once

    def __call__(self, prompt: str) -> tuple[str, ...]:
        """The subjects of a prompt in its order, spelled as in it; the same noun as often as it
        occurs."""
        words = list(_WORD.finditer(prompt))
        if not words:
            return ()
        tagged = self._tagger.tag_sent([word.group() for word in words])
        ignored = {word.lower() for word in self.ignored}
        subjects: list[tuple[int, int]] = []
        names_nothing = False  # the subject so far, if "of" follows
        begun: int | None = None  # where the adjectives before this word begin
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
            elif subjects and not prompt[subjects[-1][1] : start].strip():  # blanks alone between
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
