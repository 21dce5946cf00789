"""The progress of an output, from its listing and its job's records; no table is read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from aae_batch.dataset.layout import PARTIAL, PROGRESS, PROGRESS_SECONDS, SUMMARY, ProgressRecord
from aae_batch.dataset.run_record import Shards
from aae_batch.errors import counted

SILENT_AFTER = 4 * PROGRESS_SECONDS
"""Seconds without a new `progress.json` after which a job counts as stopped or hanging."""


@dataclass(frozen=True)
class Status:
    """The state of an output at one moment.

    Attributes:
        rows, shards: planned numbers.
        rows_done, shards_done: committed numbers.
        finished: finished rows, including those of shards in progress.
        failures: failed rows by `error_type`; None if unknown.
        images_per_second: of the running job, or of the last one if complete; None if unknown.
        eta: seconds left of the running job.
        complete: all shards are committed and the summary is written.
        notes: sentences on what is unknown or inconsistent.
    """

    rows: int
    shards: int
    rows_done: int
    shards_done: int
    finished: int
    failures: dict[str, int] | None
    images_per_second: float | None
    eta: float | None
    complete: bool
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.finished}/{self.rows} rows done, {self.rows - self.finished} left; "
            f"{self.shards_done}/{self.shards} shards committed ({counted(self.rows_done, 'row')})"
        ]
        if self.failures is not None:
            reasons = ", ".join(f"{count} x {kind}" for kind, count in self.failures.items())
            lines.append(f"{sum(self.failures.values())} failed{reasons and ': '}{reasons}")
        if self.images_per_second is not None:
            eta = "" if self.eta is None else f", ETA {timedelta(seconds=round(self.eta))}"
            lines.append(f"{self.images_per_second:.2f} images/s{eta}")
        lines += ["complete"] if self.complete else []
        return "\n".join([*lines, *self.notes])


def status(
    run: dict[str, Any],
    committed: Collection[int],
    progress: ProgressRecord | None,
    summary: dict[str, Any] | None,
    now: float,
    kept: int = 0,
) -> Status:
    """Return the state of an output.

    Args:
        run, progress, summary: the content of the output's files of these names; None if missing.
        committed: shards whose metadata is listed.
        now: seconds since 1970.
        kept: finished rows of incomplete shards that a stopped job has kept.
    """
    planned = Shards.of(run)
    done = {shard for shard in committed if shard < len(planned)}
    rows_done = sum(len(planned[shard]) for shard in done)
    all_there = len(done) == len(planned)
    complete = all_there and summary is not None
    notes = []
    finished, failures, speed, eta = rows_done, None, None, None
    if summary is not None and complete:
        failures = summary["failures"]
        speed = (summary.get("last_session") or {}).get("images_per_second")
    elif summary is not None:
        notes.append(f"{SUMMARY} exists but shards are missing: the next run generates them again.")
    if complete:
        pass
    elif progress is None:
        notes.append(f"There is no {PROGRESS}: failures and speed are unknown.")
    elif progress["rows"] != planned.rows:
        notes.append(
            f"{PROGRESS} covers {progress['rows']} rows, not {planned.rows}: it is ignored."
        )
    else:
        failures = progress["failures"]
        silent = now - datetime.fromisoformat(progress["time"]).timestamp()
        if silent < SILENT_AFTER:
            finished = max(rows_done, progress["done"])
            speed, eta = progress["images_per_second"], progress["eta_seconds"]
        else:
            notes.append(
                f"The job last reported {timedelta(seconds=round(silent))} ago: it has stopped or hangs. "
                "The same command resumes it."
            )
            if progress["done"] < rows_done:
                notes.append(
                    f"{rows_done - progress['done']} rows were committed after that; failures among "
                    "them are not counted."
                )
    if kept:
        notes.append(f"{kept} rows of incomplete shards are kept in {PARTIAL} for the next run.")
    if all_there and not complete:
        notes.append(f"Only {SUMMARY} is missing: the same command writes it.")
    counts = (planned.rows, len(planned), rows_done, len(done), finished)
    return Status(*counts, failures, speed, eta, complete, tuple(notes))
