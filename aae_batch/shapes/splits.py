"""Prompts and seeds for reporting, tuning and testing with the embedded model."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from aae_batch.shapes.world import PAIRS, Thing

Pair = tuple[Thing, Thing]


@dataclass(frozen=True)
class Split:
    """Two-object prompts, each with its own seeds: prompt i has those from `first_seed + i *
    seeds` on. No two splits share a prompt or a seed."""

    pairs: tuple[Pair, ...]
    seeds: int
    first_seed: int

    def seeds_of(self, prompt: int) -> range:
        start = self.first_seed + prompt * self.seeds
        return range(start, start + self.seeds)


def _shuffled() -> tuple[Pair, ...]:
    pairs = list(PAIRS)
    Random("aae_batch prompts").shuffle(pairs)
    return tuple(pairs)


_SHUFFLED = _shuffled()
SPLITS = {
    "report": Split(_SHUFFLED[:60], seeds=8, first_seed=10_000),
    "tuning": Split(_SHUFFLED[60:100], seeds=4, first_seed=20_000),
    "test": Split(_SHUFFLED[100:120], seeds=3, first_seed=30_000),
}
"""report: for published results; tuning: to choose settings; test: for the tests."""
