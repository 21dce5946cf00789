"""Means with 95 % intervals from a bootstrap over prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

DRAWS = 2000
SEED = 0
"""Fixed, so that the same values give the same interval."""

LEAST_PROMPTS = 10
"""The bootstrap's intervals are far too narrow for fewer prompts, so none is given."""

BLOCKS = 5000
"""More prompts than this are divided at random into this many blocks, and blocks are drawn. That bounds time
and memory, and changes the width of the interval by about 1 %, less than the error of 2000 draws."""


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its 95 % interval, which is NaN for fewer than `LEAST_PROMPTS` prompts, and if
    all prompts have the same mean, since the bootstrap then says nothing of the others."""

    mean: float
    low: float
    high: float
    pictures: int
    prompts: int


def estimate(values: np.ndarray, prompts: np.ndarray) -> Estimate | None:
    """Return the mean over images with a percentile bootstrap over prompts, or None without values.

    Images of one prompt are not independent, so a prompt is drawn with all of its images.

    Args:
        values: [images], float; NaN counts as missing.
        prompts: [images], integers that identify the prompt.
    """
    there = ~np.isnan(values)
    values, prompts = values[there], prompts[there]
    if not len(values):
        return None
    _, places = np.unique(prompts, return_inverse=True)
    sums, counts = np.bincount(places, weights=values), np.bincount(places).astype(float)
    low = high = math.nan
    means = sums / counts
    if len(counts) >= LEAST_PROMPTS and np.ptp(means) > 0:
        low, high = bootstrap(
            _blocks(sums, counts),
            _mean,
            paired=True,
            n_resamples=DRAWS,
            batch=100,
            method="percentile",
            random_state=np.random.default_rng(SEED),
        ).confidence_interval
    mean = _mean(sums, counts)
    return Estimate(float(mean), float(low), float(high), len(values), prompts=len(counts))


def _mean(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
    return sums.sum(axis) / counts.sum(axis)


def _blocks(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of values and the number of images per block, given those per prompt."""
    if len(counts) <= BLOCKS:
        return sums, counts
    block = np.random.default_rng(SEED).permutation(len(counts)) % BLOCKS
    return np.bincount(block, weights=sums), np.bincount(block, weights=counts)
