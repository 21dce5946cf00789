"""What metrics say of a shard's pictures, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from aae_batch.dataset import layout
from aae_batch.dataset.current_scores import CurrentScores
from aae_batch.dataset.reader import Dataset

FOUND, BOUND = "found", "bound"
"""The columns that say of each subject whether a detector found it, and whether in its colour; the
second may be missing."""

_OF_THE_METADATA = ("neglected", "num_refinements")
"""Columns of the attention metric that repeat the metadata's, which the page shows anyway."""

_LABELS = {
    "clip_full": "CLIP, prompt",
    "clip_min_subject": "CLIP, weakest subject",
    "clip_caption": "CLIP, caption",
    "caption": "caption of the picture",
    "subjects_named": "subjects named",
    "subjects_found": "subjects found",
    "all_found": "all subjects found",
    "all_bound": "all in their colours",
    "min_max_attention": "attention of the weakest subject",
    "thresholds_met": "thresholds met",
    "num_thresholds": "thresholds",
}


@dataclass(frozen=True)
class Score:
    """A metric's column.

    Attributes:
        label: what a person calls it.
        is_text: whether its values are words.
        is_truth: whether they are truths; they are numbers otherwise.
    """

    metric: str
    column: str
    is_text: bool = False
    is_truth: bool = False

    @property
    def name(self) -> str:
        """What tells it from all others."""
        return f"{self.metric}/{self.column}"

    @property
    def label(self) -> str:
        return _LABELS.get(self.column, f"{self.metric}: {self.column.replace('_', ' ')}")


Columns = dict[Score, list]
"""Of each score: a value per metadata row; None where there is none."""


@dataclass(frozen=True)
class ShardScores:
    """The scores of one shard, in the order of its metadata rows.

    Attributes:
        columns: the values.
        found: per row, whether each subject was found; None where no detector has looked.
        bound: per row, whether each subject has the colour that the prompt gives it; None where it
            gives none, or no detector tells colours.
        stale: scores of pictures that are there no more.
    """

    columns: Columns
    found: list[list[bool] | None]
    bound: list[list[bool | None] | None]
    stale: int = 0


class Scores:
    """The scores of a dataset.

    Args:
        dataset: its metrics are listed once, here.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._current = CurrentScores(dataset)

    def of(self, shard: int, metadata: pa.Table) -> ShardScores:
        """The scores of a shard. One whose picture has another `sha256` now is left out.

        Args:
            metadata: its columns `id` and `sha256` are used.
        """
        keys = list(zip(metadata["id"].to_pylist(), metadata["sha256"].to_pylist(), strict=True))
        columns: Columns = {}
        by_subject: dict[str, list] = {name: [None] * len(keys) for name in (FOUND, BOUND)}
        stale = 0
        for metric in self._current.shards:
            table = self._current.of(metric, shard)
            if table is None:
                continue
            places = {
                key: place
                for place, key in enumerate(
                    zip(table["id"].to_pylist(), table["sha256"].to_pylist(), strict=True)
                )
            }
            stale += len(places.keys() - set(keys))
            order = [places.get(key) for key in keys]
            for score in _scores(metric, table.schema):
                columns[score] = _in_order(table[score.column], order)
            for name in by_subject.keys() & set(table.column_names):
                by_subject[name] = _in_order(table[name], order)
        return ShardScores(columns, by_subject[FOUND], by_subject[BOUND], stale)


def _scores(metric: str, schema: pa.Schema) -> list[Score]:
    left_out = {column.name for column in layout.SCORED_COLUMNS}
    if metric == "attention":
        left_out.update(_OF_THE_METADATA)
    return [
        _score(metric, field)
        for field in schema
        if field.name not in left_out and not pa.types.is_nested(field.type)
    ]


def _score(metric: str, field: pa.Field) -> Score:
    is_truth = pa.types.is_boolean(field.type)
    is_number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    return Score(metric, field.name, is_text=not (is_truth or is_number), is_truth=is_truth)


def _in_order(column: pa.ChunkedArray, order: list[int | None]) -> list:
    return pc.take(column, pa.array(order, pa.int64())).to_pylist()
