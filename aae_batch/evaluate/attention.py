"""The attention metric: computed from the dataset's tables, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from aae_batch.columns import column
from aae_batch.dataset.methods import attention_compares
from aae_batch.evaluate.metric import Attention, MetadataRow, Metric

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class AttentionMetric(Metric):
    """Attention of the worst subject: one minus the loss of Chefer et al. 2023, equation 1.

    `min_max_attention` is the minimum over subjects of the maximum of the subject's map at the last step.
    A threshold is met if the same figure reaches it at the end of the threshold's step; thresholds at
    steps that a row does not have are not counted. `neglected` and `num_refinements` come from the
    metadata. Rows without subjects have nulls. Rows of composable-diffusion have nulls except for
    `num_refinements`, as a subject's maps there are those of its own conjunct, where no other subject
    competes (see `layout.ATTENTION_SCHEMA`).

    Attributes:
        thresholds: step -> threshold, from the run's settings; used for rows of every method.
    """

    thresholds: Mapping[int, float]

    sees_images = False
    attention_columns = ("max_attention",)
    columns = (
        column(
            "min_max_attention",
            pa.float32(),
            "The worst subject's largest attention at the last step.",
        ),
        column("neglected", pa.bool_(), "As in the metadata."),
        column(
            "thresholds_met",
            pa.int32(),
            "Thresholds that the worst subject's attention reached at their steps.",
        ),
        column("num_thresholds", pa.int32(), "Thresholds at steps that the row has."),
        column("num_refinements", pa.int32(), "As in the metadata."),
    )
    best_by = "min_max_attention"

    def settings(self) -> dict[str, Any]:
        return {"thresholds": {str(step): value for step, value in self.thresholds.items()}}

    def score(
        self, rows: Sequence[MetadataRow], images: Sequence[Image], attention: Attention
    ) -> list[dict[str, Any]]:
        return [self._summary(row, attention.get(row["id"], ())) for row in rows]

    def _summary(self, row: MetadataRow, subjects: Sequence[MetadataRow]) -> dict[str, Any]:
        own = subjects if attention_compares(row["method"]) else ()
        worst = [min(step) for step in zip(*(s["max_attention"] for s in own), strict=True)]
        met = [worst[at] >= least for at, least in self.thresholds.items() if at < len(worst)]
        return {
            "min_max_attention": worst[-1] if worst else None,
            "neglected": row["neglected"] if worst else None,
            "thresholds_met": sum(met) if worst else None,
            "num_thresholds": len(met) if worst else None,
            "num_refinements": row["num_refinements"] if subjects else None,
        }
