"""The actor that scores: one metric, fed with pieces of shards."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aae_batch.dataset.reader import Dataset
from aae_batch.errors import ModelError
from aae_batch.evaluate.metric import Loaded, Metric, score_rows, write_scores
from aae_batch.evaluate.settings import weights_of
from aae_batch.job.actor import Actor, Report
from aae_batch.job.plan import Piece
from aae_batch.job.progress import Tally
from aae_batch.store.open import open_storage

logger = logging.getLogger("aae_batch.scorer")


@dataclass(frozen=True)
class ScorerSettings:
    """What every actor of a scoring job is told.

    Attributes:
        root: the output root.
        lease: the token of the driver's lock on it: without that nothing is written.
        name: the metric's, under which its tables lie.
        weights: the digest of each model's, as the run was begun with; None for one on the hub.
        threads: torch's threads; None leaves them as they are.
    """

    root: str
    lease: str
    name: str
    metric: Metric
    weights: Mapping[str, str | None]
    device: str
    dtype: str
    batch_size: int
    threads: int | None = None
    s3_endpoint: str | None = None


@dataclass(frozen=True)
class ScoreTask:
    """A piece of a shard whose first row is row `start` of the manifest."""

    piece: Piece
    start: int
    fingerprint: str
    """Of the metric's run."""
    commit: bool
    """Whether the piece is a whole shard; otherwise its scores are returned instead."""

    @property
    def places(self) -> range:
        """Of the rows in the shard."""
        return range(self.piece.start - self.start, self.piece.stop - self.start)


class Scorer(Actor):
    """Scores pieces of shards. While the metric is at work on one, pictures of the next are read."""

    def __init__(self, settings: ScorerSettings) -> None:
        super().__init__()
        self.settings = settings
        self.storage = open_storage(settings.root, settings.s3_endpoint)
        self.storage.heed(settings.lease)
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._done: Counter[Piece] = Counter()

    def load(self) -> Loaded:
        """Raises: ModelError: a model is another one here than the run was begun with."""
        s = self.settings
        for model, digest in weights_of(s.metric, s.s3_endpoint).items():
            if digest != s.weights[model]:
                raise ModelError(
                    f"The model {model} is another one on this machine than the run was begun with; "
                    "give every machine the same, or name one in an object store."
                )
        if s.threads is not None and s.metric.models:
            import torch

            torch.set_num_threads(s.threads)
        return s.metric.load(s.device, s.dtype)

    def perform(self, task: ScoreTask) -> Report[dict[str, Any]]:
        s, piece = self.settings, task.piece
        self._said(piece, 0)
        try:
            rows = score_rows(
                Dataset(self.storage),
                piece.shard,
                task.places,
                s.metric,
                s.batch_size,
                self._turn,
                lambda rows: self._said(piece, rows),
            )
        finally:
            with self._lock:
                del self._done[piece]
        if task.commit:
            write_scores(self.storage, s.name, s.metric, piece.shard, rows, task.fingerprint)
        logger.info("shard=%d rows=%d scored", piece.shard, len(piece))
        return Report(Tally(len(piece)), [] if task.commit else rows)

    def progress(self) -> dict[Piece, Tally]:
        with self._lock:
            return {piece: Tally(rows) for piece, rows in self._done.items()}

    def _said(self, piece: Piece, rows: int) -> None:
        with self._lock:
            self._done[piece] += rows
