"""What is left to do, and which worker gets it next. Pure: no Ray, no disk, no clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Manifest rows `start` to `stop` (exclusive) of one shard: the unit of work handed to a
    worker."""

    shard: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def halves(self) -> tuple[Piece, Piece]:
        middle = (self.start + self.stop) // 2
        return Piece(self.shard, self.start, middle), Piece(self.shard, middle, self.stop)


def shards(rows: int, shard_size: int) -> list[Piece]:
    """Return all shards of a manifest, in order."""
    starts = range(0, rows, shard_size)
    return [Piece(i, start, min(start + shard_size, rows)) for i, start in enumerate(starts)]


def runs(shard: int, rows: Collection[int]) -> list[Piece]:
    """Group a shard's rows into contiguous pieces."""
    pieces: list[Piece] = []
    for row in sorted(rows):
        if pieces and pieces[-1].stop == row:
            pieces[-1] = Piece(shard, pieces[-1].start, row + 1)
        else:
            pieces.append(Piece(shard, row, row + 1))
    return pieces


@dataclass
class Ledger(Generic[T]):
    """The shards left to do, the pieces that workers have, and those that have crashed workers.

    A piece that crashed its worker is suspect: it is handed out alone, so that another crash is
    certain to be its own fault. A shard that crashes its worker twice is bisected, and its parts
    are bisected again at every further crash, until a single row has crashed twice: that row is
    given up. The other parts' results are kept here until the shard is complete.
    """

    todo: deque[Piece]
    parts: dict[int, list[T]] = field(default_factory=dict)
    _planned: frozenset[Piece] = frozenset()
    _whole: frozenset[Piece] = frozenset()
    _kills: Counter[Piece] = field(default_factory=Counter)
    _left: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(
        cls,
        rows: int,
        shard_size: int,
        committed: Collection[int],
        again: Mapping[int, Collection[int]] | None = None,
    ) -> Ledger[T]:
        """Return the ledger of a job.

        Args:
            committed: shards that are done.
            again: rows of committed shards to generate again, by shard.
        """
        done = frozenset(committed)
        whole = [piece for piece in shards(rows, shard_size) if piece.shard not in done]
        planned = [piece for shard, few in (again or {}).items() for piece in runs(shard, few)]
        planned += whole
        left: Counter[int] = Counter()
        for piece in planned:
            left[piece.shard] += len(piece)
        return cls(deque(planned), _planned=frozenset(planned), _whole=frozenset(whole), _left=left)

    @property
    def finished(self) -> bool:
        return not self._left

    @property
    def rows_left(self) -> int:
        return sum(self._left.values())

    @property
    def rows_unsettled(self) -> int:
        """Rows of this job whose shards are not complete."""
        return sum(len(piece) for piece in self._planned if piece.shard in self._left)

    def is_whole(self, piece: Piece) -> bool:
        """True if the piece is a whole shard, which its worker commits. The driver commits
        shards that come in parts."""
        return piece in self._whole

    def is_suspect(self, piece: Piece) -> bool:
        return piece in self._kills or piece not in self._planned

    def take(self, busy: bool) -> Piece | None:
        """Return the next piece for a worker; a busy worker gets no suspect piece."""
        for place, piece in enumerate(self.todo):  # suspect pieces are few and come first
            if not busy or not self.is_suspect(piece):
                del self.todo[place]
                return piece
        return None

    def committed(self, piece: Piece) -> None:
        """Record that a worker has committed this shard."""
        del self._left[piece.shard]

    def returned(self, piece: Piece, results: list[T]) -> list[T] | None:
        """Record results of a part of a shard. Returns all its results once the last part is in,
        else None."""
        parts = self.parts.setdefault(piece.shard, [])
        parts.extend(results)
        self._left[piece.shard] -= len(piece)
        if self._left[piece.shard]:
            return None
        del self._left[piece.shard]
        return self.parts.pop(piece.shard)

    def requeue(self, piece: Piece) -> None:
        """Put back a piece that was returned undone and is not to blame."""
        self.todo.appendleft(piece)

    def killed(self, piece: Piece) -> bool:
        """Record that the piece's worker died. Returns True if the piece is a single row to give
        up; otherwise requeues it, in halves if necessary."""
        self._kills[piece] += 1
        twice = self._kills[piece] >= 2
        if len(piece) == 1 and twice:
            return True
        if len(piece) > 1 and (twice or piece not in self._planned):
            self.todo.extendleft(reversed(piece.halves()))
        else:
            self.requeue(piece)
        return False


@dataclass(frozen=True)
class JobPlan(ABC, Generic[T]):
    """What a job has to do, given the existing output.

    Attributes:
        run: the content of the job's `run.json`, existing or to be written.
        begun: `run.json` exists, and shards of this run may exist.
    """

    run: dict[str, Any]
    begun: bool

    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows of all shards, including those that earlier runs finished."""

    @abstractmethod
    def ledger(self) -> Ledger[T]:
        """Return what is left to do."""
