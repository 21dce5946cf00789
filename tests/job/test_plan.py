from __future__ import annotations

from aae_batch.job.plan import Ledger, Piece, shards


def drain(ledger: Ledger, kills) -> tuple[list[Piece], list[int], int]:
    """Play all pieces through, one at a time. Returns what was committed, what was given up, and
    how many actors it took."""
    committed, given_up, deaths = [], [], 0
    while not ledger.finished:
        piece = ledger.take(busy=False)
        assert piece is not None
        rows = range(piece.start, piece.stop)
        if any(kills(row) for row in rows):
            deaths += 1
            if ledger.killed(piece):
                given_up.append(piece.start)
                ledger.returned(piece, list(rows))
        elif ledger.is_whole(piece):
            ledger.committed(piece)
            committed.append(piece)
        else:
            ledger.returned(piece, list(rows))
    return committed, given_up, deaths


def test_the_last_shard_is_as_short_as_the_manifest_leaves_it():
    assert shards(7, 3) == [Piece(0, 0, 3), Piece(1, 3, 6), Piece(2, 6, 7)]


def test_committed_shards_are_not_done_again():
    ledger: Ledger[int] = Ledger.of(9, 3, committed={0, 2})
    assert list(ledger.todo) == [Piece(1, 3, 6)]
    assert ledger.rows_left == 3


def test_a_shard_that_killed_twice_is_halved_until_the_row_is_found():
    committed, given_up, deaths = drain(Ledger.of(512, 256, set()), kills=lambda row: row == 77)
    assert committed == [Piece(1, 256, 512)]
    assert given_up == [77]
    assert deaths == 2 + 7 + 2  # the whole shard, its parts from 128 to 2 rows, the row


def test_every_killing_row_of_a_shard_is_found():
    _, given_up, _ = drain(Ledger.of(16, 16, set()), kills=lambda row: row in (0, 1, 9))
    assert given_up == [0, 1, 9]


def test_one_death_is_not_enough_to_give_up_a_row():
    ledger: Ledger[int] = Ledger.of(1, 1, set())
    piece = ledger.take(busy=False)
    assert piece is not None
    assert not ledger.killed(piece)
    assert ledger.take(busy=False) == piece


def test_what_killed_before_is_not_given_to_a_busy_actor():
    ledger: Ledger[int] = Ledger.of(6, 3, set())
    suspect = ledger.take(busy=False)
    assert suspect is not None
    ledger.killed(suspect)
    assert ledger.take(busy=True) == Piece(1, 3, 6)
    assert ledger.take(busy=True) is None
    assert ledger.take(busy=False) == suspect


def test_a_halved_shard_comes_back_whole():
    ledger: Ledger[int] = Ledger.of(4, 4, set())
    whole = ledger.take(busy=False)
    assert whole is not None
    ledger.killed(whole)
    ledger.take(busy=False)
    ledger.killed(whole)
    first, second = ledger.take(busy=False), ledger.take(busy=False)
    assert first is not None
    assert second is not None
    assert ledger.returned(second, [2, 3]) is None
    assert sorted(ledger.returned(first, [0, 1]) or []) == [0, 1, 2, 3]
    assert ledger.finished


def test_rows_to_make_again_go_out_in_runs_and_are_not_held_suspect():
    ledger: Ledger[int] = Ledger.of(9, 3, committed={0, 1, 2}, again={1: [3, 5], 2: [6, 7]})
    assert list(ledger.todo) == [Piece(1, 3, 4), Piece(1, 5, 6), Piece(2, 6, 8)]
    assert ledger.rows_left == 4
    first, second, third = (ledger.take(busy=True) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    assert ledger.returned(second, [5]) is None
    assert ledger.returned(first, [3]) == [5, 3]
    assert not ledger.killed(third)
    assert ledger.take(busy=False) == third
    assert not ledger.killed(third)
    assert list(ledger.todo) == [Piece(2, 6, 7), Piece(2, 7, 8)]


def test_a_shard_to_make_and_rows_to_make_again_end_together():
    committed, _, _ = drain(Ledger.of(9, 3, {1}, again={1: [4]}), kills=lambda row: False)
    assert committed == [Piece(0, 0, 3), Piece(2, 6, 9)]
