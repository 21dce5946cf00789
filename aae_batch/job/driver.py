"""The driver's loop: assign pieces of shards to workers, collect results, replace dead workers.

A client's `Job` defines what the pieces are for.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from aae_batch.dataset.layout import PROGRESS_SECONDS
from aae_batch.dataset.reader import Dataset
from aae_batch.errors import JobError
from aae_batch.job.cluster import Stop, cluster, stop_on_signals
from aae_batch.job.plan import JobPlan, Piece
from aae_batch.job.pool import Died, Done, Event, Pool, Ready
from aae_batch.job.progress import Progress, Tally
from aae_batch.job.records import Loaded, check_loaded, resolved
from aae_batch.job.settings import ActorSettings
from aae_batch.job.worker import PIECES, PIECES_AT_ONCE, Task, Worker, WorkerContext
from aae_batch.store.lock import Lock

T = TypeVar("T")
OnProgress = Callable[[Progress], None]

POLL_SECONDS = 1.0

GAVE_UP = "ActorDied"
"""`error_type` of a row that has crashed its worker twice while it was generated alone."""

logger = logging.getLogger("aae_batch.job")


class Job(ABC, Generic[T]):
    """A client of the driver. Subclasses implement the abstract methods.

    Attributes:
        model: the model's name, for messages.
        run: the run's record; the first worker resolves what the settings leave open.
        begun: True once the record is written.
    """

    settings: ActorSettings
    plan: JobPlan[T]
    model: str
    progress_class: type[Progress] = Progress
    keeping_seconds: float = 0.0
    """How long workers may take to keep what is finished of their pieces, once the grace period is over."""

    def __init__(
        self,
        settings: ActorSettings,
        plan: JobPlan[T],
        dataset: Dataset,
        worker_class: type[Worker[T]],
    ) -> None:
        self.settings = settings
        self.plan = plan
        self.dataset = dataset
        self.storage = dataset.storage
        self.worker_class = worker_class
        self.run = plan.run
        self.begun = plan.begun

    @abstractmethod
    def write_run(self, loaded: Loaded) -> None:
        """Write the run's record."""

    @abstractmethod
    def task(self, piece: Piece, commit: bool) -> Task:
        """Return the task for a piece."""

    @abstractmethod
    def commit(self, shard: int, outcomes: list[T]) -> None:
        """Commit a shard that was processed in parts; the outcomes are in no particular order."""

    @abstractmethod
    def give_up(self, piece: Piece, words: str) -> tuple[list[T], str]:
        """Return the outcome of a row that has crashed its worker twice while alone, and a sentence that
        names the row and what happened."""

    def keep(self, shard: int, outcomes: list[T]) -> None:
        """Keep outcomes of a shard that is not complete for the next run, if the job can."""

    def rows_kept(self) -> int:
        """Return how many rows of incomplete shards are kept for the next run."""
        return 0

    def context(self, lease: str, threads: int | None) -> WorkerContext:
        """Return the context for each worker."""
        endpoint = {"s3_endpoint": self.settings.actors_s3_endpoint}
        settings = self.settings.model_copy(update=endpoint)
        return WorkerContext(self.storage.root, lease, settings, self.run, threads)

    def begin(self, loaded: Loaded) -> None:
        """Check a worker that has loaded the model. The first one begins the run.

        Raises:
            JobError: the worker resolved device or dtype differently from the run.
        """
        if not self.begun:
            self.run = resolved(self.run, loaded)
            self.write_run(loaded)
            self.begun = True
        check_loaded(self.run, loaded)

    def publish(self, progress: Progress) -> None:
        """Publish progress for observers elsewhere; called every 15 s, and at the end."""

    def judge(self, progress: Progress) -> None:
        """Raise an error if the results so far make the job hopeless."""


