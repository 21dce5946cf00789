"""Whatever order workers take, finish, return and die in: every row is accounted for exactly once."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aae_batch.job.plan import Ledger, Piece

PLACES = st.integers(0, 7)


class LedgerMachine(RuleBasedStateMachine):
    """Pieces are out with workers in any number; rows that were given up are done, too."""

    @initialize(
        rows=st.integers(1, 40),
        shard_size=st.integers(1, 9),
        committed=st.sets(st.integers(0, 39)),
        again=st.sets(st.integers(0, 39)),
    )
    def begin(self, rows, shard_size, committed, again):
        committed = {shard for shard in committed if shard * shard_size < rows}
        again = {row for row in again if row < rows and row // shard_size in committed}
        by_shard: dict[int, list[int]] = {}
        for row in sorted(again):
            by_shard.setdefault(row // shard_size, []).append(row)
        self.ledger: Ledger[int] = Ledger.of(rows, shard_size, committed, by_shard)
        self.wanted = again | {row for row in range(rows) if row // shard_size not in committed}
        self.out: list[Piece] = []
        self.done: Counter[int] = Counter()

    @rule(busy=st.booleans())
    def take(self, busy):
        piece = self.ledger.take(busy)
        if piece is not None:
            assert not (busy and self.ledger.is_suspect(piece))
            self.out.append(piece)

    @precondition(lambda self: self.out)
    @rule(place=PLACES)
    def finish(self, place):
        self._finish(self._back(place))

    @precondition(lambda self: self.out)
    @rule(place=PLACES)
    def bring_back(self, place):
        self.ledger.requeue(self._back(place))

    @precondition(lambda self: self.out)
    @rule(place=PLACES)
    def die(self, place):
        piece = self._back(place)
        if self.ledger.killed(piece):
            assert len(piece) == 1
            self._finish(piece)

    def _back(self, place: int) -> Piece:
        return self.out.pop(place % len(self.out))

    def _finish(self, piece: Piece) -> None:
        rows = list(range(piece.start, piece.stop))
        if self.ledger.is_whole(piece):
            self.ledger.committed(piece)
            self.done.update(rows)
        elif (whole := self.ledger.returned(piece, rows)) is not None:
            self.done.update(whole)

    @invariant()
    def every_row_is_in_one_place(self):
        if not hasattr(self, "ledger"):
            return
        places = Counter(self.done)
        for piece in (*self.out, *self.ledger.todo):
            places.update(range(piece.start, piece.stop))
        for rows in self.ledger.parts.values():
            places.update(rows)
        assert places == Counter(self.wanted)
        waiting = sum(len(piece) for piece in (*self.out, *self.ledger.todo))
        assert self.ledger.rows_left == waiting

    def teardown(self):
        if not hasattr(self, "ledger"):
            return
        while self.out:
            self.finish(0)
        while (piece := self.ledger.take(busy=False)) is not None:
            self._finish(piece)
        assert self.ledger.finished
        assert self.done == Counter(self.wanted)


LedgerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30)
TestLedger = LedgerMachine.TestCase
