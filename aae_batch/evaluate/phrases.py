"""Finds the subjects of a row and the phrase of each in its prompt.

Metrics split the text of the prompt as the official metrics do. `sampling/phrases.py` splits the
generator's tokens, which a metric does not have, by finer rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_SEPARATOR = re.compile(r"\s*,\s*(?:(?:and|with)\s+)?|\s+(?:and|with)\s+", re.IGNORECASE)


def subjects_of(
    row: Mapping[str, Any], attention: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[str]:
    """Return the subjects of a metadata row: those of the manifest, or else, for a row with `token_indices`,
    their words from the attention table."""
    if row["subjects"] is not None:
        return list(row["subjects"])
    return [entry["subject"] for entry in attention.get(row["id"], ())]


def phrases(prompt: str, subjects: Sequence[str]) -> list[str]:
    """Return the phrase of each subject in the prompt: "a frog" and "a yellow bowl" for the subjects "frog"
    and "bowl" of "a frog and a yellow bowl".

    Phrases are separated by " and ", " with " and commas; the official metrics split at the first two.
    Repeated subjects take phrases in order of appearance. A subject without a phrase, or whose phrase also
    names another subject that has none, is its own phrase.
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
