"""The supervision loop: pieces of shards to Ray actors, results to tallies, deaths to new actors.

The driver alone reads the manifest; no picture passes through it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from aae_batch.dataset import layout, writer
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.storage import Storage, open_storage
from aae_batch.errors import AaeBatchError, JobError, ModelError, RowError
from aae_batch.job.cluster import ActorPlan, cluster, in_words, stop_on_sigterm
from aae_batch.job.plan import Ledger, Piece
from aae_batch.job.progress import Progress, Tally
from aae_batch.job.records import Plan, as_json, begin, make_plan, summarize
from aae_batch.job.settings import JobSettings
from aae_batch.job.worker import CONCURRENCY, PIECES_AT_ONCE, Report, Task, Worker, WorkerSettings
from aae_batch.manifest import Manifest, open_manifest
from aae_batch.row import Row

POLL_SECONDS = 1.0
GAVE_UP = "ActorDied"
"""`error_type` of a row whose generation ended its process, twice."""


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
    storage = open_storage(settings.output)
    with open_manifest(settings.manifest) as manifest:
        make_plan(settings, manifest, storage)  # refuse before anything is made
        with storage.writing():
            plan = make_plan(settings, manifest, storage)
            if not plan.begun:
                begin(storage, plan)
            ledger = plan.ledger()
            session = None
            if not ledger.finished:
                with cluster(settings) as actors, stop_on_sigterm():
                    foreman = Foreman(
                        settings, plan, manifest, storage, ledger, actors, report, worker_class
                    )
                    session = foreman.run()
            elif (summary := Dataset(storage).summary) is not None:
                return summary
            summary = summarize(Dataset(storage), session)
            storage.write_bytes(layout.SUMMARY, as_json(summary))
            return summary


# --- the loop ------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Actor:
    """An actor, the calls that are out with it, and how far it last said their pieces were."""

    handle: Any
    loading: Any
    calls: dict[Any, Piece] = field(default_factory=dict)
    asked: Any = None
    tallies: dict[Piece, Tally] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        return self.loading is None

    def waits_for(self) -> list[Any]:
        return [ref for ref in (self.loading, self.asked, *self.calls) if ref is not None]


class Foreman:
    """Keeps actors at work until every shard is committed.

    Args:
        actors: how many actors to keep, and the Ray resources of each.
    """

    def __init__(
        self,
        settings: JobSettings,
        plan: Plan,
        manifest: Manifest,
        storage: Storage,
        ledger: Ledger[writer.Outcome],
        actors: ActorPlan,
        report: Callable[[Progress], None],
        worker_class: type[Worker],
    ) -> None:
        self.settings = settings
        self.plan = plan
        self.manifest = manifest
        self.storage = storage
        self.ledger = ledger
        self.report = report
        self.actor_plan = actors
        self.fingerprint = plan.run["fingerprint"]
        self.before = len(manifest) - ledger.rows_left
        self.finished = Tally()
        self.deaths_in_a_row = 0
        self.started: float | None = None
        self._actors: list[_Actor] = []
        self._asked_at = 0.0
        self._remote = ray.remote(worker_class)
        self._worker = WorkerSettings(
            model=settings.model,
            revision=settings.revision,
            device=settings.device,
            dtype=settings.dtype,
            slots=settings.slots,
            guidance=settings.guidance,
            root=storage.root,
            fingerprint=self.fingerprint,
            threads=actors.threads,
        )

    def run(self) -> dict[str, Any]:
        """Returns the figures of this session."""
        try:
            while not self.ledger.finished:
                self._staff()
                self._assign()
                self._ask_for_progress()
                waiting = {ref: actor for actor in self._actors for ref in actor.waits_for()}
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_SECONDS)
                for ref in done:
                    if waiting[ref] in self._actors:  # not one that died a moment ago
                        self._hear(waiting[ref], ref)
                self.report(self.progress())
        finally:
            for actor in self._actors:
                ray.kill(actor.handle)
        progress = self.progress()
        return {
            "rows": progress.now.done,
            "seconds": round(progress.seconds, 1),
            "images_per_second": round(progress.images_per_second, 3),
        }

    def progress(self) -> Progress:
        under_way = (tally for actor in self._actors for tally in actor.tallies.values())
        now = Tally.sum([self.finished, *under_way])
        seconds = time.monotonic() - self.started if self.started is not None else 0.0
        return Progress(len(self.manifest), self.before, now, seconds)

    def _staff(self) -> None:
        wanted = min(self.actor_plan.count, len(self.ledger.todo) + self._pieces_out())
        while len(self._actors) < wanted:
            handle = self._remote.options(
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=CONCURRENCY,
                num_cpus=self.actor_plan.cpus,
                num_gpus=self.actor_plan.gpus,
            ).remote(self._worker)
            self._actors.append(_Actor(handle, loading=handle.load.remote()))

    def _pieces_out(self) -> int:
        return sum(len(actor.calls) for actor in self._actors)

    def _assign(self) -> None:
        """First one piece to every actor that is ready, then the next one, for its free slots."""
        for others in range(PIECES_AT_ONCE):
            for actor in self._actors:
                if not actor.ready or len(actor.calls) != others or self._is_alone(actor):
                    continue
                piece = self.ledger.take(busy=others > 0)
                if piece is not None:
                    call = actor.handle.generate.remote(self._task(piece))
                    actor.calls[call] = piece

    def _is_alone(self, actor: _Actor) -> bool:
        return any(self.ledger.is_suspect(piece) for piece in actor.calls.values())

    def _task(self, piece: Piece) -> Task:
        rows, extras = self.manifest.read(piece.start, piece.stop)
        return Task(piece, rows, extras, commit=self.ledger.is_whole(piece))

    def _ask_for_progress(self) -> None:
        if time.monotonic() - self._asked_at < POLL_SECONDS:
            return
        self._asked_at = time.monotonic()
        for actor in self._actors:
            if actor.calls and actor.asked is None:
                actor.asked = actor.handle.progress.remote()

    def _hear(self, actor: _Actor, ref: Any) -> None:
        """Take what a call came to."""
        try:
            value = ray.get(ref)
        except RayActorError as error:
            if not actor.ready and self.started is None:
                raise ModelError(
                    f"An actor died while it loaded {self.settings.model}: {in_words(error)}"
                ) from error
            self._died(actor, in_words(error))
            return
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, AaeBatchError):
                raise cause if ref is actor.loading else JobError(str(cause)) from None
            if ref is actor.loading:
                raise ModelError(
                    f"An actor could not load {self.settings.model}: {in_words(cause)}"
                ) from error
            self._died(actor, in_words(cause))
            return
        if ref is actor.loading:
            actor.loading = None
            self.started = self.started or time.monotonic()
        elif ref is actor.asked:
            actor.asked = None
            out = set(actor.calls.values())  # the answer may be older than a piece's end
            actor.tallies = {piece: tally for piece, tally in value.items() if piece in out}
        else:
            self._done(actor, ref, value)

    def _done(self, actor: _Actor, call: Any, report: Report) -> None:
        piece = actor.calls.pop(call)
        self.deaths_in_a_row = 0
        self.finished += report.tally
        actor.tallies.pop(piece, None)
        if self.ledger.is_whole(piece):
            self.ledger.committed(piece)
        else:
            self._return(piece, report.outcomes)

    def _return(self, piece: Piece, outcomes: list[writer.Outcome]) -> None:
        whole = self.ledger.returned(piece, outcomes)
        if whole is not None:
            start = piece.shard * self.plan.shard_size
            _, extras = self.manifest.read(start, start + len(whole))
            writer.commit(self.storage, piece.shard, whole, extras, self.fingerprint)

    def _died(self, actor: _Actor, words: str) -> None:
        """Queue again what the actor had, and give up the row that has killed for the second time."""
        self._actors.remove(actor)
        ray.kill(actor.handle)  # it may only be of no more use
        self.deaths_in_a_row += 1
        if self.deaths_in_a_row > self.settings.max_deaths:
            raise JobError(
                f"{self.deaths_in_a_row} actors died one after another without finishing anything, "
                f"the last with: {words} Run the same command again when that is mended."
            )
        logging.getLogger("aae_batch").warning("An actor died (%s); another takes over.", words)
        for piece in reversed(actor.calls.values()):
            if self.ledger.killed(piece):
                (row,) = self.manifest.read(piece.start, piece.stop)[0]
                self._give_up(piece, row, words)

    def _give_up(self, piece: Piece, row: Row, words: str) -> None:
        reason = f"its process died twice while it was generated alone: {words}"
        outcome = writer.failed(row, self.settings.guidance, RowError(row.id, reason), kind=GAVE_UP)
        self.finished += Tally(done=1, failed=1)
        self._return(piece, [outcome])
