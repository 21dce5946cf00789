"""What became of a row, as the tables will say it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from aae_batch.dataset.layout import MANIFEST_COLUMNS
from aae_batch.errors import OccupiedError, RowError


@dataclass(frozen=True)
class Outcome:
    """What became of one row.

    Attributes:
        index: the row's position in the manifest.
        metadata: its row of the metadata table, without extra columns, shard and fingerprint.
        attention: its rows of the attention table.
        image: the encoded picture, in the layouts whose pictures are written with the commit. A
            shard's are in memory together until then, some 256 files.
    """

    index: int
    metadata: dict[str, Any]
    attention: list[dict[str, Any]] = field(default_factory=list)
    image: bytes | None = None

    @property
    def failed(self) -> bool:
        return self.metadata["status"] == "failed"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of its picture."""
        return self.metadata["width"], self.metadata["height"]

    def with_image(self, image: bytes, **measured: Any) -> Outcome:
        """The same with another encoding of its picture, and what was measured while that was made."""
        said = {"sha256": hashlib.sha256(image).hexdigest(), **measured}
        return replace(self, image=image, metadata=self.metadata | said)

    def occupied(self, place: str) -> Outcome:
        """A failure, since something that no run wrote stands where its picture belongs."""
        row = {column.name: self.metadata.get(column.name) for column in MANIFEST_COLUMNS}
        error = OccupiedError(
            self.metadata["id"],
            f"{place} is there and is no picture of this run: move it away, and run the same command "
            "again with --retry-failed.",
        )
        return Outcome(self.index, row | reason(error))


def reason(error: RowError, kind: str = "") -> dict[str, str]:
    """The columns that say why a row failed.

    Args:
        kind: the name of the error's type where it is not its class.
    """
    return {"status": "failed", "error_type": kind or type(error).__name__, "error": str(error)}


def may_have_left_a_picture(row: Mapping[str, Any]) -> bool:
    """Whether an earlier attempt at a row that has none may have drawn it: what is no picture, and what
    had its place, is no run's."""
    return row["status"] == "failed" and row["error_type"] != OccupiedError.__name__
