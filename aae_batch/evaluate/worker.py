"""The scoring worker: runs one metric on pieces of shards."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from aae_batch.dataset.reader import Dataset
from aae_batch.evaluate.metric import Metric, score_rows, write_scores
from aae_batch.evaluate.settings import ScoreSettings, weights_of
from aae_batch.job.progress import Tally
from aae_batch.job.records import Loaded
from aae_batch.job.worker import Task, Worker, WorkerContext


@dataclass(frozen=True)
class ScoreContext(WorkerContext):
    """What each worker of a scoring job receives. Scores are stored under `settings.metric`."""

    settings: ScoreSettings
    metric: Metric


@dataclass(frozen=True)
class ScoreTask(Task):
    """A piece, and the positions of its rows in the shard."""

    places: range


class ScoreWorker(Worker[dict[str, Any]]):
    """Scores pieces of shards, and reads the images of the next piece while the metric runs."""

    context: ScoreContext
    settings: ScoreSettings

    def __init__(self, context: ScoreContext) -> None:
        super().__init__(context)
        self._turn = threading.Lock()

    def load(self) -> Loaded:
        metric, settings = self.context.metric, self.settings
        begun_with = self.context.run["settings"]
        for model, digest in weights_of(metric, settings.s3_endpoint).items():
            self.refuse_other_weights(model, digest, begun_with[f"weights of {model}"])
        if metric.models:
            self.set_torch_threads()
        return metric.load(settings.device, begun_with.get("dtype", settings.dtype))

    def work(self, task: ScoreTask) -> list[dict[str, Any]]:
        metric, piece = self.context.metric, task.piece
        rows = score_rows(
            Dataset(self.storage),
            piece.shard,
            task.places,
            metric,
            self.settings.batch_size,
            self._turn,
            lambda rows: self.count(piece, Tally(rows)),
        )
        if task.commit:
            name = self.settings.metric
            write_scores(self.storage, name, metric, piece.shard, rows, task.fingerprint)
        return rows
