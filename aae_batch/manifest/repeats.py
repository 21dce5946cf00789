"""Rows whose id an earlier row has, found among tens of millions in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Repeats:
    """Rows whose id an earlier row has.

    Attributes:
        rows: their positions, rising.
        firsts: of each, the first row with that id.
    """

    rows: np.ndarray
    firsts: np.ndarray

    @classmethod
    def among(cls, ids: Callable[[], Iterable[list[str]]]) -> Repeats:
        """Two ids are the same where 128 bits of their hashes are; the second 64 are only computed
        where the first leave a doubt.

        Args:
            ids: gives all ids in order, a list at a time, whenever it is called.
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
        """Of the rows from `start` up to `stop` whose id an earlier row has: that row."""
        few = slice(*np.searchsorted(self.rows, (start, stop)))
        return dict(zip(self.rows[few].tolist(), self.firsts[few].tolist(), strict=True))


def repeated(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places whose two keys an earlier place has, rising, and the first place that has them.

    Args:
        first, second: the keys, [places], integers.
    """
    order = np.lexsort((second, first))  # stable: places with the same keys stay in order
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
