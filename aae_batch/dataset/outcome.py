"""The outcome of a row, in the form of its table rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aae_batch.dataset.layout import MANIFEST_COLUMNS
from aae_batch.errors import DroppedError, OccupiedError, RowError

VERDICTS = {"accepted": True, "rejected": False, "unjudged": None}
"""Of tries with a picture, and whether the judges accept it."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one row.

    Attributes:
        index: the row's position in the manifest.
        metadata: its row of the metadata table, without extra columns, shard and fingerprint.
        attention: its rows of the attention table.
        tries: its rows of the table of tries, in a run that has one.
        image: the encoded image, in layouts that write images with the commit. All images of a shard,
            about 256 files, stay in memory until then.
    """

    index: int
    metadata: dict[str, Any]
    attention: list[dict[str, Any]] = field(default_factory=list)
    tries: list[dict[str, Any]] = field(default_factory=list)
    image: bytes | None = None

    @property
    def failed(self) -> bool:
        return self.metadata["status"] == "failed"

    @property
    def dropped(self) -> bool:
        """Whether it failed as the user wished, so that it is no failure of the job."""
        return self.metadata.get("error_type") == DroppedError.__name__

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of its image in pixels."""
        return self.metadata["width"], self.metadata["height"]

    def with_image(self, image: bytes, **measured: Any) -> Outcome:
        """Return a copy with other bytes for its image, and the values measured when those were made."""
        said = {"sha256": hashlib.sha256(image).hexdigest(), **measured}
        return replace(self, image=image, metadata=self.metadata | said)

    def occupied(self, place: str) -> Outcome:
        """Return a failed outcome, because an object that no run wrote has the image's name."""
        row = {column.name: self.metadata.get(column.name) for column in MANIFEST_COLUMNS}
        error = OccupiedError(
            self.metadata["id"],
            f"{place} exists and is not an image of this run: move it away, and run the same command "
            "again with --retry-failed.",
        )
        row["forwards"] = self.metadata.get("forwards")
        for first in self.tries[:1]:
            row |= {"seed": first["seed"], "method": first["method"]}
        failed = Outcome(self.index, row | reason(error))
        return failed.after([made | {"kept": False} for made in self.tries])

    def after(self, tries: Sequence[dict[str, Any]]) -> Outcome:
        """Return a copy with the row's tries, rows of the table of tries, one of them kept if the row
        has an image."""
        if not tries:
            return self
        kept = next((made for made in tries if made["kept"]), None)
        said = {
            "forwards": sum(forwards_of(made) for made in tries),
            "tries": len(tries),
            "kept_try": kept and kept["try"],
            "accepted": VERDICTS.get(kept["verdict"]) if kept else False,
            "first_seed": tries[0]["seed"],
        }
        return replace(self, tries=list(tries), metadata=self.metadata | said)


def forwards_of(made: Mapping[str, Any]) -> int:
    """Return what a try cost, as `Result.forwards`. `made` is its row of the table of tries."""
    return made["guided"] + made["denoised"]


def reason(error: RowError, kind: str = "") -> dict[str, str]:
    """Return the columns that say why a row failed.

    Args:
        kind: name for `error_type`. Default: the error's class.
    """
    return {"status": "failed", "error_type": kind or type(error).__name__, "error": str(error)}


def may_have_left_a_picture(row: Mapping[str, Any]) -> bool:
    """Return whether an earlier attempt may have stored an image of this failed row. Not so for an
    `OccupiedError`: the object in the image's place is not an image of the run."""
    return row["status"] == "failed" and row["error_type"] != OccupiedError.__name__
