from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from aae_batch.manifest.row_groups import RowGroups


@given(
    groups=st.lists(st.integers(0, 7), min_size=1, max_size=8),
    slices=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8),
)
def test_any_slices_in_any_order_are_the_rows_that_were_asked_for(groups, slices):
    rows = sum(groups)
    numbers = iter(range(rows))
    file = io.BytesIO()
    schema = pa.schema([("x", pa.int64())])
    with pq.ParquetWriter(file, schema) as writer:
        for size in groups:
            some = [next(numbers) for _ in range(size)]
            writer.write_table(pa.table({"x": some}, schema=schema), row_group_size=max(1, size))
    read = RowGroups(pq.ParquetFile(file))
    assert len(read) == rows
    for one, other in slices:
        start, stop = sorted((min(one, rows), min(other, rows)))
        assert read.read(start, stop)["x"].to_pylist() == list(range(start, stop))
    assert [x for piece in read.column("x") for x in piece.to_pylist()] == list(range(rows))
