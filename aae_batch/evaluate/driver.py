"""The scoring job: scores the images of a dataset with one metric.

The unit of work is a shard: a worker reads its images and writes one table of scores, which is the commit.
A shard that keeps crashing workers is bisected down to the row at fault, whose scores are null; other rows
are unaffected. A metric that needs no images runs in this process.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.rewriting import writing
from aae_batch.errors import JobError, OutputError
from aae_batch.evaluate.metric import Metric, score_rows, unscored, write_scores
from aae_batch.evaluate.records import (
    READERS,
    ScorePlan,
    begin_scores,
    make_score_plan,
    metric_run,
    whole_shard,
)
from aae_batch.evaluate.settings import ScoreSettings
from aae_batch.evaluate.worker import ScoreContext, ScoreTask, ScoreWorker
from aae_batch.job.cluster import stop_on_signals
from aae_batch.job.driver import Job, OnProgress, run_on_workers, stopped
from aae_batch.job.plan import Piece
from aae_batch.job.progress import Progress, Tally, clock, reasons
from aae_batch.job.records import Loaded
from aae_batch.store.lock import Lock
from aae_batch.store.open import open_storage

logger = logging.getLogger("aae_batch.job")


class ScoreProgress(Progress):
    """Progress of a scoring job."""

    def __str__(self) -> str:
        return (
            f"{self.done}/{self.total} rows, {self.images_per_second:.2f} images/s, "
            f"{self.now.failed} could not be scored, ETA {clock(self.eta)}"
        )


@dataclass(frozen=True)
class Scored:
    """The result of a scoring run.

    Attributes:
        rows: rows processed by this run, including rows whose generation failed.
        kept: shards that were already scored.
        unscored: images that could not be scored, in this run or earlier; their scores are null.
        missing: shards that are not generated yet.
        reasons: why images could not be scored in this run.
    """

    metric: str
    rows: int
    kept: int
    unscored: int
    missing: int
    reasons: tuple[str, ...] = ()


def plan_scores(settings: ScoreSettings) -> ScorePlan:
    """Return what `score` would do.

    Raises:
        AaeBatchError: the job would not start.
    """
    dataset = Dataset(open_storage(settings.output, settings.s3_endpoint))
    return make_score_plan(settings, _metric(settings, dataset), dataset)


def score(
    settings: ScoreSettings,
    on_progress: OnProgress = lambda progress: None,
    worker_class: type[ScoreWorker] = ScoreWorker,
) -> Scored:
    """Score the images that are generated and not scored yet.

    Args:
        on_progress: called about once a second.
        worker_class: class of the workers.

    Raises:
        AaeBatchError: the job cannot start or continue.
        KeyboardInterrupt: a signal stopped the job. The same call resumes it.
    """
    storage = open_storage(settings.output, settings.s3_endpoint)
    dataset = Dataset(storage)
    metric = _metric(settings, dataset)
    metric_run(settings, metric, dataset)  # raises before anything is written
    with writing(storage) as lock:
        plan = make_score_plan(settings, metric, dataset)
        job = ScoreJob(settings, plan, metric, dataset, worker_class)
        done = Tally()
        try:
            if metric.sees_images and (plan.todo or plan.again):
                done = run_on_workers(job, lock, on_progress).now
            elif plan.todo:
                done = _score_here(job, lock, on_progress)
        except OutputError as error:  # the job had started and can be resumed once this is fixed
            raise JobError(str(error)) from error
    unscored = plan.given_up + done.failed
    why = tuple(reasons(done.failures, done.examples))
    return Scored(settings.metric, done.done, len(plan.kept), unscored, plan.missing, why)


def _metric(settings: ScoreSettings, dataset: Dataset) -> Metric:
    run = dataset.run
    if run is None:
        raise OutputError(
            f"There is no dataset in {dataset.storage.root}: check the path, or generate it first."
        )
    return settings.metric_of(run)


def _score_here(job: ScoreJob, lock: Lock, on_progress: OnProgress) -> Tally:
    """Score from the tables alone, in threads of this process.

    Raises:
        KeyboardInterrupt: a signal stopped the job; shards in progress were finished.
    """
    plan, metric = job.plan, job.metric

    def score_shard(piece: Piece) -> Piece:
        rows = score_rows(job.dataset, piece.shard, range(len(piece)), metric, len(piece))
        job.write(piece.shard, rows)
        return piece

    if not plan.begun:
        begin_scores(job.dataset, plan.run)
    started, done = time.monotonic(), Tally()
    before = plan.rows - sum(len(piece) for piece in plan.todo)
    with stop_on_signals(job.settings.grace) as stop, ThreadPoolExecutor(READERS) as pool:
        try:
            for piece in pool.map(score_shard, plan.todo):
                lock.check()
                done += Tally(len(piece))
                if stop.requested and piece != plan.todo[-1]:
                    raise stopped(plan.rows, before + done.done)
                on_progress(ScoreProgress(plan.rows, before, done, time.monotonic() - started))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return done


class ScoreJob(Job[dict[str, Any]]):
    """The job that scores the generated shards.

    Attributes:
        unscored: ids of images that this run could not score.
    """

    settings: ScoreSettings
    plan: ScorePlan
    progress_class = ScoreProgress

    def __init__(
        self,
        settings: ScoreSettings,
        plan: ScorePlan,
        metric: Metric,
        dataset: Dataset,
        worker_class: type[ScoreWorker],
    ) -> None:
        if not metric.models:  # it does not use a GPU
            settings = settings.model_copy(update={"gpus_per_actor": 0})
        super().__init__(settings, plan, dataset, worker_class)
        self.model = " and ".join(metric.models) or settings.metric
        self.metric = metric
        self.unscored: set[str] = set()

    def context(self, lease: str, threads: int | None) -> ScoreContext:
        return ScoreContext(**vars(super().context(lease, threads)), metric=self.metric)

    def write_run(self, loaded: Loaded) -> None:
        self.run["device"] = loaded.device
        begin_scores(self.dataset, self.run)

    def task(self, piece: Piece, commit: bool) -> ScoreTask:
        return ScoreTask(piece, self.run["fingerprint"], commit, self._places(piece))

    def commit(self, shard: int, outcomes: list[dict[str, Any]]) -> None:
        again = shard in self.plan.again
        rows = whole_shard(outcomes, self.dataset, self.settings.metric, shard, again)
        self.write(shard, rows)

    def write(self, shard: int, rows: list[dict[str, Any]]) -> None:
        name, mark = self.settings.metric, self.run["fingerprint"]
        without = [row["id"] for row in rows if row["id"] in self.unscored]
        write_scores(self.storage, name, self.metric, shard, rows, mark, without)

    def give_up(self, piece: Piece, words: str) -> tuple[list[dict[str, Any]], str]:
        logger.error("shard=%d row=%d not scored: %s", piece.shard, piece.start, words)
        rows = unscored(self.dataset, piece.shard, self._places(piece).start, self.metric)
        self.unscored.update(row["id"] for row in rows)
        names = ", ".join(row["id"] for row in rows)
        return rows, f"row {names}: its process died twice while it was scored alone: {words}"

    def _places(self, piece: Piece) -> range:
        start = self.plan.shards[piece.shard].start
        return range(piece.start - start, piece.stop - start)
