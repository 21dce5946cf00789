"""Actors that score without a model."""

from __future__ import annotations

import time
from typing import Any

from aae_batch.evaluate.attention import AttentionMetric
from aae_batch.evaluate.worker import Scorer
from tests.chaos import mines
from tests.chaos.fake import PACE


class MinedScorer(Scorer):
    def __init__(self, settings: Any) -> None:
        mines.watch("actor", settings.root)
        super().__init__(settings)


class SeeingMetric(AttentionMetric):
    """The metric `attention`, computed by actors as those are that look at pictures."""

    sees_images = True

    def score(self, rows: Any, images: Any, attention: Any) -> list[dict[str, Any]]:
        assert len(images) == len(rows)
        time.sleep(PACE * len(rows))
        return super().score(rows, images, attention)
