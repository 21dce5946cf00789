"""Actors that score without a model."""

from __future__ import annotations

import time
from typing import Any

from aae_batch.evaluate.attention import AttentionMetric
from aae_batch.evaluate.worker import ScoreWorker
from tests.chaos import mines
from tests.chaos.fake import PACE


class MinedScoreWorker(ScoreWorker):
    def __init__(self, context: Any) -> None:
        mines.watch("actor", context.root)
        super().__init__(context)


class SeeingMetric(AttentionMetric):
    """The metric `attention`, computed by actors as those are that look at pictures."""

    sees_images = True

    def score(self, rows: Any, images: Any, attention: Any) -> list[dict[str, Any]]:
        assert len(images) == len(rows)
        time.sleep(PACE * len(rows))
        return super().score(rows, images, attention)
