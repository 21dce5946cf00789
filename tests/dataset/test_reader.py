from __future__ import annotations

import io
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aae_batch.dataset import layout
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.scores import Scores
from aae_batch.errors import OutputError
from aae_batch.store.open import open_storage


def test_scores_are_found_by_metric_and_shard(tmp_path):
    storage = open_storage(tmp_path)
    dataset = Dataset(storage)
    assert dataset.metrics() == []
    table = pa.table({"id": ["a"], "sha256": ["00"], "similarity": [0.25]})
    for shard in (3, 1):
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        storage.write_bytes(layout.metric_name("clip", shard), buffer.getvalue())
    storage.write_bytes(layout.metric_run_name("clip"), b'{"fingerprint": "", "settings": {}}')
    assert dataset.metrics() == ["clip"]
    assert dataset.scored_shards("clip") == [1, 3]
    assert dataset.scores_of("clip", 3).to_pylist() == table.to_pylist()


def test_scores_of_another_run_than_the_metrics_last_one_are_not_current(tmp_path):
    storage = open_storage(tmp_path)
    dataset = Dataset(storage)
    table = pa.table({"id": ["a"], "sha256": ["00"], "similarity": [0.25]})
    for shard, mark in enumerate(("one", "another")):
        buffer = io.BytesIO()
        marked = table.replace_schema_metadata({layout.SCORES_FINGERPRINT: mark})
        pq.write_table(marked, buffer)
        storage.write_bytes(layout.metric_name("clip", shard), buffer.getvalue())
    storage.write_bytes(
        layout.metric_run_name("clip"), b'{"fingerprint": "another", "settings": {}}'
    )
    scores, keys = Scores(dataset), table.select(["id", "sha256"])
    assert scores.of("clip", 0, keys).columns is None
    assert scores.of("clip", 0, keys).stale == 1
    assert scores.of("clip", 1, keys).columns.equals(table.drop_columns(["id", "sha256"]))
    storage.delete(layout.metric_run_name("clip"))
    assert Scores(dataset).of("clip", 1, keys).stale == 1  # of which run it is nobody knows


@pytest.mark.parametrize(
    ("source", "name", "whole"),
    [
        ("files", "metadata/00000.parquet", 0),
        ("files", "metadata/00000.parquet", 1000),
        ("files", "attention/00000.parquet", 1000),
        ("files", "images/00000/a.png", 0),
        ("files", "images/00000/a.png", 40),
        ("webdataset", "images/00000.tar", 0),
        ("webdataset", "images/00000.tar", 540),
    ],
)
def test_a_damaged_object_is_named_with_what_mends_it(make_output, source, name, whole):
    """`whole` bytes of it are as they were."""
    storage = make_output(source).storage
    dataset = Dataset(storage)
    row = dataset.metadata().to_pylist()[0]
    data = storage.read_bytes(name)
    storage.write_bytes(name, data[:whole] + b"\xff" * 2000)
    mend = f"{re.escape(name)}.* is damaged: `aae-batch verify --repair {storage.root}`"
    with pytest.raises(OutputError, match=mend):
        _read_all(dataset, row)


def test_damaged_pictures_within_a_table_are_named(make_output):
    storage = make_output("parquet").storage
    dataset = Dataset(storage)
    row = dataset.metadata().to_pylist()[0]
    data = storage.read_bytes("metadata/00000.parquet")
    start = data.index(b"\x28\xb5\x2f\xfd")  # of what zstd wrote first
    storage.write_bytes(
        "metadata/00000.parquet", data[:start] + b"\xff" * 900 + data[start + 900 :]
    )
    with pytest.raises(OutputError, match=r"metadata/00000\.parquet is damaged"):
        _read_all(dataset, row)


def _read_all(dataset: Dataset, row: dict) -> None:
    dataset.metadata()
    dataset.attention()
    dataset.image(row)


def test_damaged_scores_are_to_be_made_again(tmp_path):
    storage = open_storage(tmp_path)
    storage.write_bytes(layout.metric_name("clip", 0), b"nothing")
    with pytest.raises(OutputError, match="is damaged: `aae-batch evaluate` with --metric clip"):
        Dataset(storage).scores_of("clip", 0)


def test_what_a_store_says_while_a_table_is_read_is_told(make_output, monkeypatch):
    storage = make_output().storage

    class Failing(io.BytesIO):
        def read(self, *args):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(storage, "open", lambda name: Failing(b"0" * 100))
    with pytest.raises(OutputError, match=r"Cannot read .*00000\.parquet: Input/output error\."):
        Dataset(storage).table(0)
