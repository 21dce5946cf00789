"""The rows that the page shows, in the format that its script reads: columns, curves and maps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
"""Metadata columns to read; only benchmark manifests have `set`."""

_AS_THEY_ARE = [name for name in COLUMNS if name not in ("status", "file_name", "sha256", "shard")]
_AS_TEXT = ("seed", "set")
"""Shown as text: a seed may exceed JavaScript's integers, and `set` may have any type."""
_DIGITS = {"seconds": 2}
_ATTENTION = ["id", "subject", "max_attention", "map", "map_height", "map_width", "map_scale"]
_OWN = ("accepted", "card", "file", "picture", "first", "attended", "first_try", "tried")
_OF_TRY = ("try", "method", "seed", "verdict", "kept", "error", "value", "guided", "denoised")
_OF_SUBJECT = ("subject", "steps", "height", "width", "scale", "times", "found", "bound")
UNIT = 65535
"""The value of an attention of 1 in a curve."""

TIMES_BYTES = 8_000_000
"""Largest total size of the maps over time in a page, before compression: those of the first rows. Of rows
with two subjects and ten maps of 16 x 16, there are 1,500."""
_TIMES_A_BLOCK = 1_000_000

Locate = Callable[[dict[str, Any]], str | int | None]
"""Maps a metadata row to the URL of its image or its index among the embedded images; None if the image
cannot be read."""


def linked(prefix: str = "") -> Locate:
    """Return a `Locate` of URLs relative to the page: `prefix` and the file's name."""
    return lambda row: quote(prefix + row["file_name"])


class Rows:
    """Rows as columns, accumulated shard by shard.

    A card of the page holds the rows of one prompt, seed and set, each from another method. A second
    row of the same method starts another card. Rows that were tried several times go by the seed and
    method of their first try: those of the kept ones meet by chance.

    Attributes:
        columns: one value per row, by name. `card` numbers the cards, `picture` is None without an
            image, `file` is the name of an image that is not linked, `first` and `attended` are the start and number of the row's entries in `attention`,
            `first_try` and `tried` those in `tries`.
        attention: one value per row and subject, by name: `subject`, `steps` of its curve, `height`,
            `width` and `scale` of its map, `times` (None, or block, start, steps and scales of its maps
            over time), and a detector's `found` and `bound`.
        tries: one value per try, by name; `picture` is as of a row.
        scores: one value per row, by score.
        curves: max attention per step, uint16, little-endian, 65535 for 1, concatenated.
        maps: uint8, row-major, concatenated.
        times: blocks of the maps over time, uint8, [steps, height, width] per subject, concatenated.
    """

    def __init__(self) -> None:
        self.columns: dict[str, list] = {name: [] for name in (*_AS_THEY_ARE, *_OWN)}
        self.attention: dict[str, list] = {name: [] for name in _OF_SUBJECT}
        self.tries: dict[str, list] = {name: [] for name in (*_OF_TRY, "picture")}
        self.scores: dict[Score, list] = {}
        self.curves = bytearray()
        self.maps = bytearray()
        self.times: list[bytearray] = []
        self._times_left = TIMES_BYTES
        self._cards: dict[tuple, int] = {}
        self._seen: dict[tuple, int] = defaultdict(int)

    def __len__(self) -> int:
        return len(self.columns["id"])

    def add(
        self,
        table: pa.Table,
        attention: pa.Table,
        judged: Judged,
        locate: Locate,
        tries: Mapping[str, Sequence[dict[str, Any]]],
    ) -> None:
        """Add a shard, or its first rows.

        Args:
            table: metadata of the rows to add, with the columns of `COLUMNS`.
            attention: attention table of the whole shard.
            judged: scores of the whole shard.
            tries: row id -> its tries, in a run with several tries a row.
        """
        before = len(self)
        rows = table.to_pylist()
        of_row: dict[str, list[dict]] = defaultdict(list)
        of_maps = [one.name for one in layout.MAPS_COLUMNS if one.name in attention.column_names]
        for seen in attention.select([*_ATTENTION, *of_maps]).to_pylist():
            of_row[seen["id"]].append(seen)
        verdicts = (
            values.slice(0, len(rows)).to_pylist() for values in (judged.found, judged.bound)
        )
        for row, found, bound in zip(rows, *verdicts, strict=True):
            # A row without tries may have the id of another: for that it failed.
            self._add_row(row, locate, tries.get(row["id"], ()) if row.get("tries") else ())
            attended = of_row[row["id"]] if row["status"] == "ok" else []
            self._add_attention(attended, found or (), bound or ())
        for score, values in judged.columns.items():
            column = self.scores.setdefault(score, [None] * before)
            column.extend(_short(value) for value in values.slice(0, len(rows)).to_pylist())
        for column in self.scores.values():
            column.extend([None] * (len(self) - len(column)))

    def _add_row(self, row: dict[str, Any], locate: Locate, tries: Sequence[dict]) -> None:
        for one in (row, *tries):
            for name in _AS_TEXT:
                one[name] = None if one.get(name) is None else str(one[name])
        for name in (*_AS_THEY_ARE, "accepted"):
            self.columns[name].append(_short(row.get(name), _DIGITS.get(name, 4)))
        self.columns["card"].append(self._card(row, tries[0] if tries else row))
        picture = locate(row) if row["status"] == "ok" else None
        self.columns["picture"].append(picture)
        self.columns["file"].append(None if isinstance(picture, str) else row["file_name"])
        self.columns["first_try"].append(len(self.tries["try"]))
        self.columns["tried"].append(len(tries))
        for made in tries:
            for name, column in self.tries.items():
                column.append(_short(made[name]))

    def _card(self, row: dict[str, Any], first: dict[str, Any]) -> int:
        """Return the number of a row's card. `first` is its first try, or the row."""
        key = (row["prompt"], first["seed"], row.get("set"))
        if row["prompt"] is None or first["seed"] is None or first["method"] is None:
            key = (row["id"], len(self._cards), None)
        nth = self._seen[(*key, first["method"])]
        self._seen[(*key, first["method"])] += 1
        return self._cards.setdefault((*key, nth), len(self._cards))

    def _add_attention(
        self, seen: list[dict], found: Sequence[bool], bound: Sequence[bool | None]
    ) -> None:
        """Add a row's attention. `seen`, `found` and `bound` are in the order of its subjects."""
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
                "times": self._add_times(one),
                "found": is_found,
                "bound": is_bound,
            }
            for name, value in values.items():
                self.attention[name].append(value)

    def _add_times(self, one: dict) -> list | None:
        maps = one.get("maps")
        if maps is None or len(maps) > self._times_left:
            self._times_left = 0  # so that the rows that have theirs are the first
            return None
        self._times_left -= len(maps)
        if not self.times or len(self.times[-1]) > _TIMES_A_BLOCK:
            self.times.append(bytearray())
        start = len(self.times[-1])
        self.times[-1] += maps
        scales = [_short(scale) for scale in one["map_scales"]]
        return [len(self.times) - 1, start, one["map_steps"], scales]


def _short(value: Any, digits: int = 4) -> Any:
    """Round floats for display. NaN and infinity, which JSON lacks, become None."""
    if not isinstance(value, float):
        return value
    return round(value, digits) if np.isfinite(value) else None
