"""What metrics say of a shard's pictures, as the page shows it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa

from aae_batch.dataset.scores import Scores

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
    """A metric's column; its values are numbers unless they are words or booleans.

    Attributes:
        label: what a person calls it.
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


@dataclass
class Judged:
    """The scores of one shard, in the order of its metadata rows; null where a picture has none.

    Attributes:
        columns: the values of each score.
        found: per row, whether each subject was found.
        bound: per row, whether each subject has the colour that the prompt gives it; null where it
            gives none, or no detector tells colours.
        stale: scores that are left out; see `dataset.scores.ShardScores`.
    """

    found: pa.ChunkedArray
    bound: pa.ChunkedArray
    columns: dict[Score, pa.ChunkedArray] = field(default_factory=dict)
    stale: int = 0


def judged(scores: Scores, shard: int, metadata: pa.Table) -> Judged:
    """What all metrics say of a shard.

    Args:
        metadata: its columns `id` and `sha256` are used.
    """
    nothing = pa.chunked_array([pa.nulls(metadata.num_rows)])
    result = Judged(nothing, nothing)
    for metric in scores.shards:
        of_metric = scores.of(metric, shard, metadata)
        result.stale += of_metric.stale
        if (table := of_metric.columns) is None:
            continue
        result.found = table[FOUND] if FOUND in table.column_names else result.found
        result.bound = table[BOUND] if BOUND in table.column_names else result.bound
        for column in table.schema:
            repeated = metric == "attention" and column.name in _OF_THE_METADATA
            if not (repeated or pa.types.is_nested(column.type)):
                result.columns[_score(metric, column)] = table[column.name]
    return result


def _score(metric: str, column: pa.Field) -> Score:
    is_truth = pa.types.is_boolean(column.type)
    is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    return Score(metric, column.name, is_text=not (is_truth or is_number), is_truth=is_truth)
