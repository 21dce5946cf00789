"""A prompt on its way into a manifest: all that its rows share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

MOST_PROMPTS = 2_000_000
"""At once: they are held in memory, at about 750 bytes each. Their rows, for each seed and method, are
not."""


@dataclass(frozen=True)
class Prompt:
    """What rows share that differ in seed and method alone.

    Attributes:
        text: the prompt.
        subjects: words or phrases that must be drawn; None where nobody has said.
        token_indices: or their positions.
        name: what the ids of its rows begin with; None for one made of its place and its words.
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
    """Prompts, and what is carried with each to the metadata.

    Attributes:
        carried: a column for each name, with a value for each prompt.
    """

    prompts: Sequence[Prompt]
    carried: Mapping[str, pa.Array | pa.ChunkedArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)
