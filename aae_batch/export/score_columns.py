"""Scores as columns of exported rows."""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa

from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.scores import Scores


class ScoreColumns:
    """A column for each that a metric has, named as there, or `<metric>_<column>` where the name is
    taken.

    Args:
        taken: names of columns that the rows have.

    Attributes:
        of_metrics: by metric, the columns there by their names here.
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
        """A shard's rows with their scores, null where a picture has none that are current.

        Args:
            rows: has the columns `id` and `sha256`.
        """
        for metric, columns in self.of_metrics.items():
            scores = self._scores.of(metric, shard, rows).columns
            for name, column in columns.items():
                values = (
                    pa.nulls(rows.num_rows, column.type) if scores is None else scores[column.name]
                )
                rows = rows.append_column(pa.field(name, column.type), values)
        return rows
