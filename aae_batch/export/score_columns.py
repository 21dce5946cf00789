"""Add scores as columns to exported rows."""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa

from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.scores import Scores


class ScoreColumns:
    """One column per column of each metric, with the same name, or `<metric>_<column>` if that is taken.

    Args:
        taken: column names that the rows already have.

    Attributes:
        of_metrics: for each metric, its columns by their exported name.
    """

    def __init__(self, dataset: Dataset, taken: Collection[str]) -> None:
        self._scores = Scores(dataset)
        self.of_metrics: dict[str, dict[str, pa.Field]] = {}
        for metric in self._scores.shards:
            names = {*taken, *self.names}
            columns = {
                f"{metric}_{column.name}" if column.name in names else column.name: column
                for column in self._scores.fields(metric)
            }
            if columns:
                self.of_metrics[metric] = columns

    @property
    def names(self) -> list[str]:
        return [name for columns in self.of_metrics.values() for name in columns]

    def beside(self, rows: pa.Table, shard: int) -> pa.Table:
        """Return a shard's rows with their scores, null where an image has no current score.

        Args:
            rows: must have the columns `id` and `sha256`.
        """
        for metric, columns in self.of_metrics.items():
            scores = self._scores.of(metric, shard, rows).columns
            for name, column in columns.items():
                values = (
                    pa.nulls(rows.num_rows, column.type) if scores is None else scores[column.name]
                )
                rows = rows.append_column(pa.field(name, column.type), values)
        return rows
