"""The output that is exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from aae_batch.dataset.reader import Dataset
from aae_batch.errors import OutputError
from aae_batch.export.score_columns import ScoreColumns

_LEFT_OUT = frozenset(
    ["status", "error_type", "error", "file_name", "seconds", "shard", "fingerprint"]
)
"""Columns that tell of the job, or of the places in its output, and not of a picture."""


@dataclass(frozen=True)
class Source:
    """An output as it was when it was opened; a job may commit more meanwhile.

    Attributes:
        run: what its `run.json` says.
        shards: those that are committed.
        planned: how many there are going to be.
        schema: of the exported rows.
    """

    dataset: Dataset
    run: dict[str, Any]
    shards: list[int]
    planned: int
    scores: ScoreColumns
    schema: pa.Schema


def open_source(dataset: Dataset, partial: bool) -> Source:
    """Raises:
    OutputError: there is no run, no shard, or, unless `partial`, not every shard.
    """
    run = dataset.run
    root = dataset.storage.root
    if run is None:
        raise OutputError(f"There is no run in {root}: check the path.")
    shards = dataset.shards()
    planned = -(-run["rows"] // run["shard_size"])
    there = f"{len(shards)} of {planned} shards are there"
    if not partial and (len(shards) < planned or dataset.summary is None):
        raise OutputError(
            f"{root} is not complete, {there}: finish it by the command that began it, or export what "
            "there is with --partial."
        )
    if not shards:
        raise OutputError(f"Nothing of {root} can be exported yet, {there}: wait for the first.")
    first = dataset.table(shards[0])
    scores = ScoreColumns(dataset, first.column_names)
    schema = exported(scores.beside(first, shards[0])).schema
    return Source(dataset, run, shards, planned, scores, schema)


def exported(rows: pa.Table) -> pa.Table:
    """The columns that tell of the pictures."""
    return rows.drop_columns([name for name in rows.column_names if name in _LEFT_OUT])
