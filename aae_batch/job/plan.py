"""What is still to do, and who gets it next. Pure: no Ray, no disk, no clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Rows `start` up to `stop` of the manifest, all of one shard: what a worker is given at once."""

    shard: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def halves(self) -> tuple[Piece, Piece]:
        middle = (self.start + self.stop) // 2
        return Piece(self.shard, self.start, middle), Piece(self.shard, middle, self.stop)


def shards(rows: int, shard_size: int) -> list[Piece]:
    """All shards of a manifest, in order."""
    starts = range(0, rows, shard_size)
    return [Piece(i, start, min(start + shard_size, rows)) for i, start in enumerate(starts)]


def runs(shard: int, rows: Collection[int]) -> list[Piece]:
    """Rows of a shard as pieces without gaps."""
    pieces: list[Piece] = []
    for row in sorted(rows):
        if pieces and pieces[-1].stop == row:
            pieces[-1] = Piece(shard, pieces[-1].start, row + 1)
        else:
            pieces.append(Piece(shard, row, row + 1))
    return pieces


@dataclass
class Ledger(Generic[T]):
    """The shards still to do, what is out with workers, and what has crashed workers.

    A piece that crashed its worker is suspect: it is given out alone, so that the next crash is surely
    its own. A shard that crashes its worker twice is bisected, and so are its parts at every further
    crash, until a single row has crashed twice: that row is given up. The other parts' results are
    kept here until the shard is whole.
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
        """
        Args:
            committed: shards that are done.
            again: of these, rows that are to be made again, by shard.
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

    def is_whole(self, piece: Piece) -> bool:
        """It is a whole shard, which its worker commits; the driver commits those that come in parts."""
        return piece in self._whole

    def is_suspect(self, piece: Piece) -> bool:
        return piece in self._kills or piece not in self._planned

    def take(self, busy: bool) -> Piece | None:
        """The next piece for a worker; one that is busy is given nothing suspect."""
        for place, piece in enumerate(self.todo):  # what is suspect is few, and stands first
            if not busy or not self.is_suspect(piece):
                del self.todo[place]
                return piece
        return None

    def committed(self, piece: Piece) -> None:
        """A worker has committed this shard."""
        del self._left[piece.shard]

    def returned(self, piece: Piece, results: list[T]) -> list[T] | None:
        """Part of a shard is done. Returns the results of all that was to do of it with the last part."""
        parts = self.parts.setdefault(piece.shard, [])
        parts.extend(results)
        self._left[piece.shard] -= len(piece)
        if self._left[piece.shard]:
            return None
        del self._left[piece.shard]
        return self.parts.pop(piece.shard)

    def requeue(self, piece: Piece) -> None:
        """It came back undone, and is not to blame."""
        self.todo.appendleft(piece)

    def killed(self, piece: Piece) -> bool:
        """Its worker died. Returns True where the piece is a single row to give up; otherwise it is
        queued again, in halves if need be."""
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
    """What a job comes to, given what is there already.

    Attributes:
        run: what the job's `run.json` says or is going to say.
        begun: it is there, and shards of this run may be.
    """

    run: dict[str, Any]
    begun: bool

    @property
    @abstractmethod
    def rows(self) -> int:
        """Of all shards, those that earlier runs finished included."""

    @abstractmethod
    def ledger(self) -> Ledger[T]:
        """What there is to do."""
