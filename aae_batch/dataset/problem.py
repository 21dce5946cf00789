"""A problem that `verify` finds in an output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Problem:
    """A problem found by `verify`; its kind decides how it is repaired.

    Attributes:
        kind: `missing`: a part is not generated yet. `broken`: the shard must be generated again.
            `stray`: the run wrote an object that it does not need, such as an image of a row that failed. `summary`: the counts must be
            computed again. `other`: only the user can fix it.
        text: one sentence.
        row: id of the affected row.
        names: the stray or damaged images.
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
    """Return the problem of objects among a run's images that no run wrote."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    text = f"no run wrote {names[0]}{more}: move it away, if you know what it is."
    return Problem("other", text, shard)
