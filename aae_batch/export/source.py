"""The output to export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from aae_batch.dataset.reader import Dataset
from aae_batch.errors import OutputError
from aae_batch.export.score_columns import ScoreColumns
from aae_batch.manifest.plain import plain_schema, plain_table

_LEFT_OUT = frozenset(
    ["status", "error_type", "error", "file_name", "seconds", "shard", "fingerprint"]
)
"""Columns that describe the job or its file layout, not an image."""


@dataclass(frozen=True)
class Source:
    """A snapshot of an output when it was opened; a job may commit more shards meanwhile.

    Attributes:
        run: the contents of `run.json`.
        shards: the committed shards.
        planned: number of shards of the complete output.
        schema: of the exported rows.
    """

    dataset: Dataset
    run: dict[str, Any]
    shards: list[int]
    planned: int
    scores: ScoreColumns
    schema: pa.Schema


def open_source(dataset: Dataset, partial: bool) -> Source:
    """Open an output for export.

    Raises:
        OutputError: the output has no run or no shards, or is incomplete and `partial` is not set.
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
            f"{root} is not complete, {there}: finish it with the command that started it, or export "
            "what is there with --partial."
        )
    if not shards:
        raise OutputError(f"Nothing of {root} can be exported yet, {there}: wait for the first.")
    first = dataset.table(shards[0])
    scores = ScoreColumns(dataset, first.column_names)
    schema = exported(scores.beside(first, shards[0])).schema
    return Source(dataset, run, shards, planned, scores, schema)


def exported(rows: pa.Table) -> pa.Table:
    """Return only the columns that describe the images, in types that every reader knows."""
    rows = rows.drop_columns([name for name in rows.column_names if name in _LEFT_OUT])
    return plain_table(rows, plain_schema(rows.schema))
