"""A generation job: what is missing of a dataset is made, and counted.

The driver alone reads the manifest. No picture passes through it but those of a bisected shard, in the
layouts that write pictures with the commit.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from functools import cached_property
from typing import Any

from ray.util.metrics import Gauge

from aae_batch.dataset import layout
from aae_batch.dataset.layouts import shard_of
from aae_batch.dataset.outcome import Outcome
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.rewriting import writing
from aae_batch.dataset.run_record import Shards
from aae_batch.dataset.writer import failed
from aae_batch.errors import JobError, ManifestError, ModelError, OutputError, RowError
from aae_batch.generate.records import (
    Plan,
    begin,
    earlier_failures,
    make_plan,
    progress_record,
    summarize,
)
from aae_batch.generate.settings import JobSettings
from aae_batch.generate.worker import GenerateTask, GenerateWorker
from aae_batch.job.driver import GAVE_UP, Job, OnProgress, run_on_workers
from aae_batch.job.plan import Piece
from aae_batch.job.progress import Progress
from aae_batch.job.records import Loaded, as_json
from aae_batch.manifest.judge import Judge
from aae_batch.manifest.reader import Manifest, open_manifest
from aae_batch.store.lock import Lock
from aae_batch.store.open import open_storage

FEW_ROWS = 100
"""A share of failures is only judged once so many rows are done."""

logger = logging.getLogger("aae_batch.job")


def run_job(
    settings: JobSettings,
    on_progress: OnProgress = lambda progress: None,
    worker_class: type[GenerateWorker] = GenerateWorker,
) -> dict[str, Any]:
    """Generate what is missing of a dataset. Returns its summary, as in `summary.json`.

    Args:
        on_progress: is told about once a second how far the job is.
        worker_class: what the workers are.

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
            dataset = Dataset(storage)
            if settings.retry_failed:
                plan = plan.retrying(dataset)
            try:
                job = GenerateJob(settings, plan, manifest, dataset, worker_class)
                return _finish(job, lock, on_progress)
            except OutputError as error:  # the job was under way: it can go on when that is fixed
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


def _finish(job: GenerateJob, lock: Lock, on_progress: OnProgress) -> dict[str, Any]:
    """Generate what is left, and count what is there."""
    storage, session = job.storage, None
    if not job.plan.ledger().finished:
        storage.delete(layout.SUMMARY)
        made = run_on_workers(job, lock, on_progress)
        session = {
            "rows": made.now.done,
            "seconds": round(made.seconds, 1),
            "images_per_second": round(made.images_per_second, 3),
        }
    elif (counted := job.dataset.summary) is not None and counted["rows"] == job.plan.rows:
        return counted
    summary = summarize(job.dataset, session)
    if summary["rows"] != job.plan.rows:
        raise OutputError(
            f"The tables in {storage.place(layout.METADATA)} have {summary['rows']} rows, and the "
            f"manifest {job.plan.rows}: see what `aae-batch verify` says of it."
        )
    storage.write_bytes(layout.SUMMARY, as_json(summary))
    return summary


class GenerateJob(Job[Outcome]):
    """Generates the rows of a manifest."""

    settings: JobSettings
    plan: Plan

    def __init__(
        self,
        settings: JobSettings,
        plan: Plan,
        manifest: Manifest,
        dataset: Dataset,
        worker_class: type[GenerateWorker] = GenerateWorker,
    ) -> None:
        super().__init__(settings, plan, dataset, worker_class)
        self.model = settings.model
        self.manifest = manifest

    @cached_property
    def _earlier(self) -> Counter[str]:
        """Where failed rows are made again, none has failed yet."""
        return Counter() if self.plan.again else earlier_failures(self.dataset)

    def write_run(self, loaded: Loaded) -> None:
        begin(self.storage, self.run)

    def task(self, piece: Piece, commit: bool) -> GenerateTask:
        part = self.manifest.part(piece.start, piece.stop)
        keep = piece.shard in self.plan.again
        return GenerateTask(piece, self.run["fingerprint"], commit, part, keep)

    def commit(self, shard: int, outcomes: list[Outcome]) -> None:
        places = Shards.of(self.run)[shard]
        extras = self.manifest.part(places.start, places.stop).extras
        into = shard_of(self.run, self.storage, shard)
        if shard not in self.plan.again:
            into.commit(outcomes, extras)
            return
        new = {outcome.index: outcome for outcome in outcomes}
        kept = [new.get(outcome.index, outcome) for outcome in into.stored_outcomes(places.start)]
        into.recommit(kept, extras)

    def give_up(self, piece: Piece, words: str) -> list[Outcome]:
        (row,) = self.manifest.part(piece.start, piece.stop).rows()
        error = RowError(row.id, f"its process died twice while it was generated alone: {words}")
        logger.error("shard=%d row=%s failed %s: %s", piece.shard, row.id, GAVE_UP, words)
        return [failed(row, self.settings.guidance, error, kind=GAVE_UP)]

    def publish(self, progress: Progress) -> None:
        """In `progress.json`, and in the metrics."""
        self._speed.set(progress.images_per_second)
        if not self.begun:
            return
        record = progress_record(progress, self._earlier + progress.now.failures, time.time())
        try:
            self.storage.write_bytes(layout.PROGRESS, as_json(record))
        except OutputError as error:  # it is news, and no part of the dataset
            logger.warning("progress is not told: %s", error)

    @cached_property
    def _speed(self) -> Gauge:
        return Gauge("aae_batch_images_per_second", "Of the whole job.")

    def judge(self, progress: Progress) -> None:
        """Stop a job that is failing everywhere, or whose manifest is not what it was."""
        if self.manifest.changed:
            raise JobError(
                f"{self.manifest.path} was changed while its rows were generated: what is done is of the "
                "manifest as it was. Put that back and run the same command again, or choose another "
                "output for the new one."
            )
        limit, now = self.settings.max_failures, progress.now
        if limit is None:
            return
        share = isinstance(limit, float)
        allowed = limit * now.done if share else limit
        if now.failed > allowed and (not share or now.done >= FEW_ROWS):
            raise JobError(
                f"{now.failed} of {now.done} rows failed, more than max_failures "
                f"({f'{limit:.0%}' if share else limit}) allows; see the column error in "
                f"{self.storage.place(layout.METADATA)}."
            )
