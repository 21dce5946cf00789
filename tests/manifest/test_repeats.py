from __future__ import annotations

import random

import numpy as np

from aae_batch.manifest import repeats
from aae_batch.manifest.repeats import Repeats


def in_parts(ids: list[str], size: int):
    return lambda: (ids[start : start + size] for start in range(0, len(ids), size))


def first_uses(ids: list[str]) -> dict[int, int]:
    first: dict[str, int] = {}
    uses = {row: first.setdefault(name, row) for row, name in enumerate(ids)}
    return {row: use for row, use in uses.items() if use != row}


def test_every_repeat_is_found_with_its_first_use():
    numbers = random.Random(0)
    for distinct in (1, 10, 300, 100_000):
        ids = [str(numbers.randrange(distinct)) for _ in range(500)]
        found = Repeats.among(in_parts(ids, 70))
        assert found.within(0, 500) == first_uses(ids)
        within = {row: first for row, first in first_uses(ids).items() if 100 <= row < 200}
        assert found.within(100, 200) == within


def test_no_ids_repeat_nothing():
    assert Repeats.among(list).within(0, 10) == {}


def test_a_hash_that_two_ids_share_is_no_repeat(monkeypatch):
    real = repeats._hashes

    def colliding(ids, salt):
        return real(ids, salt) if salt else np.zeros_like(real(ids, salt))

    monkeypatch.setattr(repeats, "_hashes", colliding)
    ids = ["a", "b", "a", "c", "b", "a"]
    found = Repeats.among(in_parts(ids, 4))
    assert found.within(0, 6) == first_uses(ids)