def run_on_workers(job: Job[T], lock: Lock, on_progress: OnProgress) -> Progress:
    """Do the rest of a job, and return its final progress. Raises as `Driver.run`."""
    with cluster(job.settings) as plan, stop_on_signals(job.settings.grace) as stop:
        pool = Pool(job.worker_class, job.context(lock.token, plan.threads), plan)
        return Driver(job, pool, stop, lock, on_progress).run()


def stopped(rows: int, kept: int, partial: int = 0) -> KeyboardInterrupt:
    """Return an error that says what a stopped job keeps.

    Args:
        partial: how many of the rows that are kept are in incomplete shards.
    """
    where = f" ({partial} of them in incomplete shards)" if partial else ""
    left = rows - kept
    return KeyboardInterrupt(
        f"Stopped: {kept} of {rows} rows are kept{where}, {left} are left to do."
    )


class Driver(Generic[T]):
    """Keeps a pool busy until every piece is done.

    Args:
        stop: tells whether a user or a scheduler has asked the job to stop.
        on_progress: called about once a second with the progress.
    """

    def __init__(
        self, job: Job[T], pool: Pool, stop: Stop, lock: Lock, on_progress: OnProgress
    ) -> None:
        self.job = job
        self.pool = pool
        self.stop = stop
        self.lock = lock
        self.on_progress = on_progress
        self.ledger = job.plan.ledger()
        self.before = job.plan.rows - self.ledger.rows_left
        self.finished = Tally()
        self.deaths_in_a_row = 0
        self.deaths_while_loading = 0
        self.started: float | None = None
        self._looked_at = self._published_at = -math.inf
        self._told_of_stop = False

    def run(self) -> Progress:
        """Run until every piece is done, and return the final progress.

        Raises:
            JobError: the job is hopeless.
            KeyboardInterrupt: it was asked to stop, and work in progress is finished, kept or dropped; the
                message says what is kept.
        """
        try:
            while not self.ledger.finished:
                if self._is_over():
                    raise self._stopped()
                if time.monotonic() - self._looked_at > POLL_SECONDS:
                    self._look_around()
                if self.stop.requested:
                    self._tell_of_stop()
                else:
                    self._assign()
                for event in self.pool.events(POLL_SECONDS):
                    self._hear(event)
                progress = self.progress()
                self.job.judge(progress)
                self.on_progress(progress)
        finally:
            for worker in list(self.pool.workers):
                self.pool.dismiss(worker)
            self.job.publish(self.progress())
        return self.progress()

    def progress(self) -> Progress:
        under_way = (tally for worker in self.pool.workers for tally in worker.tallies.values())
        now = sum(under_way, start=self.finished)
        seconds = time.monotonic() - self.started if self.started is not None else 0.0
        return self.job.progress_class(self.job.plan.rows, self.before, now, seconds)

    def _look_around(self) -> None:
        self._looked_at = time.monotonic()
        self.lock.check()
        if self._looked_at - self._published_at > PROGRESS_SECONDS:
            self._published_at = self._looked_at
            self.job.publish(self.progress())
        if not self.stop.requested:
            self._staff()
        for worker in list(self.pool.workers):
            if not worker.pieces:
                continue
            still = time.monotonic() - worker.moved
            if still > self.job.settings.row_timeout:
                self.pool.dismiss(worker)
                self._died(Died(worker, f"it finished no row in {still:.0f} s (row_timeout)"))
            else:
                self.pool.ask(worker)

    def _staff(self) -> None:
        """Keep as many workers as the pool has places and the job has pieces for."""
        self.pool.heed_notices()
        for worker in list(self.pool.workers):
            if worker.leaving and not worker.pieces:
                self.pool.dismiss(worker)
        staying = [worker for worker in self.pool.workers if not worker.leaving]
        places = self.pool.places()
        pieces = len(self.ledger.todo) + sum(len(worker.pieces) for worker in staying)
        for _ in range(min(places, pieces) - len(staying)):
            self.pool.hire()
        # Do not wait for workers that have no place since a node was lost.
        idle = [worker for worker in staying if not worker.ready]
        for worker in idle[: max(0, len(staying) - places)]:
            self.pool.dismiss(worker)

    def _is_over(self) -> bool:
        """True if the job was asked to stop, and nothing is in progress or the grace period is
        over."""
        if not self.stop.requested:
            return False
        at_work = any(worker.pieces for worker in self.pool.workers)
        last = self.job.settings.grace + self.job.keeping_seconds
        return not at_work or self.stop.seconds > last

    def _tell_of_stop(self) -> None:
        if not self._told_of_stop:
            self._told_of_stop = True
            self.pool.stop(max(0.0, self.job.settings.grace - self.stop.seconds))

    def _stopped(self) -> KeyboardInterrupt:
        """Keep what is finished, and return an error that says what is kept and what is not."""
        for shard, outcomes in self.ledger.parts.items():
            self.job.keep(shard, outcomes)
        total, partial = self.job.plan.rows, self.job.rows_kept()
        return stopped(total, total - self.ledger.rows_unsettled + partial, partial)

    def _assign(self) -> None:
        """Give one piece to every ready worker, then another one to fill its free slots. Those of which
        only the commit is left fill none."""
        for others in range(PIECES_AT_ONCE):
            for worker in self.pool.workers:
                if not self.ledger.todo:
                    return
                if not worker.ready or worker.leaving or len(worker.pieces) >= PIECES:
                    continue
                if len(worker.pieces) - len(worker.finished) != others:
                    continue
                if any(self.ledger.is_suspect(piece) for piece in worker.pieces):
                    continue
                piece = self.ledger.take(busy=bool(worker.pieces))
                if piece is not None:
                    task = self.job.task(piece, commit=self.ledger.is_whole(piece))
                    self.pool.give(worker, task)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Ready):
            self.job.begin(event.loaded)
            self.started = self.started or time.monotonic()
        elif isinstance(event, Died):
            self._died(event)
        else:
            self._done(event)

    def _done(self, done: Done) -> None:
        piece = done.piece
        self.deaths_in_a_row = 0
        self.finished += done.tally
        if done.outcomes is None:
            self.ledger.requeue(piece)
            return
        logger.info("shard=%d rows=%d-%d done", piece.shard, piece.start, piece.stop - 1)
        if self.ledger.is_whole(piece):
            self.ledger.committed(piece)
        else:
            self._returned(piece, done.outcomes)

    def _returned(self, piece: Piece, outcomes: list[T]) -> None:
        """Add the outcomes of a part of a shard; commit the shard with its last part."""
        whole = self.ledger.returned(piece, outcomes)
        if whole is not None:
            self.job.commit(piece.shard, whole)

    def _died(self, death: Died) -> None:
        """Requeue the worker's pieces, and give up a row that has crashed its worker for the
        second time."""
        if not death.worker.ready and self.started is None and not death.node_lost:
            self.deaths_while_loading += 1
            if self.deaths_while_loading > 1:
                raise JobError(
                    f"Actors died twice while they loaded {self.job.model} and none has loaded "
                    f"it yet, the last with: {death.words}"
                )
        pieces = list(reversed(death.worker.pieces))
        shards = ",".join(str(piece.shard) for piece in pieces) or "none"
        if death.node_lost:
            logger.warning("shards=%s a node was lost; others take over", shards)
            for piece in pieces:
                self.ledger.requeue(piece)
            return
        logger.warning("shards=%s an actor died (%s); another takes over", shards, death.words)
        self.deaths_in_a_row += 1
        if self.deaths_in_a_row > self.job.settings.max_deaths:
            raise JobError(
                f"{self.deaths_in_a_row} actors died one after another without finishing anything, "
                f"the last with: {death.words}"
            )
        for piece in pieces:
            if self.ledger.killed(piece):
                outcomes, told = self.job.give_up(piece, death.words)
                failed = [{"error_type": GAVE_UP, "error": told}] * len(outcomes)
                self.finished += Tally(len(piece) - len(failed)) + Tally.of_failures(failed)
                self._returned(piece, outcomes)
