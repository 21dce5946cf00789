"""A job's progress, as numbers and text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Tally:
    """Counts of finished rows. `failures` counts failed ones by `error_type`, `tries` their tries if
    rows are tried several times."""

    done: int = 0
    refinements: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    tries: int = 0

    @property
    def failed(self) -> int:
        return self.failures.total()

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Tally)))


@dataclass(frozen=True)
class Progress:
    """The state of a job at one moment.

    Attributes:
        total: the manifest's rows.
        before: rows that earlier runs finished.
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
        return self.before + self.now.done

    @property
    def images_per_second(self) -> float:
        return (self.now.done - self.now.failed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def mean_refinements(self) -> float:
        return self.now.refinements / max(1, self.now.done - self.now.failed)

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


def clock(seconds: float | None) -> str:
    """Format as `1:02:03`, or `--:--` if unknown."""
    if seconds is None:
        return "--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
