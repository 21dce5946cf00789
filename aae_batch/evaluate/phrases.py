"""A row's subjects, and the part of its prompt that speaks of each.

Judges split the prompt's text as the official metrics do; `sampling/phrases.py` splits a generator's
tokens, which a judge does not have, and by finer rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_SEPARATOR = re.compile(r"\s*,\s*(?:(?:and|with)\s+)?|\s+(?:and|with)\s+", re.IGNORECASE)


def subjects_of(
    row: Mapping[str, Any], attention: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[str]:
    """The subjects of a metadata row: as the manifest names them, else, where it has
    `token_indices`, the words at these, as the row's part of the attention table spells them."""
    if row["subjects"] is not None:
        return list(row["subjects"])
    return [entry["subject"] for entry in attention.get(row["id"], ())]


def phrases(prompt: str, subjects: Sequence[str]) -> list[str]:
    """For each subject the part of the prompt that speaks of it: of "a frog and a yellow bowl", whose
    subjects are "frog" and "bowl", these are "a frog" and "a yellow bowl".

    Parts stand between " and ", " with " and commas; the official metrics split at the first two. A
    word that occurs twice is taken in order of appearance. Where a part speaks of several subjects
    or of none, the subject's own words stand for it.
    """
    free = [part.strip() for part in _SEPARATOR.split(prompt)]
    own: list[str | None] = []
    for subject in subjects:
        part = next((part for part in free if _speaks_of(part, subject)), None)
        own.append(part)
        if part is not None:
            free.remove(part)
    left_over = [subject for subject, part in zip(subjects, own, strict=True) if part is None]
    return [
        subject if part is None or any(_speaks_of(part, other) for other in left_over) else part
        for subject, part in zip(subjects, own, strict=True)
    ]


def _speaks_of(part: str, subject: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", part, re.IGNORECASE) is not None
