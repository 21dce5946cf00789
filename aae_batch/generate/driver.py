"""A generation job: generate what is missing from a dataset, and count the result.

Only the driver reads the manifest. No image passes through it, except those of a bisected shard in
layouts that write images with the commit.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from functools import cached_property
from typing import Any

from ray.util.metrics import Gauge

from aae_batch.dataset import layout, partial
from aae_batch.dataset.layouts import Files, shard_of
from aae_batch.dataset.outcome import Outcome
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.rewriting import writing
from aae_batch.dataset.run_record import Shards, names_of_its_manifest
from aae_batch.dataset.writer import failed
from aae_batch.errors import JobError, ManifestError, ModelError, OutputError, RowError
from aae_batch.generate.dry_run import load_judge
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
from aae_batch.job.progress import Progress, reasons
from aae_batch.job.records import Loaded, as_json
from aae_batch.manifest.reader import Manifest, open_manifest
from aae_batch.sampling.model.loading import index_of
from aae_batch.store.lock import Lock
from aae_batch.store.open import open_storage

FEW_ROWS = 100
"""A share of failures is judged only after this many rows."""

logger = logging.getLogger("aae_batch.job")


def run_job(
    settings: JobSettings,
    on_progress: OnProgress = lambda progress: None,
    worker_class: type[GenerateWorker] = GenerateWorker,
) -> dict[str, Any]:
    """Generate what is missing from a dataset. Returns its summary, as in `summary.json`.

    Args:
        on_progress: called about once a second with the progress.
        worker_class: the class of the workers.

    Raises:
        AaeBatchError: the job cannot start or continue; the message says why.
        KeyboardInterrupt: a signal stopped it. The same call resumes it.
    """
    storage = open_storage(settings.output, settings.s3_endpoint)
    may_have = names_of_its_manifest(Dataset(storage).run)
    with open_manifest(settings.manifest, settings.s3_endpoint, may_have) as manifest:
        plan = make_plan(settings, manifest, storage)  # refuse before writing anything
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
            except OutputError as error:  # the job had started: it can resume once this is fixed
                raise JobError(str(error)) from error


def refuse_unless_some_row_is_good(settings: JobSettings, manifest: Manifest) -> None:
    """Fail early if the job could not generate a single image.

    Checks rows only until the first good one, which is usually the first row.

    Raises:
        ManifestError: every row would fail.
        ModelError: the model is here, and incomplete.
        SettingsError: the run's negative prompt has words that the model does not know.
    """
    try:
        index = index_of(
            settings.model, revision=settings.revision, s3_endpoint=settings.s3_endpoint
        )
    except ModelError:  # the model may exist only on the actors' machines; if not, they report it
        return
    judge = load_judge(settings, index)
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
    """Generate what is left, and return the summary."""
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
            f"manifest {job.plan.rows}: run `aae-batch verify` to see which differ."
        )
    storage.write_bytes(layout.SUMMARY, as_json(summary))
    return summary


class GenerateJob(Job[Outcome]):
    """Generates the rows of a manifest."""

    settings: JobSettings
    plan: Plan
    keeping_seconds = 20.0

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
        self.partial_files = self._partial_files()

    @cached_property
    def _earlier(self) -> Counter[str]:
        """Failures of earlier runs; none if failed rows are generated again."""
        return Counter() if self.plan.again else earlier_failures(self.dataset)

    def write_run(self, loaded: Loaded) -> None:
        begin(self.storage, self.run)

    def task(self, piece: Piece, commit: bool) -> GenerateTask:
        part = self._unique_files.part(piece.start, piece.stop)
        keep = piece.shard in self.plan.again
        files = tuple(self.partial_files.get(piece.shard, ()))
        return GenerateTask(piece, self.run["fingerprint"], commit, part, keep, files)

    @cached_property
    def _unique_files(self) -> Manifest:
        """The manifest, in which ids are the same if their images would be one file."""
        are_files = self.run["layout"] == Files.layout
        # another name is the same file where the disk does not tell case
        is_one = are_files and self.storage.exists(layout.RUN.upper())
        return self.manifest.folding_case() if is_one else self.manifest

    def commit(self, shard: int, outcomes: list[Outcome]) -> None:
        places = Shards.of(self.run)[shard]
        extras = self.manifest.part(places.start, places.stop).extras
        into = shard_of(self.run, self.storage, shard)
        if shard not in self.plan.again:
            into.commit(outcomes, extras)
        else:
            new = {outcome.index: outcome for outcome in outcomes}
            stored = into.stored_outcomes(places.start)
            into.recommit([new.get(outcome.index, outcome) for outcome in stored], extras)
        partial.discard(self.storage, self.partial_files.get(shard, ()))

    def _partial_files(self) -> dict[int, partial.Files]:
        """Return what is kept of shards that are not complete, as `partial.kept` does; delete what is of
        no more use."""
        if not self.begun:
            return {}
        place, mark = self.storage.place, self.run["fingerprint"]
        found = partial.kept(
            self.storage,
            mark,
            lambda name: logger.warning("%s is not of this run, or damaged: ignored", place(name)),
        )
        complete = self.plan.committed.difference(self.plan.again).intersection(found)
        for shard in complete.difference(partial.made_again(self.dataset, found)):
            partial.discard(self.storage, found[shard])
        return {shard: files for shard, files in found.items() if shard not in complete}

    def keep(self, shard: int, outcomes: list[Outcome]) -> None:
        partial.keep(shard_of(self.run, self.storage, shard), outcomes)

    def rows_kept(self) -> int:
        found = self._partial_files().items()
        kept = {shard: partial.statuses(files) for shard, files in found}
        for shard, rows in self.plan.again.items():  # those that fail again are not taken up
            if shard in kept:
                kept[shard] = {row: "ok" for row in rows if kept[shard].get(row) == "ok"}
        return sum(map(len, kept.values()))

    def give_up(self, piece: Piece, words: str) -> tuple[list[Outcome], str]:
        (row,) = self.manifest.part(piece.start, piece.stop).rows()
        error = RowError(row.id, f"its process died twice while it was generated alone: {words}")
        logger.error("shard=%d row=%s failed %s: %s", piece.shard, row.id, GAVE_UP, words)
        return [failed(row, self.settings.guidance, error, kind=GAVE_UP)], str(error)

    def publish(self, progress: Progress) -> None:
        """Write `progress.json` and update the metrics."""
        self._speed.set(progress.images_per_second)
        if not self.begun:
            return
        record = progress_record(progress, self._earlier + progress.now.failures, time.time())
        try:
            self.storage.write_bytes(layout.PROGRESS, as_json(record))
        except OutputError as error:  # progress is not part of the dataset, so continue
            logger.warning("cannot write progress: %s", error)

    @cached_property
    def _speed(self) -> Gauge:
        return Gauge("aae_batch_images_per_second", "Of the whole job.")

    def judge(self, progress: Progress) -> None:
        """Stop a job with too many failures, or whose manifest has changed."""
        if self.manifest.changed:
            raise JobError(
                f"{self.manifest.path} was changed while its rows were generated: finished rows come from "
                "the original manifest. Restore it and run the same command again, or choose another "
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
                f"({f'{limit:.0%}' if share else limit}) allows: "
                f"{'; '.join(reasons(now.failures, now.examples))}."
            )
