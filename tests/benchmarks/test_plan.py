"""The planning benchmark measures what it says, on a manifest of a few rows."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from benchmarks.plan import (
    commit_half,
    measure_ledger,
    measure_plan,
    measure_read,
    measure_status,
    write_manifest,
)


@pytest.mark.parametrize("row_group", [1_000, 200_000])
def test_it_plans_resumes_and_reads(tmp_path, row_group):
    path = tmp_path / "manifest.parquet"
    write_manifest(path, 100_500, row_group)
    assert pq.ParquetFile(path).metadata.num_rows == 100_500
    assert pq.ParquetFile(path).metadata.row_group(0).num_rows == min(row_group, 100_500)
    assert measure_plan(tmp_path)["shards to do"] == 393
    commit_half(tmp_path)
    assert measure_plan(tmp_path)["shards to do"] == 196
    assert measure_status(tmp_path)["shards done"] == 197
    measure_read(tmp_path)
    measure_ledger(tmp_path)
