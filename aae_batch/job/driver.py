"""The supervision loop: pieces of shards to Ray actors, results to tallies, deaths to new actors.

The driver alone reads the manifest; no picture passes through it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import pyarrow.compute as pc
import ray
from ray.exceptions import RayActorError, RayTaskError

import aae_batch
from aae_batch.dataset import layout, writer
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.storage import Storage, open_storage
from aae_batch.errors import AaeBatchError, JobError, ModelError, OutputError, RowError
from aae_batch.job.plan import Ledger, Piece
from aae_batch.job.progress import Progress, Tally
from aae_batch.job.settings import SHARD_SIZE, JobSettings, differences, fingerprint
from aae_batch.job.worker import CONCURRENCY, PIECES_AT_ONCE, Report, Task, Worker, WorkerSettings
from aae_batch.manifest import Manifest, Row, open_manifest

POLL_SECONDS = 1.0
GAVE_UP = "ActorDied"
"""`error_type` of a row whose generation ended its process, twice."""


@dataclass(frozen=True)
class Plan:
    """What a job comes to, given what its output already holds.

    Attributes:
        run: what `run.json` says or is going to say.
        begun: the output has shards of this run already.
        committed: shards that are done.
    """

    run: dict[str, Any]
    begun: bool
    committed: frozenset[int]

    @property
    def shard_size(self) -> int:
        return self.run["shard_size"]

    def ledger(self) -> Ledger[writer.Outcome]:
        return Ledger.of(self.run["rows"], self.shard_size, self.committed)


def make_plan(settings: JobSettings, manifest: Manifest, storage: Storage) -> Plan:
    """Hold a job against its output.

    Raises:
        OutputError: the output belongs to another run.
    """
    pixels = settings.pixels(manifest.digest)
    dataset = Dataset(storage)
    before = dataset.run
    committed = frozenset(dataset.shards())
    if before is None and committed:
        raise OutputError(
            f"{storage.root} holds metadata but no {layout.RUN}, so there is no telling what made "
            "it; choose another output."
        )
    if before is None or not committed:  # nothing is lost by beginning anew
        run = {
            "fingerprint": fingerprint(pixels),
            "settings": pixels,
            "shard_size": settings.shard_size or SHARD_SIZE,
            "rows": len(manifest),
            "manifest": manifest.path.name,
            "versions": _versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return Plan(run, begun=False, committed=committed)
    changed = differences(before.get("settings", {}), pixels)
    size = settings.shard_size or before.get("shard_size")
    if size != before.get("shard_size"):
        changed.append(f"shard_size: {before.get('shard_size')} -> {size}")
    if changed:
        raise OutputError(
            f"{storage.root} was begun with other settings ({'; '.join(changed)}): choose another "
            "output, or go back to these settings to finish it."
        )
    return Plan(before, begun=True, committed=committed)


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
                _begin(storage, plan)
            ledger = plan.ledger()
            session = None
            if not ledger.finished:
                with _cluster(settings) as actors, _stop_on_sigterm():
                    foreman = Foreman(
                        settings, plan, manifest, storage, ledger, actors, report, worker_class
                    )
                    session = foreman.run()
            elif (summary := Dataset(storage).summary) is not None:
                return summary
            summary = summarize(Dataset(storage), session)
            storage.write_bytes(layout.SUMMARY, _json(summary))
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
                    f"An actor died while it loaded {self.settings.model}: {_words(error)}"
                ) from error
            self._died(actor, _words(error))
            return
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, AaeBatchError):
                raise cause if ref is actor.loading else JobError(str(cause)) from None
            if ref is actor.loading:
                raise ModelError(
                    f"An actor could not load {self.settings.model}: {_words(cause)}"
                ) from error
            self._died(actor, _words(cause))
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


def _words(error: BaseException) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


# --- Ray -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActorPlan:
    """How many actors, and what of a machine each takes."""

    count: int
    cpus: float
    gpus: float
    threads: int | None

    @classmethod
    def of(cls, wanted: int | None, gpus: int, cores: int) -> ActorPlan:
        """One actor per GPU; without GPUs one actor with all cores, or as many as are wanted, which
        share the cores."""
        if gpus:
            return cls(wanted or gpus, cpus=1, gpus=1, threads=None)
        count = wanted or 1
        return cls(count, cpus=1, gpus=0, threads=max(1, cores // count))


@contextmanager
def _cluster(settings: JobSettings) -> Iterator[ActorPlan]:
    """Join the cluster, or one that is already joined, or start one on this machine."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    ours = not ray.is_initialized()
    if ours:
        local = settings.ray_address is None
        # Every actor asks for one CPU; more of them than cores is a person's own choice.
        cpus = {"num_cpus": max(cores, settings.actors or 1)} if local else {}
        quiet = {"include_dashboard": False} if local else {}
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            ray.init(
                address=settings.ray_address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=False,
                **cpus,
                **quiet,
            )
        except Exception as error:  # Ray raises bare ones, too
            raise JobError(f"Ray did not start: {_words(error)}") from error
    try:
        wants_gpu = settings.device == "auto" or settings.device.startswith("cuda")
        gpus = math.floor(ray.cluster_resources().get("GPU", 0)) if wants_gpu else 0
        plan = ActorPlan.of(settings.actors, gpus, cores)
        asked = os.environ.get("OMP_NUM_THREADS", "")
        if (
            plan.threads is not None and asked.isdigit()
        ):  # a person's wish; Ray sets its own in actors
            plan = replace(plan, threads=min(plan.threads, max(1, int(asked))))
        yield plan
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """A scheduler's polite end of a job is handled as Ctrl-C is. To be entered when Ray has started,
    which puts a handler of its own there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- records -------------------------------------------------------------------------------------


def summarize(dataset: Dataset, session: dict[str, Any] | None) -> dict[str, Any]:
    """Counts over a complete dataset, from its tables."""
    methods: dict[str, Counter[str]] = defaultdict(Counter)
    failures: Counter[str] = Counter()
    for table in dataset.tables(
        ["method", "status", "error_type", "num_refinements", "neglected", "seconds"]
    ):
        failures.update(table["error_type"].drop_null().to_pylist())
        ok = table.filter(pc.equal(table["status"], "ok"))
        for method in pc.unique(ok["method"]).to_pylist():
            part = ok.filter(pc.equal(ok["method"], method))
            methods[method]["images"] += part.num_rows
            methods[method]["refinements"] += pc.sum(part["num_refinements"]).as_py() or 0
            methods[method]["neglected"] += pc.sum(part["neglected"]).as_py() or 0
    images = sum(counts["images"] for counts in methods.values())
    return {
        "rows": images + sum(failures.values()),
        "images": images,
        "failed": sum(failures.values()),
        "failures": dict(failures.most_common()),
        "methods": {
            method: {
                "images": counts["images"],
                "mean_refinements": round(counts["refinements"] / counts["images"], 3),
                "neglected": counts["neglected"],
            }
            for method, counts in sorted(methods.items())
        },
        "last_session": session,
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "diffusers", "transformers", "ray")
    found = {"python": platform.python_version(), "aae_batch": aae_batch.__version__}
    return found | {package: version(package) for package in packages}


def _begin(storage: Storage, plan: Plan) -> None:
    """Write `run.json`, and remove what a run that committed nothing has left."""
    for prefix in (layout.IMAGES, layout.ATTENTION):
        for name in storage.list(prefix):
            storage.delete(name)
    storage.write_bytes(layout.RUN, _json(plan.run))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
