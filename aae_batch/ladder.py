"""The tries of a row: which method and which noise each has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aae_batch.errors import SettingsError
from aae_batch.methods import METHODS
from aae_batch.request import Request

if TYPE_CHECKING:
    from aae_batch.manifest.row import Row

MOST_SEED = 2**63 - 1
"""That a table can hold."""

STRIDE = 1_000_003
"""Between the seeds of a method's tries. Rows of a prompt often have seeds in sequence: were it 1,
neighbours would end with the same picture."""


@dataclass(frozen=True)
class Rung:
    """A method of a ladder, and how many tries it has; the last rung has all that are left."""

    method: str
    tries: int = 1

    def __str__(self) -> str:
        return self.method if self.tries == 1 else f"{self.method}:{self.tries}"


@dataclass(frozen=True)
class Ladder:
    """Tries climb the rungs, cheap methods first.

    A method's first try has the row's own seed, and each further one a seed that is `STRIDE` more:
    every try of a method has other noise, and the first tries of all methods have the same. A row
    that names a method stays with it.

    Attributes:
        tries: the most tries of a row.
    """

    rungs: tuple[Rung, ...]
    tries: int

    @classmethod
    def of(cls, rungs: Sequence[str], tries: int) -> Ladder:
        """Parse rungs, each `method` or `method:tries`.

        Raises:
            SettingsError: a method is unknown or twice there, or a number does not fit.
        """
        ladder = cls(tuple(_rung(text) for text in rungs), tries)
        methods = [rung.method for rung in ladder.rungs]
        if len(set(methods)) < len(methods):
            raise SettingsError(
                f"--ladder {','.join(rungs)} names a method twice; write METHOD:TRIES for several tries."
            )
        if sum(rung.tries for rung in ladder.rungs) > tries:
            raise SettingsError(
                f"--ladder {','.join(rungs)} has more tries than --tries {tries} allows; give more."
            )
        return ladder

    def methods(self, own: str | None) -> list[str]:
        """Return the method of every try.

        Args:
            own: the method that the row names.
        """
        if own is not None:
            return [own] * self.tries
        found = [rung.method for rung in self.rungs for _ in range(rung.tries)]
        return found + [self.rungs[-1].method] * (self.tries - len(found))

    def request(self, row: Request, number: int) -> Request:
        """Return what try `number`, from 0, of a row asks for."""
        methods = self.methods(row.method)
        method = methods[number]
        further = STRIDE * methods[:number].count(method)
        seed = row.seed + further if row.seed <= MOST_SEED - further else row.seed - further
        return replace(row, method=method, seed=seed)

    def row(self, row: Row, number: int | None) -> Row:
        """Return a row as the try that was kept asks for it; None for a row without one."""
        return row if number is None else replace(row, request=self.request(row.request, number))

    def after(self, row: Request, number: int, hopeless: bool = False) -> int | None:
        """Return the number of the try after try `number`; None if that was the last.

        Args:
            hopeless: the method cannot make the row, whatever the noise, so that its other tries
                are left out.
        """
        methods = self.methods(row.method)
        left = range(number + 1, self.tries)
        return next((n for n in left if not hopeless or methods[n] != methods[number]), None)


def _rung(text: str) -> Rung:
    method, _, tries = text.partition(":")
    if method not in METHODS:
        raise SettingsError(f"--ladder {text}: unknown method; use {', '.join(METHODS)}.")
    if tries and not (tries.isdecimal() and int(tries) >= 1):
        raise SettingsError(f"--ladder {text}: write METHOD:TRIES, with TRIES from 1.")
    return Rung(method, int(tries or 1))
