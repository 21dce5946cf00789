"""A job's progress, as numbers and text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LONGEST_REASON = 300
"""Characters of an error that are shown."""


@dataclass(frozen=True)
class Tally:
    """Counts of finished rows.

    Attributes:
        done: finished rows, failed and dropped ones too.
        failures: failed rows by `error_type`.
        examples: what the first failed row of each `error_type` says, or what else is to be told once.
        dropped: rows that were left out on purpose: neither images nor failures.
        tries: their tries, if rows are tried several times.
        before: rows that an earlier run had finished, of shards that it did not complete.
    """

    done: int = 0
    refinements: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    dropped: int = 0
    tries: int = 0
    before: int = 0

    @classmethod
    def of_failures(cls, rows: Sequence[Mapping[str, Any]]) -> Tally:
        """Count failed rows, each with its `error_type` and `error`."""
        kinds = [row["error_type"] for row in rows]
        examples = {row["error_type"]: row["error"] for row in reversed(rows)}
        return cls(len(rows), failures=Counter(kinds), examples=examples)

    @property
    def failed(self) -> int:
        return self.failures.total()

    @property
    def images(self) -> int:
        return self.done - self.failed - self.dropped

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.done + other.done,
            self.refinements + other.refinements,
            self.failures + other.failures,
            other.examples | self.examples,
            self.dropped + other.dropped,
            self.tries + other.tries,
            self.before + other.before,
        )


@dataclass(frozen=True)
class Progress:
    """The state of a job at one moment.

    Attributes:
        total: the manifest's rows.
        before: rows of the shards that earlier runs completed.
        now: rows that this run finished.
        seconds: since the first worker was ready.
    """

    total: int
    before: int
    now: Tally
    seconds: float

    @property
    def started(self) -> bool:
        """True once a worker has been ready."""
        return self.seconds > 0

    @property
    def done(self) -> int:
        return self.before + self.now.before + self.now.done

    @property
    def images_per_second(self) -> float:
        return self.now.images / self.seconds if self.seconds > 0 else 0.0

    @property
    def mean_refinements(self) -> float:
        return self.now.refinements / max(1, self.now.images)

    @property
    def eta(self) -> float | None:
        """Seconds left; None before the first row."""
        if not self.now.done:
            return None
        return (self.total - self.done) * self.seconds / self.now.done

    def __str__(self) -> str:
        tries = (
            f"{self.now.tries / self.now.done:.1f} tries a row, "
            if self.now.tries and self.now.done
            else ""
        )
        return (
            f"{self.done}/{self.total} rows, {self.images_per_second:.2f} images/s, "
            f"{self.now.failed} failed, {tries}{self.mean_refinements:.1f} refinements an image, "
            f"ETA {clock(self.eta)}"
        )


def reasons(failures: Mapping[str, int], examples: Mapping[str, str]) -> list[str]:
    """Say of each reason how many rows failed for it, and what one says: `3 x RowError, e.g. row 17: ...`."""

    def told(kind: str) -> str:
        return f", e.g. {shortened(examples[kind])}" if kind in examples else ""

    return [f"{count} x {kind}{told(kind)}" for kind, count in failures.items()]


def shortened(reason: str) -> str:
    """Return an error's message in one line, without its end if it is long."""
    text = " ".join(reason.split()).rstrip(".")
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def clock(seconds: float | None) -> str:
    """Format as `1:02:03`, or `--:--` if unknown."""
    if seconds is None:
        return "--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
