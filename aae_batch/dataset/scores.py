"""Align the scores of a dataset's metrics with its rows."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from aae_batch.dataset import layout
from aae_batch.dataset.reader import Dataset

KEYS = [column.name for column in layout.SCORED_COLUMNS]


@dataclass(frozen=True)
class ShardScores:
    """One metric's scores of a shard's rows.

    Attributes:
        columns: the metric's own columns in the rows' order, null for images without scores; None if
            the shard has no current scores.
        stale: number of scores left out because the image was generated again since, or the metric's
            last run had other settings.
    """

    columns: pa.Table | None = None
    stale: int = 0


class Scores:
    """The scores of a dataset. Its metrics and their shards are listed once, on construction.

    Attributes:
        shards: metric -> the shards that it has scored.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.shards = {m: frozenset(dataset.scored_shards(m)) for m in dataset.metrics()}
        self._runs = {metric: dataset.metric_fingerprint(metric) for metric in self.shards}

    def fields(self, metric: str) -> list[pa.Field]:
        """Return the metric's own columns from its first current table; empty if it has none."""
        for shard in sorted(self.shards[metric]):
            table, marks = self._dataset.marked_scores_of(metric, shard)
            if self._is_current(metric, marks):
                return [column for column in table.schema if column.name not in KEYS]
        return []

    def of(
        self, metric: str, shard: int, rows: pa.Table, columns: list[str] | None = None
    ) -> ShardScores:
        """Return the scores of a shard's rows.

        Args:
            rows: must have the columns `id` and `sha256`.
            columns: the metric's own columns to read; those that it lacks are ignored. Default: all.

        Raises:
            OutputError: the metric's table is damaged.
        """
        if shard not in self.shards.get(metric, ()):
            return ShardScores()
        wanted = None if columns is None else [*KEYS, *columns]
        table, marks = self._dataset.marked_scores_of(metric, shard, wanted)
        ids, sha256 = (rows[name].combine_chunks() for name in KEYS)
        places = pc.index_in(ids, value_set=table["id"].combine_chunks())
        places = pc.if_else(sha256.is_valid(), places, None)
        same = pc.equal(sha256, table["sha256"].combine_chunks().take(places))
        if not self._is_current(metric, marks):
            return ShardScores(stale=len(places) - places.null_count)
        fresh = pc.if_else(pc.fill_null(same, False), places, None)
        return ShardScores(
            table.take(fresh).drop_columns(KEYS), fresh.null_count - places.null_count
        )

    def _is_current(self, metric: str, marks: dict[str, str]) -> bool:
        """Return whether the metric's last run wrote the table. False if the table names a run and the
        record of that run is gone."""
        return self._runs[metric] == marks.get(layout.SCORES_FINGERPRINT)
