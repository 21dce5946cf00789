"""The prompts from which a manifest is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

MOST_PROMPTS = 2_000_000
"""Limit per manifest, as prompts are held in memory, at about 750 bytes each. Their rows, one per seed and
method, are not."""


@dataclass(frozen=True)
class Prompt:
    """The values shared by rows that differ only in seed and method.

    Attributes:
        text: the prompt.
        subjects: words or phrases that must be drawn; None if not specified.
        token_indices: positions of the subjects' tokens, instead of or besides `subjects`.
        name: prefix of the ids of its rows; None to derive one from its position and its words.
        settings: other columns of the manifest, e.g. `height`.
    """

    text: str
    subjects: tuple[str, ...] | None = None
    token_indices: tuple[tuple[int, ...], ...] | None = None
    name: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_subjects(self) -> bool:
        return self.subjects is not None or self.token_indices is not None


@dataclass(frozen=True)
class Prompts:
    """Prompts, and the extra columns copied to the metadata.

    Attributes:
        carried: column name -> column with one value per prompt.
    """

    prompts: Sequence[Prompt]
    carried: Mapping[str, pa.Array | pa.ChunkedArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)
