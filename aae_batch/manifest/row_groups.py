"""Rows of a Parquet file by their position, at a price that does not grow with the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MOST_ROWS, MOST_BYTES = 1 << 20, 256 << 20
"""Of a row group, for it to be held whole in memory. 2^20 rows are what pyarrow writes by default."""

_REGROUPED_ROWS, _REGROUPED_BYTES = 100_000, 64 << 20
_KEPT = 2
"""Row groups held: a slice may reach over the edge of one."""


class RowGroups:
    """An open Parquet file whose row groups are read one at a time, and the last ones kept.

    Args:
        file: its row groups are at most `MOST_ROWS` and `MOST_BYTES`; see `regrouped`.
    """

    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file
        self._starts = [0]
        for group in range(file.num_row_groups):
            self._starts.append(self._starts[-1] + file.metadata.row_group(group).num_rows)
        self._kept: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def schema(self) -> pa.Schema:
        return self._file.schema_arrow

    def read(self, start: int, stop: int) -> pa.Table:
        """The rows from `start` up to `stop`, copied, so that they travel without their row group."""
        parts = [
            self._group(group).slice(max(0, start - first), stop - max(first, start))
            for group, (first, end) in enumerate(zip(self._starts, self._starts[1:], strict=False))
            if first < stop and end > start
        ]
        table = pa.concat_tables([self.schema.empty_table(), *parts])
        return table.take(pa.array(range(len(table)), pa.int64()))

    def column(self, name: str) -> Iterator[pa.Array]:
        """One column from the first row to the last, in pieces."""
        for batch in self._file.iter_batches(_REGROUPED_ROWS, columns=[name]):
            yield batch[name]

    def _group(self, group: int) -> pa.Table:
        if group not in self._kept:
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[group] = self._file.read_row_group(group)
        return self._kept[group]


def opened(path: Path) -> pq.ParquetFile:
    """Without a memory map: of a file that is cut short later, reading is an error and no crash."""
    return pq.ParquetFile(path, buffer_size=1 << 20)


def too_large(file: pq.ParquetFile) -> bool:
    """Some row group is too large to be held in memory for the sake of a few rows."""
    groups = (file.metadata.row_group(group) for group in range(file.num_row_groups))
    return any(group.num_rows > MOST_ROWS or group.total_byte_size > MOST_BYTES for group in groups)


def regroup(file: pq.ParquetFile, target: Path) -> None:
    """Write the same table with small row groups."""
    size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
    rows = _REGROUPED_BYTES * file.metadata.num_rows // max(size, 1)
    with pq.ParquetWriter(target, file.schema_arrow) as writer:
        for batch in file.iter_batches(max(1, min(rows, _REGROUPED_ROWS))):
            writer.write_batch(batch)
