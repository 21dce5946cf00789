"""One thing that is not as it should be in an output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Problem:
    """What `verify` found, and what a repair does about it.

    Attributes:
        kind: `missing`, a part that is still to be made; `broken`, a shard that must be made again;
            `stray`, pictures that the run wrote for rows that have none; `summary`, counts to be made
            again; `other`, for a person to fix.
        text: a sentence.
        row: the id of the row that is concerned.
        names: the pictures that are stray, or damaged.
    """

    kind: Literal["missing", "broken", "stray", "summary", "other"]
    text: str
    shard: int | None = None
    row: str | None = None
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = [] if self.shard is None else [f"shard {self.shard}"]
        where += [] if self.row is None else [f"row {self.row}"]
        return ": ".join([", ".join(where), self.text]) if where else self.text


def not_ours(names: Sequence[str], shard: int | None = None) -> Problem:
    """Objects that no run wrote lie where a run's pictures belong."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    text = f"no run wrote {names[0]}{more}: move it away, if you know what it is."
    return Problem("other", text, shard)
