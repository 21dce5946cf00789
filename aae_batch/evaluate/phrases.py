"""What a row names, and in which words its prompt does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_SEPARATOR = re.compile(r"\s*,\s*(?:(?:and|with)\s+)?|\s+(?:and|with)\s+", re.IGNORECASE)


def subjects_of(row: Mapping[str, Any], attention: Sequence[Mapping[str, Any]]) -> list[str]:
    """The subjects of a metadata row: as the manifest names them, else, where it has
    `token_indices`, the words at these, as the row's part of the attention table spells them."""
    if row["subjects"] is not None:
        return list(row["subjects"])
    return [entry["subject"] for entry in attention]


def phrases(prompt: str, subjects: Sequence[str]) -> list[str]:
    """For each subject the part of the prompt that speaks of it: of "a frog and a yellow bowl", whose
    subjects are "frog" and "bowl", these are "a frog" and "a yellow bowl".

    Parts stand between " and ", " with " and commas; the official metrics split at the first two. A
    word that occurs twice is taken in order of appearance. Where a part speaks of several subjects
    or of none, the subject's own words stand for it.
    """
    parts = [part.strip() for part in _SEPARATOR.split(prompt)]
    free = set(range(len(parts)))
    places: list[int | None] = []
    for subject in subjects:
        place = next((i for i in sorted(free) if _speaks_of(parts[i], subject)), None)
        places.append(place)
        free.discard(-1 if place is None else place)
    left_over = [subject for subject, place in zip(subjects, places, strict=True) if place is None]
    found = []
    for subject, place in zip(subjects, places, strict=True):
        shared = place is not None and any(_speaks_of(parts[place], other) for other in left_over)
        found.append(subject if place is None or shared else parts[place])
    return found


def _speaks_of(part: str, subject: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", part, re.IGNORECASE) is not None
