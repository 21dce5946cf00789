"""Finds duplicate ids among tens of millions of rows in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Repeats:
    """Rows that repeat the id of an earlier row.

    Attributes:
        rows: their positions, ascending.
        firsts: for each, the first row with the same id.
    """

    rows: np.ndarray
    firsts: np.ndarray

    @classmethod
    def among(cls, ids: Callable[[], Iterable[list[str]]]) -> Repeats:
        """Find duplicates by a 128-bit hash, whose second 64 bits are computed only if the first 64
        bits of any ids collide.

        Args:
            ids: returns all ids in order, as an iterable of lists; may be called twice.
        """
        hashes = _hashes(ids(), "")
        ordered = np.sort(hashes)
        doubtful = np.flatnonzero(np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]]))
        del ordered
        if len(doubtful) == 0:
            return cls(doubtful, doubtful)
        rows, firsts = repeated(hashes[doubtful], _hashes(ids(), "\0")[doubtful])
        return cls(doubtful[rows], doubtful[firsts])

    def within(self, start: int, stop: int) -> dict[int, int]:
        """Return, for each duplicate in rows `start` to `stop - 1`, the first row with its id."""
        few = slice(*np.searchsorted(self.rows, (start, stop)))
        return dict(zip(self.rows[few].tolist(), self.firsts[few].tolist(), strict=True))


def repeated(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions whose pair of keys occurs earlier, ascending, and the first position of each.

    Args:
        first, second: the keys, [positions], integers.
    """
    order = np.lexsort((second, first))  # stable: equal keys stay in order
    is_new = np.ones(len(order), bool)
    is_new[1:] = (np.diff(first[order]) != 0) | (np.diff(second[order]) != 0)
    firsts = order[is_new][np.cumsum(is_new) - 1]
    places, firsts = order[~is_new], firsts[~is_new]
    rising = np.argsort(places)
    return places[rising], firsts[rising]


def _hashes(ids: Iterable[list[str]], salt: str) -> np.ndarray:
    parts = (
        np.fromiter((hash(salt + name) for name in part) if salt else map(hash, part), np.int64)
        for part in ids
    )
    return np.concatenate([np.empty(0, np.int64), *parts])
