"""The supervision loop: pieces of shards to actors, results to tallies, deaths to new actors.

The driver alone reads the manifest. No picture passes through it but those of a shard that was halved,
in the layouts that write pictures with the commit.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from aae_batch.dataset import layout, writer
from aae_batch.dataset.lock import Lock
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.storage import Storage, open_storage
from aae_batch.dataset.stored import stored_outcomes
from aae_batch.errors import JobError, OutputError, RowError
from aae_batch.job.cluster import ActorPlan, Stop, cluster, stop_on_signals
from aae_batch.job.crew import Crew, Died, Done, Failed, Member, RayCrew, Ready, Told
from aae_batch.job.metrics import DriverMetrics
from aae_batch.job.plan import Ledger, Piece
from aae_batch.job.progress import Progress, Tally
from aae_batch.job.records import (
    Plan,
    as_json,
    begin,
    earlier_failures,
    make_plan,
    progress_record,
    summarize,
)
from aae_batch.job.settings import JobSettings
from aae_batch.job.worker import PIECES_AT_ONCE, Report, Task, Worker, WorkerSettings
from aae_batch.manifest import Manifest, open_manifest
from aae_batch.row import Row

POLL_SECONDS = 1.0
GAVE_UP = "ActorDied"
"""`error_type` of a row whose generation ended its process, twice."""

FEW_ROWS = 100
"""A share of failures is only judged once so many rows are done."""

logger = logging.getLogger("aae_batch.job")


def run_job(
    settings: JobSettings,
    report: Callable[[Progress], None] = lambda progress: None,
    worker_class: type[Worker] = Worker,
) -> dict[str, Any]:
    """Generate what is missing of a dataset. Returns its summary, as in `summary.json`.

    Args:
        report: is told about once a second how far the job is.
        worker_class: what the actors are made of.

    Raises:
        AaeBatchError: the job cannot start or cannot go on; the message says why.
        KeyboardInterrupt: it was stopped by a signal. The same call goes on with it.
    """
    storage = open_storage(settings.output, settings.s3_endpoint)
    with open_manifest(settings.manifest, settings.s3_endpoint) as manifest:
        make_plan(settings, manifest, storage)  # refuse before anything is made
        with storage.writing() as lock:
            plan = make_plan(settings, manifest, storage)
            if not plan.begun:
                begin(storage, plan)
            try:
                return _finish(settings, plan, manifest, storage, lock, report, worker_class)
            except OutputError as error:  # the job was under way: it can go on when that is mended
                raise JobError(str(error)) from error


def _finish(
    settings: JobSettings,
    plan: Plan,
    manifest: Manifest,
    storage: Storage,
    lock: Lock,
    report: Callable[[Progress], None],
    worker_class: type[Worker],
) -> dict[str, Any]:
    """Generate what is left, and count what is there."""
    ledger = plan.ledger()
    session = None
    if not ledger.finished:
        storage.delete(layout.SUMMARY)
        with cluster(settings) as actors, stop_on_signals(settings.grace) as stop:
            worker = worker_settings(settings, plan, storage, actors.threads)
            crew = RayCrew(worker_class, worker, actors)
            session = Foreman(
                settings, plan, manifest, storage, ledger, crew, actors, report, stop, lock
            ).run()
    elif (summary := Dataset(storage).summary) is not None:
        return summary
    summary = summarize(Dataset(storage), session)
    storage.write_bytes(layout.SUMMARY, as_json(summary))
    return summary


def worker_settings(
    settings: JobSettings, plan: Plan, storage: Storage, threads: int | None
) -> WorkerSettings:
    return WorkerSettings(
        model=settings.model,
        revision=settings.revision,
        device=settings.device,
        dtype=settings.dtype,
        slots=settings.slots,
        guidance=settings.guidance,
        root=storage.root,
        fingerprint=plan.run["fingerprint"],
        layout=plan.layout,
        image_format=plan.image_format,
        threads=threads,
        s3_endpoint=settings.s3_endpoint,
    )


class Foreman:
    """Keeps a crew at work until every shard is committed.

    Args:
        actors: how many members the crew should have.
        stop: whether a person or a scheduler wants the job to end.
    """

    def __init__(
        self,
        settings: JobSettings,
        plan: Plan,
        manifest: Manifest,
        storage: Storage,
        ledger: Ledger[writer.Outcome],
        crew: Crew,
        actors: ActorPlan,
        report: Callable[[Progress], None],
        stop: Stop,
        lock: Lock,
    ) -> None:
        self.settings = settings
        self.plan = plan
        self.manifest = manifest
        self.storage = storage
        self.ledger = ledger
        self.crew = crew
        self.actors = actors
        self.report = report
        self.stop = stop
        self.lock = lock
        self.metrics = DriverMetrics()
        self.fingerprint = plan.run["fingerprint"]
        self.before = len(manifest) - ledger.rows_left
        self.finished = Tally()
        self.deaths_in_a_row = 0
        self.deaths_while_loading = 0
        self.started: float | None = None
        self._looked_at = self._told_at = -math.inf
        # Where failed rows are made again, none has failed yet.
        self._earlier = Counter() if plan.again else earlier_failures(Dataset(storage))

    def run(self) -> dict[str, Any]:
        """Returns the figures of this session.

        Raises:
            JobError: the job is hopeless.
            KeyboardInterrupt: it was told to stop, and what was under way is finished or dropped.
        """
        try:
            while not self.ledger.finished:
                if self._is_over():
                    raise KeyboardInterrupt
                if time.monotonic() - self._looked_at > POLL_SECONDS:
                    self._look_around()
                if not self.stop.requested:
                    self._assign()
                for event in self.crew.events(POLL_SECONDS):
                    self._hear(event)
                self._judge()
                self.report(self.progress())
        finally:
            for member in list(self.crew.members):
                self.crew.dismiss(member)
            self._tell()
        progress = self.progress()
        return {
            "rows": progress.now.done,
            "seconds": round(progress.seconds, 1),
            "images_per_second": round(progress.images_per_second, 3),
        }

    def progress(self) -> Progress:
        under_way = (tally for member in self.crew.members for tally in member.tallies.values())
        now = Tally.sum([self.finished, *under_way])
        seconds = time.monotonic() - self.started if self.started is not None else 0.0
        return Progress(len(self.manifest), self.before, now, seconds)

    # --- what is done about once a second ---

    def _look_around(self) -> None:
        self._looked_at = time.monotonic()
        self.lock.check()
        if self._looked_at - self._told_at > layout.PROGRESS_SECONDS:
            self._tell()
        if not self.stop.requested:
            self._staff()
        for member in list(self.crew.members):
            if not member.pieces:
                continue
            still = time.monotonic() - member.moved
            if still > self.settings.row_timeout:
                self.crew.dismiss(member)
                self._died(Died(member, f"it finished no row in {still:.0f} s (row_timeout)"))
            else:
                self.crew.ask(member)

    def _tell(self) -> None:
        """Say how far the job is: in `progress.json`, and in the metrics."""
        self._told_at = time.monotonic()
        progress = self.progress()
        self.metrics.speed(progress.images_per_second)
        record = progress_record(progress, self._earlier + progress.now.failures, time.time())
        try:
            self.storage.write_bytes(layout.PROGRESS, as_json(dict(record)))
        except OutputError as error:  # it is news, and no part of the dataset
            logger.warning("progress is not told: %s", error)

    def _staff(self) -> None:
        """As many actors as there is room for, between the least and the most that are wanted."""
        room = self.crew.room()
        most = self.actors.most if self.actors.most is not None else max(room, self.actors.least)
        places = min(max(room, self.actors.least), most)
        pieces = len(self.ledger.todo) + sum(len(member.pieces) for member in self.crew.members)
        for _ in range(min(places, pieces) - len(self.crew.members)):
            self.crew.hire()
        # Of those that a lost node leaves without a place, none is waited for.
        idle = [member for member in self.crew.members if not member.ready]
        for member in idle[: max(0, len(self.crew.members) - places)]:
            self.crew.dismiss(member)

    def _is_over(self) -> bool:
        """The job was told to stop, and nothing is under way or the time for it is up."""
        if not self.stop.requested:
            return False
        at_work = any(member.pieces for member in self.crew.members)
        return not at_work or self.stop.seconds > self.settings.grace

    # --- pieces go out ---

    def _assign(self) -> None:
        """First one piece to every actor that is ready, then the next one, for its free slots."""
        for others in range(PIECES_AT_ONCE):
            for member in self.crew.members:
                if not self.ledger.todo:
                    return
                if not member.ready or len(member.pieces) != others or self._is_alone(member):
                    continue
                piece = self.ledger.take(busy=others > 0)
                if piece is not None:
                    self.crew.give(member, self._task(piece))

    def _is_alone(self, member: Member) -> bool:
        return any(self.ledger.is_suspect(piece) for piece in member.pieces)

    def _task(self, piece: Piece) -> Task:
        part = self.manifest.part(piece.start, piece.stop)
        return Task(piece, part, commit=self.ledger.is_whole(piece))

    # --- what comes back ---

    def _hear(self, event: Ready | Told | Done | Died | Failed) -> None:
        if isinstance(event, Ready):
            self.started = self.started or time.monotonic()
        elif isinstance(event, Told):
            member = event.member
            tallies = {p: tally for p, tally in event.tallies.items() if p in member.pieces}
            if tallies != member.tallies:
                member.moved = time.monotonic()
            member.tallies = tallies
        elif isinstance(event, Done):
            self._done(event.piece, event.report)
        elif isinstance(event, Failed):
            raise event.error if not event.member.ready else JobError(str(event.error))
        else:
            self._died(event)

    def _done(self, piece: Piece, report: Report) -> None:
        self.deaths_in_a_row = 0
        self.finished += report.tally
        logger.info("shard=%d rows=%d-%d done", piece.shard, piece.start, piece.stop - 1)
        if self.ledger.is_whole(piece):
            self.ledger.committed(piece)
        else:
            self._return(piece, report.outcomes)

    def _return(self, piece: Piece, outcomes: list[writer.Outcome]) -> None:
        """Commit a shard that came in parts, once the last of them is there."""
        made = self.ledger.returned(piece, outcomes)
        if made is None:
            return
        shard, size = piece.shard, self.plan.shard_size
        start, stop = shard * size, min((shard + 1) * size, len(self.manifest))
        extras = self.manifest.part(start, stop).extras
        form = (self.plan.layout, self.plan.image_format)
        if shard in self.plan.again:
            kept = stored_outcomes(Dataset(self.storage), shard, start, self.plan.layout)
            new = {outcome.index: outcome for outcome in made}
            made = [new.get(outcome.index, outcome) for outcome in kept]
        writer.commit(self.storage, shard, made, extras, self.fingerprint, *form)

    def _died(self, death: Died) -> None:
        """Queue again what the actor had, and give up the row that has killed for the second time."""
        if not death.member.ready and self.started is None and not death.node_lost:
            self.deaths_while_loading += 1
            if self.deaths_while_loading > 1:
                raise JobError(
                    f"Actors died twice while they loaded {self.settings.model} and none has loaded "
                    f"it yet, the last with: {death.words}"
                )
        pieces = list(reversed(death.member.pieces))
        shards = ",".join(str(piece.shard) for piece in pieces) or "none"
        if death.node_lost:
            logger.warning("shards=%s a node was lost; others take over", shards)
            for piece in pieces:
                self.ledger.requeue(piece)
            return
        logger.warning("shards=%s an actor died (%s); another takes over", shards, death.words)
        self.deaths_in_a_row += 1
        if self.deaths_in_a_row > self.settings.max_deaths:
            raise JobError(
                f"{self.deaths_in_a_row} actors died one after another without finishing anything, "
                f"the last with: {death.words}"
            )
        for piece in pieces:
            if self.ledger.killed(piece):
                (row,) = self.manifest.part(piece.start, piece.stop).rows()
                self._give_up(piece, row, death.words)

    def _give_up(self, piece: Piece, row: Row, words: str) -> None:
        reason = f"its process died twice while it was generated alone: {words}"
        logger.error("shard=%d row=%s failed %s: %s", piece.shard, row.id, GAVE_UP, words)
        outcome = writer.failed(row, self.settings.guidance, RowError(row.id, reason), kind=GAVE_UP)
        self.finished += Tally(done=1, failures=Counter([GAVE_UP]))
        self._return(piece, [outcome])

    def _judge(self) -> None:
        """Stop a job that is failing everywhere."""
        limit = self.settings.max_failures
        if limit is None:
            return
        now = self.progress().now
        share = isinstance(limit, float)
        allowed = limit * now.done if share else limit
        if now.failed > allowed and (not share or now.done >= FEW_ROWS):
            raise JobError(
                f"{now.failed} of {now.done} rows failed, more than max_failures "
                f"({f'{limit:.0%}' if share else limit}) allows; see the column error in "
                f"{self.storage.place(layout.METADATA)}."
            )
