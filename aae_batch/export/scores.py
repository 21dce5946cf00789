"""The scores of a dataset's metrics, as columns beside its rows."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from aae_batch.dataset import layout
from aae_batch.dataset.current_scores import CurrentScores
from aae_batch.dataset.reader import Dataset

_KEYS = [column.name for column in layout.SCORED_COLUMNS]


class Scores:
    """What metrics say of the pictures of a dataset: a column for each of theirs, named as there, or
    `<metric>_<column>` where the name is taken.

    Args:
        taken: names of columns that the rows have.
    """

    def __init__(self, dataset: Dataset, taken: list[str]) -> None:
        self._current = CurrentScores(dataset)
        self.columns: dict[str, list[tuple[str, pa.Field]]] = {}
        """Of each metric: the name here, and the column there."""
        names = set(taken)
        for metric, shards in self._current.shards.items():
            tables = (self._current.of(metric, shard) for shard in sorted(shards))
            first = next((table for table in tables if table is not None), None)
            if first is not None:
                columns = [column for column in first.schema if column.name not in _KEYS]
                self.columns[metric] = [
                    (f"{metric}_{column.name}" if column.name in names else column.name, column)
                    for column in columns
                ]
                names.update(name for name, _ in self.columns[metric])

    @property
    def of_metrics(self) -> dict[str, list[str]]:
        """The columns' names here, by metric."""
        return {metric: [name for name, _ in columns] for metric, columns in self.columns.items()}

    @property
    def names(self) -> list[str]:
        return [name for names in self.of_metrics.values() for name in names]

    def beside(self, rows: pa.Table, shard: int) -> pa.Table:
        """The rows of a shard, with its scores; null where a picture has none, or was made again
        since.

        Args:
            rows: has the columns `id` and `sha256`.
        """
        for metric, columns in self.columns.items():
            places = pa.nulls(rows.num_rows, pa.int64())
            scored = self._current.of(metric, shard)
            if scored is not None:
                places = _places(rows, scored)
            for name, column in columns:
                values = (
                    pa.nulls(rows.num_rows, column.type)
                    if scored is None
                    else scored[column.name].combine_chunks().take(places)
                )
                rows = rows.append_column(pa.field(name, column.type), values)
        return rows


def _places(rows: pa.Table, scored: pa.Table) -> pa.Array:
    """Of each row: where its scores are, null where they are of no or of another picture."""
    places = pc.index_in(rows["id"].combine_chunks(), value_set=scored["id"].combine_chunks())
    there = scored["sha256"].combine_chunks().take(places)
    same = pc.fill_null(pc.equal(rows["sha256"].combine_chunks(), there), False)
    return pc.if_else(same, places, None)
