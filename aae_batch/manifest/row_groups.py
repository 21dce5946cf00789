"""Random access to the rows of a Parquet file in time and memory independent of the file size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.manifest.plain import plain_table

MOST_ROWS, MOST_BYTES = 1 << 20, 256 << 20
"""Limits up to which a row group is held in memory. pyarrow writes 2^20 rows by default."""

_REGROUPED_ROWS, _REGROUPED_BYTES = 100_000, 64 << 20
_KEPT = 2
"""Row groups cached: a slice may span two."""


class RowGroups:
    """An open Parquet file that reads one row group at a time and caches the last ones.

    Args:
        file: has row groups of at most `MOST_ROWS` rows and `MOST_BYTES` bytes; see `regroup`.
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
        """Return rows `start` to `stop - 1`, copied so that pickling them leaves out the row group."""
        parts = [
            self._group(group).slice(max(0, start - first), stop - max(first, start))
            for group, (first, end) in enumerate(zip(self._starts, self._starts[1:], strict=False))
            if first < stop and end > start
        ]
        table = pa.concat_tables([self.schema.empty_table(), *parts])
        return table.take(pa.array(range(len(table)), pa.int64()))

    def column(self, name: str) -> Iterator[pa.Array]:
        """Yield one column in chunks, from the first row to the last."""
        for batch in self._file.iter_batches(_REGROUPED_ROWS, columns=[name]):
            yield batch[name]

    def _group(self, group: int) -> pa.Table:
        if group not in self._kept:
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[group] = self._file.read_row_group(group)
        return self._kept[group]


def opened(path: Path) -> pq.ParquetFile:
    """Open without a memory map, so that reading a file truncated later raises instead of crashing."""
    return pq.ParquetFile(path, buffer_size=1 << 20)


def too_large(file: pq.ParquetFile) -> bool:
    """Return whether a row group exceeds the limits for holding it in memory."""
    groups = (file.metadata.row_group(group) for group in range(file.num_row_groups))
    return any(group.num_rows > MOST_ROWS or group.total_byte_size > MOST_BYTES for group in groups)


def regroup(sources: Iterable[Path], schema: pa.Schema, target: Path) -> None:
    """Write the rows of Parquet files to one file with small row groups, in the columns of `schema`."""
    held: list[pa.Table] = []
    with pq.ParquetWriter(target, schema) as writer:
        for batch in _batches(sources):
            held.append(plain_table(pa.Table.from_batches([batch]), schema))
            rows, size = sum(map(len, held)), sum(table.nbytes for table in held)
            if rows >= _REGROUPED_ROWS or size >= _REGROUPED_BYTES:
                writer.write_table(pa.concat_tables(held))
                held.clear()
        if held:
            writer.write_table(pa.concat_tables(held))


def _batches(sources: Iterable[Path]) -> Iterator[pa.RecordBatch]:
    for source in sources:
        with opened(source) as file:
            groups = (file.metadata.row_group(i) for i in range(file.num_row_groups))
            size = sum(group.total_byte_size for group in groups)
            rows = _REGROUPED_BYTES * file.metadata.num_rows // max(size, 1)
            yield from file.iter_batches(max(1, min(rows, _REGROUPED_ROWS)))
