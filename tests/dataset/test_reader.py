from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.dataset import layout
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.storage import open_storage


def test_scores_are_found_by_metric_and_shard(tmp_path):
    storage = open_storage(tmp_path)
    dataset = Dataset(storage)
    assert dataset.metrics() == []
    table = pa.table({"id": ["a"], "sha256": ["00"], "similarity": [0.25]})
    for shard in (3, 1):
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        storage.write_bytes(layout.metric_name("clip", shard), buffer.getvalue())
    storage.write_bytes(layout.metric_run_name("clip"), b"{}")
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
    storage.write_bytes(layout.metric_run_name("clip"), b'{"fingerprint": "another"}')
    wanted = dataset.metric_fingerprint("clip")
    assert dataset.current_scores_of("clip", 0, wanted) is None
    assert dataset.current_scores_of("clip", 1, wanted).equals(table, check_metadata=True)
