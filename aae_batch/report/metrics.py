"""The scores of a shard, as the page shows them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa

from aae_batch.dataset.scores import Scores

FOUND, BOUND = "found", "bound"
"""Columns with one boolean per subject: whether a detector found it, and whether in the prompt's
colour. The second may be missing."""

_OF_THE_METADATA = ("neglected", "num_refinements")
"""Columns of the attention metric that the page already shows from the metadata."""

_LABELS = {
    "clip_full": "CLIP, prompt",
    "clip_min_subject": "CLIP, weakest subject",
    "clip_caption": "CLIP, caption",
    "caption": "caption of the image",
    "subjects_named": "subjects named",
    "subjects_found": "subjects found",
    "all_found": "all subjects found",
    "all_bound": "all in their colours",
    "other_objects": "other objects",
    "min_max_attention": "attention of the weakest subject",
    "thresholds_met": "thresholds met",
    "num_thresholds": "thresholds",
}


@dataclass(frozen=True)
class Score:
    """A column of a metric. Its values are numbers, whole ones if `is_count`, unless `is_text` or
    `is_truth` (booleans)."""

    metric: str
    column: str
    is_text: bool = False
    is_truth: bool = False
    is_count: bool = False

    @property
    def name(self) -> str:
        """A unique name."""
        return f"{self.metric}/{self.column}"

    @property
    def label(self) -> str:
        return _LABELS.get(self.column, f"{self.metric}: {self.column.replace('_', ' ')}")


@dataclass
class Judged:
    """The scores of one shard, in the order of its metadata rows; null for images without scores.

    Attributes:
        columns: the values of each score.
        found: per row, whether each subject was found.
        bound: per row, whether each subject has the colour that the prompt gives it; null if it gives
            none, or if the detector does not judge colours.
        stale: number of scores left out; see `dataset.scores.ShardScores`.
    """

    found: pa.ChunkedArray
    bound: pa.ChunkedArray
    columns: dict[Score, pa.ChunkedArray] = field(default_factory=dict)
    stale: int = 0


def judged(scores: Scores, shard: int, metadata: pa.Table) -> Judged:
    """Return the scores of all metrics for a shard.

    Args:
        metadata: the shard's metadata, with the columns `id` and `sha256`.
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
    is_count = pa.types.is_integer(column.type)
    is_text = not (is_truth or is_count or pa.types.is_floating(column.type))
    return Score(metric, column.name, is_text, is_truth, is_count)
