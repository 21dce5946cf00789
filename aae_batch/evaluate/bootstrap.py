"""A mean, and how sure one can be of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
SEED = 0
"""Of the bootstrap: the same values give the same interval."""

BLOCKS = 5000
"""More prompts than these are dealt into so many blocks at random, and blocks are drawn: the interval's
width is then off by a hundredth or so, less than 2000 draws are, and time and memory are bounded."""

_DRAWS_AT_ONCE = 100


@dataclass(frozen=True)
class Estimate:
    """A mean over pictures and its 95 % interval, which is NaN for a single prompt."""

    mean: float
    low: float
    high: float
    pictures: int
    prompts: int


def estimate(values: np.ndarray, prompts: np.ndarray) -> Estimate | None:
    """The mean over pictures. Its interval is a percentile bootstrap over prompts, since the seeds
    of a prompt are not independent: prompts are drawn with all of their pictures.

    Args:
        values: [pictures], float.
        prompts: [pictures], whole numbers; the same for pictures of one prompt.

    Returns:
        None for no values.
    """
    if not len(values):
        return None
    _, places = np.unique(prompts, return_inverse=True)
    counts = np.bincount(places).astype(float)
    sums = np.bincount(places, weights=values)
    low, high = _interval(*_blocks(sums, counts))
    mean = float(sums.sum() / counts.sum())
    return Estimate(mean, low, high, pictures=len(values), prompts=len(counts))


def _blocks(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each block's sum of values and count of pictures, given each prompt's."""
    if len(counts) <= BLOCKS:
        return sums, counts
    block = np.random.default_rng(SEED).permutation(len(counts)) % BLOCKS
    return np.bincount(block, weights=sums), np.bincount(block, weights=counts)


def _interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Of the mean, given the sums of values and the counts of pictures of what is drawn."""
    if len(counts) < 2:
        return math.nan, math.nan
    random = np.random.default_rng(SEED)
    means = []
    for _ in range(DRAWS // _DRAWS_AT_ONCE):
        drawn = random.integers(len(counts), size=(_DRAWS_AT_ONCE, len(counts)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)
