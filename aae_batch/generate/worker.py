"""The actor: one model, fed with pieces of shards, whose slots stay full from one to the next."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from aae_batch.dataset import writer
from aae_batch.dataset.image_format import ImageFormat
from aae_batch.dataset.layout import Layout, metadata_name
from aae_batch.dataset.reader import Dataset
from aae_batch.errors import ModelError, RowError
from aae_batch.generate.records import Loaded
from aae_batch.job.actor import Actor, Report
from aae_batch.job.metrics import WorkerMetrics
from aae_batch.job.plan import Piece
from aae_batch.job.progress import Tally
from aae_batch.manifest.reader import Part
from aae_batch.manifest.row import Row
from aae_batch.request import Request, Result
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.model.weights import weights_digest
from aae_batch.store.open import open_storage

if TYPE_CHECKING:
    from aae_batch.sampling.engine import Batch, Engine

logger = logging.getLogger("aae_batch.worker")


@dataclass(frozen=True)
class WorkerSettings:
    """What every actor of a job is told.

    Attributes:
        weights: the digest of the model's, as the run was begun with; None for one on the hub.
        root: the output root.
        lease: the token of the driver's lock on it: without that nothing is written.
        layout, image_format: how pictures are stored.
        threads: torch's threads; None leaves them as they are.
        writers: threads that encode and write pictures.
        s3_endpoint: URL of an S3-compatible store; None: as the environment says, else AWS.
    """

    model: str
    revision: str | None
    device: str
    dtype: str
    slots: int
    guidance: GuidanceConfig
    root: str
    lease: str
    weights: str | None = None
    layout: Layout = "files"
    image_format: ImageFormat = writer.PNG
    threads: int | None = None
    writers: int = 2
    s3_endpoint: str | None = None


@dataclass(frozen=True)
class Task:
    """A piece with its part of the manifest. Rows that are wrong there are only written down."""

    piece: Piece
    part: Part
    fingerprint: str
    """Of the run."""
    commit: bool
    """Whether the piece is a whole shard; otherwise its outcomes are returned instead."""
    keep: bool = False
    """Whether pictures are returned with the outcomes and not written, in every layout."""


@dataclass
class _Open:
    """A piece on its way: the engine's results become outcomes one by one."""

    task: Task
    missing: set[str]
    outcomes: list[Future[writer.Outcome]] = field(default_factory=list)
    finished: threading.Event = field(default_factory=threading.Event)
    tally: Tally = field(default_factory=Tally)
    error: BaseException | None = None


