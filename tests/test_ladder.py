"""Which method and which noise each try of a row has."""

from __future__ import annotations

import pytest

from aae_batch.errors import SettingsError
from aae_batch.ladder import MOST_SEED, STRIDE, Ladder
from aae_batch.request import Request

PLAIN, NURSED, LAST = "stable-diffusion", "attend-and-excite", "self-cross"


def tried(ladder: Ladder, **row) -> list[tuple[str, int]]:
    requests = [ladder.request(Request("a cat", **row), n) for n in range(ladder.tries)]
    return [(request.method, request.seed) for request in requests]


def test_tries_climb_the_rungs_and_each_method_begins_with_the_rows_own_seed():
    ladder = Ladder.of([PLAIN, f"{NURSED}:2", LAST], 6)
    second, third = 7 + STRIDE, 7 + 2 * STRIDE
    expected = [(PLAIN, 7), (NURSED, 7), (NURSED, second), (LAST, 7), (LAST, second), (LAST, third)]
    assert tried(ladder, seed=7) == expected


def test_a_row_that_names_a_method_stays_with_it():
    ladder = Ladder.of([PLAIN, NURSED], 3)
    assert tried(ladder, seed=7, method=LAST) == [
        (LAST, 7),
        (LAST, 7 + STRIDE),
        (LAST, 7 + 2 * STRIDE),
    ]


def test_seeds_stay_within_what_a_table_holds():
    ladder = Ladder.of([PLAIN], 3)
    seeds = [seed for _, seed in tried(ladder, seed=MOST_SEED - 1)]
    assert len(set(seeds)) == 3
    assert max(seeds) <= MOST_SEED


def test_the_other_tries_of_a_hopeless_method_are_left_out():
    ladder = Ladder.of([f"{PLAIN}:2", NURSED], 5)
    row = Request("a cat")
    assert [ladder.after(row, n) for n in range(5)] == [1, 2, 3, 4, None]
    assert ladder.after(row, 0, hopeless=True) == 2
    assert ladder.after(row, 2, hopeless=True) is None


@pytest.mark.parametrize(
    ("rungs", "said"),
    [
        (["stable"], "unknown method"),
        ([f"{PLAIN}:0"], "METHOD:TRIES"),
        ([f"{PLAIN}:x"], "METHOD:TRIES"),
        ([PLAIN, PLAIN], "twice"),
        ([f"{PLAIN}:3", NURSED], "more tries than --tries 3"),
    ],
)
def test_a_ladder_that_cannot_be_climbed_is_refused(rungs, said):
    with pytest.raises(SettingsError, match=said):
        Ladder.of(rungs, 3)


def test_rows_of_a_prompt_with_seeds_in_sequence_never_have_the_same_noise():
    ladder = Ladder.of([NURSED], 8)
    seeds = [seed for own in range(100) for _, seed in tried(ladder, seed=own)]
    assert len(set(seeds)) == len({seed % 2**32 for seed in seeds}) == 800  # torch's take 32 bits
