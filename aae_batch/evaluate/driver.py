"""A scoring job: the pictures of a dataset, judged by one metric, by the rules of `supervisor.py`.

The unit is a shard: an actor reads its pictures and writes its scores, whose one table is the commit.
A shard that keeps killing actors is halved until the row is found, whose scores are null; the others'
are not lost by it. A metric that needs no pictures is computed in this process.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.rewriting import writing
from aae_batch.errors import JobError, OutputError
from aae_batch.evaluate.metric import Loaded, Metric, score_rows, unscored, write_scores
from aae_batch.evaluate.records import (
    READERS,
    ScorePlan,
    begin_scores,
    make_score_plan,
    metric_run,
    resolved,
    whole_shard,
)
from aae_batch.evaluate.settings import ScoreSettings, weights_of
from aae_batch.evaluate.worker import Scorer, ScorerSettings, ScoreTask
from aae_batch.job.cluster import ActorPlan, Stop, cluster, stop_on_signals
from aae_batch.job.crew import Crew, Event, RayCrew, Ready
from aae_batch.job.plan import Piece
from aae_batch.job.progress import Progress, Tally, clock
from aae_batch.job.supervisor import GAVE_UP, Supervisor
from aae_batch.store.lock import Lock
from aae_batch.store.open import open_storage

logger = logging.getLogger("aae_batch.job")

Reporter = Callable[[Progress], None]


class ScoreProgress(Progress):
    """How far scoring is, in the words that fit it."""

    def __str__(self) -> str:
        return (
            f"{self.done}/{self.total} rows, {self.images_per_second:.2f} images/s, "
            f"{self.now.failed} could not be scored, ETA {clock(self.eta)}"
        )


@dataclass(frozen=True)
class Scored:
    """What a run of a metric came to.

    Attributes:
        rows: that this run has gone through; pictures that failed earlier are among them.
        kept: shards that had been scored before.
        unscored: pictures whose scores are null, since they could not be scored, now or earlier.
        missing: shards that are not generated yet.
    """

    metric: str
    rows: int
    kept: int
    unscored: int
    missing: int


def plan_scores(settings: ScoreSettings) -> ScorePlan:
    """What `score` would do.

    Raises:
        AaeBatchError: it would not start.
    """
    dataset = Dataset(open_storage(settings.output, settings.s3_endpoint))
    return make_score_plan(settings, _metric(settings, dataset), dataset)


def score(
    settings: ScoreSettings,
    report: Reporter = lambda progress: None,
    actor_class: type[Scorer] = Scorer,
) -> Scored:
    """Score what is generated and not scored yet.

    Args:
        report: is told about once a second how far the job is.
        actor_class: what the actors are made of.

    Raises:
        AaeBatchError: the job cannot start or cannot go on; the message says why.
        KeyboardInterrupt: it was stopped by a signal. The same call goes on with it.
    """
    storage = open_storage(settings.output, settings.s3_endpoint)
    dataset = Dataset(storage)
    metric = _metric(settings, dataset)
    metric_run(settings, metric, dataset)  # refuse before anything is made
    with writing(storage) as lock:
        plan = make_score_plan(settings, metric, dataset)
        try:
            done = Tally()
            if (plan.todo or plan.again) and metric.sees_images:
                done = _score_on_actors(settings, plan, metric, dataset, lock, report, actor_class)
            elif plan.todo:
                done = _score_here(settings, plan, metric, dataset, lock, report)
        except OutputError as error:  # the job was under way: it can go on when that is mended
            raise JobError(str(error)) from error
    unscored = plan.given_up + done.failed
    return Scored(settings.metric, done.done, len(plan.kept), unscored, plan.missing)


def _metric(settings: ScoreSettings, dataset: Dataset) -> Metric:
    run = dataset.run
    if run is None:
        raise OutputError(
            f"There is no dataset in {dataset.storage.root}: check the path, or generate it first."
        )
    return settings.metric_for(run)


def _score_here(
    settings: ScoreSettings,
    plan: ScorePlan,
    metric: Metric,
    dataset: Dataset,
    lock: Lock,
    report: Reporter,
) -> Tally:
    """Score by the tables alone, several shards at a time.

    Raises:
        KeyboardInterrupt: it was told to stop, and the shards under way are finished.
    """
    fingerprint = plan.run["fingerprint"]

    def one(piece: Piece) -> Piece:
        rows = score_rows(dataset, piece.shard, range(len(piece)), metric, len(piece))
        write_scores(dataset.storage, settings.metric, metric, piece.shard, rows, fingerprint)
        return piece

    if not plan.begun:
        begin_scores(dataset, plan.run)
    started, done = time.monotonic(), Tally()
    before = plan.rows - sum(len(piece) for piece in plan.todo)
    with stop_on_signals(settings.grace) as stop, ThreadPoolExecutor(READERS) as pool:
        try:
            for piece in pool.map(one, plan.todo):
                lock.check()
                done += Tally(len(piece))
                if stop.requested and piece != plan.todo[-1]:
                    raise KeyboardInterrupt
                report(ScoreProgress(plan.rows, before, done, time.monotonic() - started))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return done


def _score_on_actors(
    settings: ScoreSettings,
    plan: ScorePlan,
    metric: Metric,
    dataset: Dataset,
    lock: Lock,
    report: Reporter,
    actor_class: type[Scorer],
) -> Tally:
    if not metric.models:  # it has no use for a GPU
        settings = settings.model_copy(update={"gpus_per_actor": 0})
    with cluster(settings) as actors, stop_on_signals(settings.grace) as stop:
        scorer = ScorerSettings(
            root=dataset.storage.root,
            lease=lock.token,
            name=settings.metric,
            metric=metric,
            weights=weights_of(metric, settings.s3_endpoint),
            device=settings.device,
            dtype=plan.run["settings"].get("dtype", settings.dtype),
            batch_size=settings.batch_size,
            threads=actors.threads,
            s3_endpoint=settings.actors_s3_endpoint,
        )
        crew = RayCrew(actor_class, scorer, actors)
        foreman = ScoreForeman(settings, plan, metric, dataset, crew, actors, report, stop, lock)
        foreman.run()
        return foreman.finished


class ScoreForeman(Supervisor[dict[str, Any]]):
    """Keeps a crew at work until every shard that is generated is scored."""

    def __init__(
        self,
        settings: ScoreSettings,
        plan: ScorePlan,
        metric: Metric,
        dataset: Dataset,
        crew: Crew,
        actors: ActorPlan,
        report: Reporter,
        stop: Stop,
        lock: Lock,
    ) -> None:
        model = " and ".join(metric.models) or settings.metric
        super().__init__(
            settings, plan.rows, model, plan.ledger(), crew, actors, report, stop, lock
        )
        self.plan = plan
        self.metric = metric
        self.dataset = dataset
        self.run_record = plan.run
        self.begun = plan.begun
        self.unscored: set[str] = set()

    def _hear(self, event: Event) -> None:
        if isinstance(event, Ready):
            self._begin(event.loaded)
        super()._hear(event)

    def _begin(self, loaded: Loaded) -> None:
        """With the first actor that has its models, the run begins: one whose models cannot be loaded
        leaves the scores of an earlier one in force."""
        if not self.begun:
            self.run_record = resolved(self.plan.run, loaded)
            begin_scores(self.dataset, self.run_record)
            self.begun = True
        elif self.run_record["settings"].get("dtype") != loaded.dtype:
            raise JobError(
                f"An actor has loaded its models in {loaded.dtype}, while there are scores in "
                f"{self.run_record['settings'].get('dtype')}: give all machines the same with --dtype."
            )

    def progress(self) -> Progress:
        return ScoreProgress(**vars(super().progress()))

    def _task(self, piece: Piece) -> ScoreTask:
        start = self.plan.shards[piece.shard].start
        mark = self.run_record["fingerprint"]
        return ScoreTask(piece, start, mark, commit=self.ledger.is_whole(piece))

    def _return(self, piece: Piece, outcomes: list[dict[str, Any]]) -> None:
        made = self.ledger.returned(piece, outcomes)
        if made is None:
            return
        name, mark = self.run_record["metric"], self.run_record["fingerprint"]
        rows = whole_shard(made, self.dataset, name, piece.shard, piece.shard in self.plan.again)
        without = [row["id"] for row in rows if row["id"] in self.unscored]
        write_scores(self.dataset.storage, name, self.metric, piece.shard, rows, mark, without)

    def _give_up(self, piece: Piece, words: str) -> None:
        logger.error("shard=%d row=%d not scored: %s", piece.shard, piece.start, words)
        place = piece.start - self.plan.shards[piece.shard].start
        rows = unscored(self.dataset, piece.shard, place, self.metric)
        self.unscored.update(row["id"] for row in rows)
        self.finished += Tally(done=1, failures=Counter([GAVE_UP] * len(rows)))
        self._return(piece, rows)