class Worker(Actor):
    """Generates pieces of shards. Several calls may be under way at once, one thread each; the
    engine runs in a thread of its own and takes rows from all of them in order.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__()
        self.settings = settings
        self.storage = open_storage(settings.root, settings.s3_endpoint)
        self.storage.heed(settings.lease)
        self._incoming: queue.SimpleQueue[tuple[_Open, Row]] = queue.SimpleQueue()
        self._open: list[_Open] = []
        self._lock = threading.Lock()
        self._writing = 0
        self._broken: BaseException | None = None

    def load(self) -> Loaded:
        """Load the model and start. Errors are the caller's to report."""
        if self.settings.threads is not None:
            import torch

            torch.set_num_threads(self.settings.threads)
        self.metrics = WorkerMetrics()
        engine = self.load_engine()
        # What the settings ask of this model is found out now, not with the first row.
        with engine.open(self.settings.guidance):
            pass
        # A picture waits in memory until it is written; the engine waits when too many do.
        self._writers = ThreadPoolExecutor(self.settings.writers, thread_name_prefix="writer")
        self._unwritten = threading.BoundedSemaphore(
            4 * self.settings.writers + self.settings.slots
        )
        threading.Thread(target=self._run, args=(engine,), name="engine", daemon=True).start()
        return self.loaded(engine)

    def loaded(self, engine: Engine) -> Loaded:
        model = engine.model
        return Loaded(str(model.device.type), str(model.dtype).removeprefix("torch."))

    def load_engine(self) -> Engine:
        from aae_batch.sampling.engine import Engine

        s = self.settings
        if s.weights != weights_digest(s.model, s.s3_endpoint):
            raise ModelError(
                f"The model {s.model} is another one on this machine than the run was begun with; "
                "give every machine the same, or name one in an object store."
            )
        return Engine.from_pretrained(
            s.model,
            s.slots,
            revision=s.revision,
            device=s.device,
            dtype=s.dtype,
            s3_endpoint=s.s3_endpoint,
        )

    def perform(self, task: Task) -> Report[writer.Outcome]:
        return self.generate(task)

    def generate(self, task: Task) -> Report[writer.Outcome]:
        """Generate a piece; commit it if it is a shard. One that is committed, by an actor that died before
        it could say so, is only counted.

        Raises:
            OutputError: something cannot be written.
            Exception: whatever else stopped the engine, which is then of no more use.
        """
        if task.commit and self.storage.exists(metadata_name(task.piece.shard)):
            return Report(self._counted(task.piece.shard), [])
        rows = task.part.rows()
        good = [row for row in rows if row.error is None]
        piece = _Open(task, missing={row.id for row in good})
        bad = [writer.failed(row, self.settings.guidance) for row in rows if row.error is not None]
        piece.tally = Tally(len(bad), failures=Counter(one.metadata["error_type"] for one in bad))
        with self._lock:
            if self._broken is not None:
                raise self._broken
            self._open.append(piece)
            for row in good:
                self._incoming.put((piece, row))
            if not good:
                piece.finished.set()
        try:
            piece.finished.wait()
            if piece.error is not None:
                raise piece.error
            outcomes = bad + [outcome.result() for outcome in piece.outcomes]
            if task.commit:
                writer.commit(
                    self.storage,
                    task.piece.shard,
                    outcomes,
                    task.part.extras,
                    task.fingerprint,
                    self.settings.layout,
                    self.settings.image_format,
                )
            logger.info("shard=%d rows=%d done", task.piece.shard, len(rows))
            return Report(piece.tally, [] if task.commit else outcomes)
        finally:
            with self._lock:
                self._open.remove(piece)

    def _counted(self, shard: int) -> Tally:
        table = Dataset(self.storage).table(shard, ["error_type", "num_refinements"])
        failures = Counter(table["error_type"].drop_null().to_pylist())
        return Tally(len(table), pc.sum(table["num_refinements"]).as_py() or 0, failures)

    def progress(self) -> dict[Piece, Tally]:
        """What is finished of each piece that is under way."""
        with self._lock:
            return {piece.task.piece: piece.tally for piece in self._open}

    def _run(self, engine: Engine) -> None:
        try:
            with engine.open(self.settings.guidance) as batch:
                flying: dict[str, tuple[_Open, Row]] = {}
                while True:
                    while batch.free and (not flying or not self._incoming.empty()):
                        piece, row = self._incoming.get()
                        flying[row.id] = (piece, row)
                        try:
                            self.admit(batch, row.request)
                        except RowError as error:
                            self._finish(*flying.pop(row.id), Result(row.request, error=error))
                    for result in batch.step():
                        self._finish(*flying.pop(result.request.name), result)
                    self.metrics.totals(batch.seconds)
                    waiting = sum(len(piece.missing) for piece in self._open) - len(flying)
                    self.metrics.load(batch.slots, len(batch), waiting, self._writing)
        except BaseException as error:
            self._break(error)

    def admit(self, batch: Batch, request: Request) -> None:
        """Give `request` a slot.

        Raises:
            RowError: it cannot be sampled.
        """
        batch.add(request)

    def _finish(self, piece: _Open, row: Row, result: Result) -> None:
        self._unwritten.acquire()
        with self._lock:
            self._writing += 1
        future = self._writers.submit(self._write, piece, row, result)
        with self._lock:
            piece.outcomes.append(future)
            piece.missing.remove(row.id)
            if not piece.missing:
                piece.finished.set()

    def _write(self, piece: _Open, row: Row, result: Result) -> writer.Outcome:
        try:
            outcome = writer.write_image(
                self.storage,
                piece.task.piece.shard,
                row,
                result,
                self.settings.guidance,
                self.settings.layout,
                self.settings.image_format,
                self.metrics.spent,
                piece.task.keep,
            )
        finally:
            self._unwritten.release()
            with self._lock:
                self._writing -= 1
        said = outcome.metadata
        refinements = said.get("num_refinements", 0)
        failures = Counter([said["error_type"]] if outcome.failed else [])
        with self._lock:
            piece.tally += Tally(1, refinements, failures)
        self.metrics.row(said["status"], refinements)
        if outcome.failed:
            shard = piece.task.piece.shard
            logger.warning("shard=%d row=%s failed %s: %s", shard, row.id, *failures, said["error"])
        return outcome

    def _break(self, error: BaseException) -> None:
        with self._lock:
            self._broken = error
            for piece in self._open:
                piece.error = error
                piece.finished.set()
