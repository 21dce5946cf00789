"""Were the subjects attended to? From the tables alone, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from aae_batch.evaluate.metric import Attention, Loaded, Row, column
from aae_batch.request import Method

if TYPE_CHECKING:
    from PIL.Image import Image


OWN_CONJUNCTS: Method = "composable-diffusion"
"""The method whose attention is not that of the whole prompt."""


@dataclass
class AttentionMetric:
    """The attention of the worst subject (Chefer et al. 2023, equation 1, from the other side).

    `min_max_attention` is the least, over subjects, of the largest value of the subject's map at the
    last step. A threshold is met where that figure reaches it at the threshold's step, when that step
    is over; thresholds at steps that a row does not have do not count. `neglected` and
    `num_refinements` are those of the metadata. Rows without subjects have nulls, and rows of
    composable-diffusion have nulls but for `num_refinements`: a subject's maps are there those of its own
    conjunct, in which no other competes with it (see `layout.ATTENTION_SCHEMA`).

    Attributes:
        thresholds: step -> threshold, as the run was told. Rows of other methods than
            Attend-and-Excite are held against the same.
    """

    thresholds: Mapping[int, float]

    sees_images = False
    attention_columns = ("max_attention",)
    models = ()
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

    def settings(self) -> dict[str, Any]:
        return {"thresholds": {str(step): value for step, value in self.thresholds.items()}}

    def load(self, device: str, dtype: str) -> Loaded:
        return Loaded()

    def score(
        self, rows: Sequence[Row], images: Sequence[Image], attention: Attention
    ) -> list[dict[str, Any]]:
        return [self._read(row, attention.get(row["id"], ())) for row in rows]

    def _read(self, row: Row, subjects: Sequence[Row]) -> dict[str, Any]:
        of_prompt = subjects if row["method"] != OWN_CONJUNCTS else ()
        worst = [min(step) for step in zip(*(s["max_attention"] for s in of_prompt), strict=True)]
        held = [(worst[at], least) for at, least in self.thresholds.items() if at < len(worst)]
        return {
            "min_max_attention": worst[-1] if worst else None,
            "neglected": row["neglected"] if worst else None,
            "thresholds_met": sum(value >= least for value, least in held) if worst else None,
            "num_thresholds": len(held) if worst else None,
            "num_refinements": row["num_refinements"] if subjects else None,
        }
