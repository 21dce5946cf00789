"""A generation job: what is missing of a dataset is made, and counted.

The driver alone reads the manifest. No picture passes through it but those of a shard that was halved,
in the layouts that write pictures with the commit.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from aae_batch.dataset import layout, writer
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.rewriting import writing
from aae_batch.dataset.stored import stored_outcomes
from aae_batch.errors import JobError, ManifestError, ModelError, OutputError, RowError
from aae_batch.generate.records import (
    Loaded,
    Plan,
    as_json,
    begin,
    check_loaded,
    earlier_failures,
    make_plan,
    progress_record,
    resolved,
    summarize,
)
from aae_batch.generate.settings import JobSettings
from aae_batch.generate.worker import Task, Worker, WorkerSettings
from aae_batch.job.cluster import ActorPlan, Stop, cluster, stop_on_signals
from aae_batch.job.crew import Crew, Event, RayCrew, Ready
from aae_batch.job.metrics import DriverMetrics
from aae_batch.job.plan import Ledger, Piece
from aae_batch.job.progress import Progress, Tally
from aae_batch.job.supervisor import GAVE_UP, Supervisor
from aae_batch.manifest.judge import Judge
from aae_batch.manifest.reader import Manifest, open_manifest
from aae_batch.store.base import Storage
from aae_batch.store.lock import Lock
from aae_batch.store.open import open_storage

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
        plan = make_plan(settings, manifest, storage)  # refuse before anything is made
        if not plan.begun:
            refuse_unless_some_row_is_good(settings, manifest)
        with writing(storage) as lock:
            plan = make_plan(settings, manifest, storage)
            if settings.retry_failed:
                plan = plan.retrying(Dataset(storage))
            try:
                return _finish(settings, plan, manifest, storage, lock, report, worker_class)
            except OutputError as error:  # the job was under way: it can go on when that is mended
                raise JobError(str(error)) from error


def refuse_unless_some_row_is_good(settings: JobSettings, manifest: Manifest) -> None:
    """End at once a job of which not one picture would come.

    Rows are judged until a good one is found, which mostly is the first.

    Raises:
        ManifestError: every row would fail.
        SettingsError: the run's negative prompt has words that the model does not know.
    """
    try:
        judge = Judge.load(
            settings.model,
            settings.guidance,
            revision=settings.revision,
            s3_endpoint=settings.s3_endpoint,
        )
    except ModelError:  # it may be on the actors' machines alone; else they say what is wrong
        return
    first = None
    for row in manifest.rows():
        error = judge.error_of(row)
        if error is None:
            return
        first = first or error
    if first is not None:
        raise ManifestError(
            f"No row of {settings.manifest} can be generated with the model {settings.model}; "
            f"the first: {first}."
        )


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
    dataset = Dataset(storage)
    if not ledger.finished:
        storage.delete(layout.SUMMARY)
        with cluster(settings) as actors, stop_on_signals(settings.grace) as stop:
            worker = worker_settings(settings, plan, storage, lock, actors.threads)
            crew = RayCrew(worker_class, worker, actors)
            session = Foreman(
                settings, plan, manifest, storage, ledger, crew, actors, report, stop, lock
            ).run()
    elif (counted := dataset.summary) is not None and counted["rows"] == len(manifest):
        return counted
    summary = summarize(dataset, session)
    if summary["rows"] != len(manifest):
        raise OutputError(
            f"The tables in {storage.place(layout.METADATA)} have {summary['rows']} rows, and the "
            f"manifest {len(manifest)}: see what `aae-batch verify` says of it."
        )
    storage.write_bytes(layout.SUMMARY, as_json(summary))
    return summary


def worker_settings(
    settings: JobSettings, plan: Plan, storage: Storage, lock: Lock, threads: int | None
) -> WorkerSettings:
    return WorkerSettings(
        model=settings.model,
        revision=settings.revision,
        device=settings.device,
        dtype=settings.dtype,
        slots=settings.slots,
        guidance=settings.guidance,
        root=storage.root,
        lease=lock.token,
        weights=plan.run["settings"]["weights"],
        layout=plan.layout,
        image_format=plan.image_format,
        threads=threads,
        s3_endpoint=settings.actors_s3_endpoint,
    )


class Foreman(Supervisor[writer.Outcome]):
    """Keeps a crew at work until every shard is committed."""

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
        super().__init__(
            settings, len(manifest), settings.model, ledger, crew, actors, report, stop, lock
        )
        self.settings = settings
        self.plan = plan
        self.run_record = plan.run
        self.begun = plan.begun
        self.manifest = manifest
        self.storage = storage
        self.metrics = DriverMetrics()
        # Where failed rows are made again, none has failed yet.
        self._earlier = Counter() if plan.again else earlier_failures(Dataset(storage))

    def _hear(self, event: Event) -> None:
        if isinstance(event, Ready):
            self._begin(event.loaded)
        super()._hear(event)

    def _begin(self, loaded: Loaded) -> None:
        """The run begins with the first actor that has loaded the model: until then nothing is
        written, and what the settings leave open is not known."""
        if not self.begun:
            self.run_record = resolved(self.plan.run, loaded)
            begin(self.storage, self.run_record)
            self.begun = True
        check_loaded(self.run_record, loaded)

    def _task(self, piece: Piece) -> Task:
        return Task(
            piece,
            self.manifest.part(piece.start, piece.stop),
            self.run_record["fingerprint"],
            commit=self.ledger.is_whole(piece),
            keep=piece.shard in self.plan.again,
        )

    def _return(self, piece: Piece, outcomes: list[writer.Outcome]) -> None:
        """Commit a shard that came in parts, once the last of them is there."""
        made = self.ledger.returned(piece, outcomes)
        if made is None:
            return
        shard, size = piece.shard, self.plan.shard_size
        start, stop = shard * size, min((shard + 1) * size, len(self.manifest))
        extras = self.manifest.part(start, stop).extras
        form = (self.run_record["fingerprint"], self.plan.layout, self.plan.image_format)
        write = writer.commit
        if shard in self.plan.again:
            write = writer.recommit
            kept = stored_outcomes(Dataset(self.storage), shard, start, self.plan.layout)
            new = {outcome.index: outcome for outcome in made}
            made = [new.get(outcome.index, outcome) for outcome in kept]
        write(self.storage, shard, made, extras, *form)

    def _give_up(self, piece: Piece, words: str) -> None:
        (row,) = self.manifest.part(piece.start, piece.stop).rows()
        reason = f"its process died twice while it was generated alone: {words}"
        logger.error("shard=%d row=%s failed %s: %s", piece.shard, row.id, GAVE_UP, words)
        outcome = writer.failed(row, self.settings.guidance, RowError(row.id, reason), kind=GAVE_UP)
        self.finished += Tally(done=1, failures=Counter([GAVE_UP]))
        self._return(piece, [outcome])

    def _tell(self) -> None:
        """Say how far the job is: in `progress.json`, and in the metrics."""
        progress = self.progress()
        self.metrics.speed(progress.images_per_second)
        if not self.begun:
            return
        record = progress_record(progress, self._earlier + progress.now.failures, time.time())
        try:
            self.storage.write_bytes(layout.PROGRESS, as_json(dict(record)))
        except OutputError as error:  # it is news, and no part of the dataset
            logger.warning("progress is not told: %s", error)

    def _judge(self) -> None:
        """Stop a job that is failing everywhere, or whose manifest is not what it was."""
        if self.manifest.changed:
            raise JobError(
                f"{self.manifest.path} was changed while its rows were generated: what is done is of the "
                "manifest as it was. Put that back and run the same command again, or choose another "
                "output for the new one."
            )
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
