"""The rows that the page shows: their columns, the curves and maps of their subjects, as it reads
them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from aae_batch.dataset import layout
from aae_batch.report.metrics import Judged, Score

COLUMNS = [
    *(
        column.name
        for column in (*layout.MANIFEST_COLUMNS, *layout.OUTCOME_COLUMNS)
        if column.name not in ("token_indices", "fingerprint")
    ),
    "set",
]
"""What is read of the metadata; `set` is there in benchmarks alone."""

_AS_THEY_ARE = [name for name in COLUMNS if name not in ("status", "file_name", "sha256", "shard")]
_AS_TEXT = ("seed", "set")
"""A seed may be longer than a number of JavaScript; a manifest's own column may be anything."""
_DIGITS = {"seconds": 2}
_ATTENTION = ["id", "subject", "max_attention", "map", "map_height", "map_width", "map_scale"]
_OF_SUBJECT = ("subject", "steps", "height", "width", "scale", "found", "bound")
UNIT = 65535
"""An attention of 1 in a curve."""

Locate = Callable[[dict[str, Any]], str | int | None]
"""From a metadata row with a picture to its URL, or its place among those that the page holds; None
where there is none."""


def linked(prefix: str = "") -> Locate:
    """Pictures by their URL relative to the page: `prefix` and the file's name."""
    return lambda row: quote(prefix + row["file_name"])


class Rows:
    """Rows as columns, which grow shard by shard.

    A card of the page is the rows of one prompt, seed and set, each made by another method; a second
    row of the same method begins another card.

    Attributes:
        columns: of every row, by name; `card` numbers the cards, `picture` is None without one,
            `first` and `attended` are the place and the number of its rows in `attention`.
        attention: of every row and subject, by name: `subject`, `steps` of its curve, `height`,
            `width` and `scale` of its map, and `found` and `bound`, what a detector says.
        scores: of every row, by score.
        curves: max attention per step, uint16, little-endian, 65535 for 1, one after the other.
        maps: uint8, row by row, one after the other.
    """

    def __init__(self) -> None:
        self.columns: dict[str, list] = {
            name: [] for name in (*_AS_THEY_ARE, "card", "picture", "first", "attended")
        }
        self.attention: dict[str, list] = {name: [] for name in _OF_SUBJECT}
        self.scores: dict[Score, list] = {}
        self.curves = bytearray()
        self.maps = bytearray()
        self._cards: dict[tuple, int] = {}
        self._seen: dict[tuple, int] = defaultdict(int)

    def __len__(self) -> int:
        return len(self.columns["id"])

    def add(self, table: pa.Table, attention: pa.Table, judged: Judged, locate: Locate) -> None:
        """Take in a shard, or the first rows of one.

        Args:
            table: its metadata; the columns of `COLUMNS` are used.
            attention: its attention table, whole.
            judged: what metrics say of its rows, whole.
        """
        before = len(self)
        rows = table.to_pylist()
        of_row: dict[str, list[dict]] = defaultdict(list)
        for seen in attention.select(_ATTENTION).to_pylist():
            of_row[seen["id"]].append(seen)
        verdicts = (
            values.slice(0, len(rows)).to_pylist() for values in (judged.found, judged.bound)
        )
        for row, found, bound in zip(rows, *verdicts, strict=True):
            self._add_row(row, locate)
            attended = of_row[row["id"]] if row["status"] == "ok" else []
            self._add_attention(attended, found or (), bound or ())
        for score, values in judged.columns.items():
            column = self.scores.setdefault(score, [None] * before)
            column.extend(_short(value) for value in values.slice(0, len(rows)).to_pylist())
        for column in self.scores.values():
            column.extend([None] * (len(self) - len(column)))

    def _add_row(self, row: dict[str, Any], locate: Locate) -> None:
        for name in _AS_TEXT:
            row[name] = None if row.get(name) is None else str(row[name])
        for name in _AS_THEY_ARE:
            self.columns[name].append(_short(row.get(name), _DIGITS.get(name, 4)))
        self.columns["card"].append(self._card(row))
        self.columns["picture"].append(locate(row) if row["status"] == "ok" else None)

    def _card(self, row: dict[str, Any]) -> int:
        key = (row["prompt"], row["seed"], row.get("set"))
        if row["prompt"] is None or row["seed"] is None or row["method"] is None:
            key = (row["id"], len(self._cards), None)
        nth = self._seen[(*key, row["method"])]
        self._seen[(*key, row["method"])] += 1
        return self._cards.setdefault((*key, nth), len(self._cards))

    def _add_attention(
        self, seen: list[dict], found: Sequence[bool], bound: Sequence[bool | None]
    ) -> None:
        """`seen` is in the order of the row's subjects, as `found` and `bound` are."""
        self.columns["first"].append(len(self.attention["subject"]))
        self.columns["attended"].append(len(seen))
        for one, is_found, is_bound in zip_longest(seen, found[: len(seen)], bound[: len(seen)]):
            curve = np.nan_to_num(np.asarray(one["max_attention"], np.float32))
            self.curves += np.rint(curve.clip(0, 1) * UNIT).astype("<u2").tobytes()
            self.maps += one["map"]
            values = {
                "subject": one["subject"],
                "steps": len(curve),
                "height": one["map_height"],
                "width": one["map_width"],
                "scale": _short(one["map_scale"]),
                "found": is_found,
                "bound": is_bound,
            }
            for name, value in values.items():
                self.attention[name].append(value)


def _short(value: Any, digits: int = 4) -> Any:
    """Floats with the digits that a person looks at; NaN and infinity, which JSON has not, as None."""
    if not isinstance(value, float):
        return value
    return round(value, digits) if np.isfinite(value) else None
