"""Subjects found in a prompt when nobody has named them: its nouns.

The tagger is HanTa (Wartena 2019, "A probabilistic morphology model for German lemmatization"),
whose English model lies in its package, so that nothing is downloaded. Neighbouring nouns are one
subject ("teddy bear"); adjectives are none of it. Nouns that say what kind of picture it is, or where
something is, are left out ("a photo of", "in front of").
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from aae_batch.errors import SettingsError

NO_THINGS = frozenset(
    {
        "photo", "photograph", "picture", "image", "painting", "drawing", "portrait", "illustration",
        "sketch", "render", "rendering", "depiction", "shot", "view", "close-up", "closeup",
        "watercolor", "watercolour", "group", "pair", "couple", "bunch", "set", "number", "lot",
        "kind", "type", "sort", "piece", "front", "back", "top", "bottom", "side", "middle", "center",
        "centre", "edge",
    }
)  # fmt: skip
"""Nouns that name nothing when "of" follows."""

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]")
_NOUN = ("NN", "NP0")  # of the BNC's tags: common nouns, names


@dataclass(frozen=True)
class Nouns:
    """Finds the nouns of English prompts.

    Args:
        ignored: words that are never a subject, in any case.

    Raises:
        SettingsError: the tagger is not installed.
    """

    ignored: Collection[str] = ()

    def __post_init__(self) -> None:
        _ = self._tagger  # a missing package is told at once

    def __call__(self, prompt: str) -> tuple[str, ...]:
        """The subjects of a prompt in its order, spelled as in it; the same noun as often as it
        occurs."""
        words = list(_WORD.finditer(prompt))
        if not words:
            return ()
        tagged = self._tagger.tag_sent([word.group() for word in words])
        is_noun = [
            tag.startswith(_NOUN) and word.lower() not in self._skipped for word, _, tag in tagged
        ]
        subjects = []
        i = 0
        while i < len(words):
            start = i
            while i < len(words) and is_noun[i] and (i == start or _touch(words[i - 1], words[i])):
                i += 1
            if i == start:
                i += 1
                continue
            after = words[i].group().lower() if i < len(words) else ""
            if not (after == "of" and words[i - 1].group().lower() in NO_THINGS):
                subjects.append(prompt[words[start].start() : words[i - 1].end()])
        return tuple(subjects)

    @cached_property
    def _skipped(self) -> frozenset[str]:
        return frozenset(word.lower() for word in self.ignored)

    @cached_property
    def _tagger(self) -> Any:
        try:
            from HanTa.HanoverTagger import HanoverTagger
        except ImportError:
            raise SettingsError(
                "Some prompts have no subjects, and finding them needs `pip install 'aae-batch[nlp]'`; "
                'or give them in a column subjects, e.g. "cat;frog", or for a template with '
                '--subjects "{animal};{object}"; or leave them out with --no-find-subjects.'
            ) from None
        return HanoverTagger("morphmodel_en.pgz")


def _touch(first: re.Match[str], second: re.Match[str]) -> bool:
    """Nothing but blanks is between two words."""
    return not second.string[first.end() : second.start()].strip()
