"""The generating worker: one model whose slots stay full from one piece to the next."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from aae_batch.dataset import partial
from aae_batch.dataset.image_format import ImageFormat
from aae_batch.dataset.layout import metadata_name
from aae_batch.dataset.layouts import shard_of
from aae_batch.dataset.outcome import Outcome
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.writer import Shard, failed
from aae_batch.errors import DroppedError, RowError, SettingsError
from aae_batch.evaluate.settings import weights_of
from aae_batch.generate.acceptance import Acceptance
from aae_batch.generate.jury import AT_ONCE, Jury, Trial
from aae_batch.generate.settings import JobSettings
from aae_batch.generate.writers import MOST, Writers
from aae_batch.job.metrics import WorkerMetrics
from aae_batch.job.progress import Tally
from aae_batch.job.records import Loaded
from aae_batch.job.worker import Task, Worker, WorkerContext
from aae_batch.manifest.reader import Part
from aae_batch.manifest.row import Row
from aae_batch.methods import METHODS, load_plugins
from aae_batch.request import Request, Result
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.model.weights import lora_digests, weights_digest

if TYPE_CHECKING:
    from aae_batch.sampling.engine import Batch, Engine

logger = logging.getLogger("aae_batch.worker")


@dataclass(frozen=True)
class GenerateTask(Task):
    """A piece with its part of the manifest. Invalid rows are only recorded as failed.

    Attributes:
        keep: return images with the outcomes instead of writing them, in every layout.
        partial_files: those with rows that an earlier run had finished; see `dataset/partial.py`.
    """

    part: Part
    keep: bool
    partial_files: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Flight:
    """A row in progress, and its future outcome.

    Attributes:
        trial: its tries, if the run has judges.
    """

    task: GenerateTask
    row: Row
    trial: Trial | None = None
    outcome: Future[Outcome | None] = field(default_factory=Future)  # None: the job stops first

    @property
    def request(self) -> Request:
        return self.row.request if self.trial is None else self.trial.request

    @property
    def how(self) -> dict[str, Any]:
        return {} if self.trial is None else {"give_up_below": self.trial.give_up_below}


_Finished: TypeAlias = tuple[_Flight, Row, Result]
"""What is written of a row: of its tries, the one that is kept."""


def together(requests: Sequence[Request], config: GuidanceConfig) -> list[Request]:
    """Sort requests by method, because a batch with many methods runs the kernels of all their
    objectives in each pass."""
    order = list(METHODS)
    return sorted(requests, key=lambda request: order.index(request.method or config.method))


class GenerateWorker(Worker[Outcome]):
    """Generates pieces of shards. The engine runs in its own thread and takes rows from all
    pieces in progress, in order."""

    settings: JobSettings

    def __init__(self, context: WorkerContext) -> None:
        super().__init__(context)
        self._incoming: queue.SimpleQueue[_Flight] = queue.SimpleQueue()
        self._sampling: set[_Flight] = set()  # in `_incoming` or in the engine
        # Images wait in memory until they are judged and written; the engine blocks when too many wait.
        self._unjudged: queue.Queue[tuple[_Flight, Result]]
        self._writers: Writers[_Finished]
        self._rule: Acceptance | None = None
        self._image_format = ImageFormat(**context.run["image_format"])
        self._broken: BaseException | None = None
        self._stopping = False

    def load(self) -> Loaded:
        """Load the model, and start the engine and writer threads."""
        self._refuse_other_methods(load_plugins(self.settings.plugin))
        self.set_torch_threads()
        self.metrics = WorkerMetrics()
        self._rule = self.settings.acceptance  # now that plugins' methods are known
        engine = self.load_engine()
        jury = None
        if self._rule is not None:  # beside the model, before slots are measured
            self._refuse_other_judges(self._rule)
            device = self.settings.judge_device or str(engine.model.device)
            jury = Jury(self._rule, self._image_format, device)
        # Check the settings against this model now, not with the first row.
        with engine.open(self.settings.guidance) as batch:
            slots = batch.slots  # so many may be finished at once
        self._unjudged = queue.Queue(AT_ONCE + slots)
        self._writers = Writers(self._write, MOST + slots)
        if jury is not None:
            threading.Thread(target=self._judge, args=(jury,), name="judges", daemon=True).start()
        threading.Thread(target=self._sample, args=(engine,), name="engine", daemon=True).start()
        return Loaded.of(engine.model)

    def _refuse_other_methods(self, versions: Mapping[str, str]) -> None:
        begun_with = self.context.run["settings"].get("plugin_versions", {})
        for method, version in begun_with.items():
            if versions.get(method) != version:
                raise SettingsError(
                    f"The method {method} on this machine is not the one that the run was begun with; "
                    "install the same plugin on every machine."
                )

    def _refuse_other_judges(self, rule: Acceptance) -> None:
        begun_with = self.context.run["settings"]["acceptance"]["judges"]
        for name, metric in rule.metrics.items():
            for model, digest in weights_of(metric, self.settings.s3_endpoint).items():
                self.refuse_other_weights(model, digest, begun_with[name]["weights"][model])

    def load_engine(self) -> Engine:
        from aae_batch.sampling.engine import Engine
        from aae_batch.sampling.model.compiled import PATIENCE
        from aae_batch.sampling.model.loading import load_pipeline

        s, run = self.settings, self.context.run["settings"]
        self.refuse_other_weights(s.model, weights_digest(s.model, s.s3_endpoint), run["weights"])
        for lora, digest in lora_digests(s.lora, s.s3_endpoint).items():
            self.refuse_other_weights(lora, digest, run["lora_weights"].get(lora))
        pipe = load_pipeline(
            s.model,
            revision=s.revision,
            variant=s.variant,
            lora=s.lora,
            device=s.device,
            dtype=s.dtype,
            s3_endpoint=s.s3_endpoint,
        )
        engine = Engine.from_pipeline(pipe, s.slots)
        if s.compile:
            engine.model.compile(PATIENCE, self._tell)
        return engine

    def _tell(self, text: str) -> None:
        logger.info(text)
        what, _, more = text.partition("; ")
        with self._lock:
            for piece in list(self._tallies)[:1]:
                self._tallies[piece] += Tally(examples={what: more})

    def work(self, task: GenerateTask) -> list[Outcome] | None:
        """Generate a piece, and commit it if it is a shard.

        A shard already committed, by a worker that died before reporting it, is only counted. If
        the engine breaks, images that it has finished are written first. If the job stops, finished rows
        are kept.
        """
        if task.commit and self.storage.exists(metadata_name(task.piece.shard)):
            self.count(task.piece, self._committed(task.piece.shard))
            partial.discard(self.storage, task.partial_files)
            return []
        before = self._before(task)
        rows = [row for row in task.part.rows() if row.index not in before]
        bad = [failed(row, self.settings.guidance) for row in rows if row.error is not None]
        self.count(task.piece, _tally([outcome.metadata for outcome in bad]))
        good = {id(row.request): row for row in rows if row.error is None}
        requests = together([row.request for row in good.values()], self.settings.guidance)
        flights = [self._flight(task, good[id(request)]) for request in requests]
        with self._lock:
            if self._broken is not None:
                raise self._broken
            self._sampling.update(flights)
            for flight in flights:
                self._incoming.put(flight)
        wait([flight.outcome for flight in flights])
        made = [flight.outcome.result() for flight in flights]
        finished = bad + [outcome for outcome in made if outcome is not None]
        if len(finished) < len(rows):
            partial.keep(self._shard(task), finished)
            return None
        outcomes = [*before.values(), *finished]
        if task.commit:
            self._shard(task).commit(outcomes, task.part.extras)
            partial.discard(self.storage, task.partial_files)
        return outcomes

    def _before(self, task: GenerateTask) -> dict[int, Outcome]:
        """Return, by row, what an earlier run that was stopped had finished of a piece."""
        rows = range(task.piece.start, task.piece.stop)
        found, damaged = partial.take_up(self._shard(task), task.partial_files, rows)
        if task.keep:  # it is to generate failed rows again
            found = {index: outcome for index, outcome in found.items() if not outcome.failed}
        self.count(task.piece, Tally(before=len(found)))
        for name in damaged:
            told = f"{name} is damaged; its rows are generated again"
            self.count(task.piece, Tally(examples={"warning": told}))
        return found

    def stop(self, grace: float) -> None:
        """Begin no more rows, and wait `grace` seconds for those that have begun."""
        self._stopping = True
        timer = threading.Timer(grace, self._let_go)
        timer.daemon = True
        timer.start()

    def _let_go(self, flights: Iterable[_Flight] | None = None) -> None:
        """Stop waiting for rows; by default for all that are not finished."""
        with self._lock:
            let_go = self._sampling.intersection(self._sampling if flights is None else flights)
            for flight in let_go:
                flight.outcome.set_result(None)
            self._sampling -= let_go

    def _flight(self, task: GenerateTask, row: Row) -> _Flight:
        return _Flight(task, row, None if self._rule is None else Trial(self._rule, row))

    def _committed(self, shard: int) -> Tally:
        columns = ["error_type", "error", "num_refinements"]
        return _tally(Dataset(self.storage).table(shard, columns).to_pylist())

    def _sample(self, engine: Engine) -> None:
        try:
            with engine.open(self.settings.guidance) as batch:
                flying: dict[str, _Flight] = {}
                ahead: deque[_Flight] = deque()
                expected = 0  # how many of those ahead, from the first, have announced their texts
                while True:
                    for flight in self._arrived(wait=not flying and not ahead):
                        if flight.trial is not None and flight.trial.tries:
                            ahead.appendleft(flight)  # tried again: it has the next free slot
                            expected += expected > 0  # and most often the texts that it had
                        else:
                            ahead.append(flight)
                    if self._stopping:
                        self._let_go(ahead)
                        ahead.clear()
                        expected = 0
                    while batch.free and ahead:
                        if expected == 0:
                            expected = batch.expect(flight.request for flight in ahead)
                        expected -= 1
                        flight = ahead.popleft()
                        try:
                            self.admit(batch, flight.request, **flight.how)
                        except RowError as error:
                            self._finish(flight, Result(flight.request, error=error))
                        else:
                            flying[flight.row.id] = flight
                    for result in batch.step():
                        self._finish(flying.pop(result.request.name), result)
                    self.metrics.totals(batch.seconds)
                    waiting = len(ahead) + self._incoming.qsize()
                    self.metrics.load(batch.slots, len(batch), waiting, self._writers.waiting)
        except BaseException as error:
            self._break(error)

    def _break(self, error: BaseException) -> None:
        """Fail every row in progress; the worker is of no use any more."""
        with self._lock:
            self._broken = self._broken or error
            for flight in self._sampling:
                flight.outcome.set_exception(error)
            self._sampling.clear()

    def _arrived(self, wait: bool) -> list[_Flight]:
        """Return the rows that have come in; waits for one if `wait`."""
        flights = [self._incoming.get()] if wait else []
        while not self._incoming.empty():
            flights.append(self._incoming.get())
        return flights

    def admit(self, batch: Batch, request: Request, **how: Any) -> None:
        """Give `request` a slot.

        Args:
            how: as for `Batch.add`.

        Raises:
            RowError: it cannot be sampled.
        """
        batch.add(request, **how)

    def _finish(self, flight: _Flight, result: Result) -> None:
        if flight.trial is None:
            self._to_write(flight, flight.row, result)
        else:
            self._unjudged.put((flight, result))

    def _to_write(self, flight: _Flight, row: Row, result: Result) -> None:
        with self._lock:
            if flight not in self._sampling:  # the worker is broken
                return
            self._sampling.remove(flight)
        self._writers.put((flight, row, result))

    def _judge(self, jury: Jury) -> None:
        """Judge what is finished, all that waits together, and send rows back or on to be written."""
        try:
            while True:
                waiting = [self._unjudged.get()]
                while len(waiting) < AT_ONCE and not self._unjudged.empty():
                    waiting.append(self._unjudged.get())
                seen = [
                    (replace(flight.row, request=result.request), result)
                    for flight, result in waiting
                    if result.image is not None
                ]
                verdicts = iter(jury.judge(seen) if seen else ())
                for flight, result in waiting:
                    assert flight.trial is not None
                    verdict = next(verdicts) if result.image is not None else None
                    self.count(flight.task.piece, Tally(tries=1))  # a sign of life
                    if flight.trial.end(result, verdict, self._image_format):
                        self._to_write(flight, *flight.trial.verdict())
                    else:
                        self._incoming.put(flight)
        except BaseException as error:
            self._break(error)

    def _write(self, finished: _Finished) -> tuple[float, float]:
        """Write an image. Returns the seconds of encoding and of uploading."""
        flight, row, result = finished
        seconds = {"encode": 0.0, "upload": 0.0}
        try:
            flight.outcome.set_result(self._outcome(flight, row, result, seconds))
        except BaseException as error:
            flight.outcome.set_exception(error)
        return seconds["encode"], seconds["upload"]

    def _outcome(
        self, flight: _Flight, row: Row, result: Result, seconds: dict[str, float]
    ) -> Outcome:
        task, tries = flight.task, flight.trial.tries if flight.trial else ()
        outcome = self._shard(task).write_image(
            row, result, self.settings.guidance, task.keep, seconds.__setitem__, tries
        )
        for phase, spent in seconds.items():
            self.metrics.spent(phase, spent)
        said = outcome.metadata
        counted = _tally([said])
        self.count(task.piece, counted)
        self.metrics.row(said["status"], counted.refinements)
        for kind, reason in counted.examples.items():
            logger.warning("shard=%d row=%s failed %s: %s", task.piece.shard, row.id, kind, reason)
        return outcome

    def _shard(self, task: GenerateTask) -> Shard:
        run = {**self.context.run, "fingerprint": task.fingerprint}
        return shard_of(run, self.storage, task.piece.shard)


def _tally(rows: Sequence[Mapping[str, Any]]) -> Tally:
    """Count rows of the metadata table."""
    failed = [row for row in rows if row.get("error_type")]
    failures = [row for row in failed if row["error_type"] != DroppedError.__name__]
    refinements = sum(row.get("num_refinements") or 0 for row in rows)
    ended = Tally(len(rows) - len(failures), refinements, dropped=len(failed) - len(failures))
    return ended + Tally.of_failures(failures)
