"""A mean, and how sure one can be of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
SEED = 0
"""Of the bootstrap: the same values give the same interval."""

_DRAWS_AT_ONCE = 100


@dataclass(frozen=True)
class Estimate:
    """A mean over pictures and its 95 % interval, which is NaN for a single prompt."""

    mean: float
    low: float
    high: float
    pictures: int
    prompts: int


def estimate(values: Sequence[float], prompts: Sequence[str]) -> Estimate | None:
    """The mean over pictures. Its interval is a percentile bootstrap over prompts, since the seeds
    of a prompt are not independent: prompts are drawn with all of their pictures.

    Returns:
        None for no values.
    """
    if not len(values):
        return None
    _, places = np.unique(np.asarray(prompts, dtype=object).astype(str), return_inverse=True)
    counts = np.bincount(places).astype(float)
    sums = np.bincount(places, weights=np.asarray(values, dtype=float))
    low, high = _interval(sums, counts)
    mean = float(sums.sum() / counts.sum())
    return Estimate(mean, low, high, pictures=len(values), prompts=len(counts))


def _interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Of the mean, given each prompt's sum of values and count of pictures."""
    prompts = len(counts)
    if prompts < 2:
        return math.nan, math.nan
    random = np.random.default_rng(SEED)
    means = []
    for _ in range(DRAWS // _DRAWS_AT_ONCE):
        drawn = random.integers(prompts, size=(_DRAWS_AT_ONCE, prompts))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)
