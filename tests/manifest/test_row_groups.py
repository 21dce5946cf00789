from __future__ import annotations

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aae_batch.manifest import row_groups
from aae_batch.manifest.reader import open_manifest
from aae_batch.manifest.row_groups import RowGroups


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "manifest.parquet"
    table = pa.table({"prompt": [f"p{i}" for i in range(1000)], "x": range(1000)})
    pq.write_table(table.replace_schema_metadata({"made": "here"}), path, row_group_size=100)
    return path


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (99, 101), (100, 200), (150, 450), (999, 1000), (0, 1000)]
)
def test_a_slice_is_the_rows_that_were_asked_for(path, start, stop):
    groups = RowGroups(row_groups.opened(path))
    assert groups.read(start, stop)["x"].to_pylist() == list(range(start, stop))


def test_slices_may_be_asked_for_in_any_order(path):
    groups = RowGroups(row_groups.opened(path))
    for start in (0, 900, 50, 950, 300, 290):
        assert groups.read(start, start + 20)["x"].to_pylist() == list(range(start, start + 20))


def test_a_slice_travels_without_its_row_group(path):
    table = RowGroups(row_groups.opened(path)).read(10, 12)
    assert len(pickle.dumps(table)) < 3_000


def test_a_file_with_row_groups_too_large_to_hold_is_read_all_the_same(path, monkeypatch):
    monkeypatch.setattr(row_groups, "MOST_ROWS", 99)
    monkeypatch.setattr(row_groups, "_REGROUPED_ROWS", 64)
    with open_manifest(path) as manifest:
        assert len(manifest) == 1000
        rows, extras = manifest.read(120, 200)
        assert [row.request.prompt for row in rows] == [f"p{i}" for i in range(120, 200)]
        assert extras["x"].to_pylist() == list(range(120, 200))


def test_regrouping_changes_nothing_but_the_row_groups(path, tmp_path):
    row_groups.regroup([path], pq.read_schema(path), tmp_path / "new.parquet")
    assert pq.read_table(tmp_path / "new.parquet").equals(pq.read_table(path), check_metadata=True)
