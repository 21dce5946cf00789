"""Optimise the start noise before the first step, one guided forward at a time (InitNO)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from aae_batch.methods import NoiseSearch


class Search:
    """The search for one sample's start noise: Guo et al. 2024 (arXiv 2404.04650), section 3.

    The noise is `mean + exp(log_variance / 2) * drawn`. Adam moves mean and log_variance, starting
    at 0, until what the objective has reached is above the target. Whenever the divergence from a
    standard normal distribution exceeds the limit, both are multiplied by sqrt(limit / divergence),
    which brings it to the limit up to second order, and Adam's moments stay as they are. A round
    without success is followed by one with new noise and a new Adam; if none succeeds, the best
    noise of all rounds is used.

    Args:
        drawn: the sample's noise.
        draw: draws new noise of the same shape, from the sample's own generator.
    """

    def __init__(self, plan: NoiseSearch, drawn: Tensor, draw: Callable[[], Tensor]) -> None:
        self.plan = plan
        self.done = False
        self.forwards = 0
        self._draw = draw
        self._best = -math.inf
        self._best_noise = drawn
        self._begin(drawn)

    def _begin(self, drawn: Tensor) -> None:
        self._drawn, self._tried = drawn, 0
        self._mean = torch.zeros_like(drawn)
        self._log_variance = torch.zeros_like(drawn)
        moving = [self._mean, self._log_variance]
        self._adam = torch.optim.Adam(moving, lr=self.plan.learning_rate, eps=1e-3)

    @property
    def noise(self) -> Tensor:
        """The noise to try next, or the result."""
        if self.done:
            return self._best_noise
        return self._mean + torch.exp(self._log_variance / 2) * self._drawn

    def advance(self, reached: float, gradient: Tensor) -> None:
        """Process a forward with `noise`.

        Args:
            reached: the objective's `reached` value.
            gradient: of the objective's loss with respect to the noise.
        """
        self.forwards += 1
        self._tried += 1
        if reached > self._best:
            self._best, self._best_noise = reached, self.noise
        if reached > self.plan.target or self.forwards == self.plan.rounds * self.plan.steps:
            self.done = True
        elif self._tried == self.plan.steps:
            self._begin(self._draw())
        else:
            self._step(gradient)

    def _step(self, gradient: Tensor) -> None:
        deviation = torch.exp(self._log_variance / 2)
        self._mean.grad = gradient
        self._log_variance.grad = gradient * deviation * self._drawn / 2
        self._adam.step()
        variance_apart = torch.expm1(self._log_variance) - self._log_variance
        divergence = ((self._mean**2 + variance_apart).mean() / 2).clamp_min(0)
        # The divergence grows with the square of both.
        shrink = (self.plan.most_divergence / divergence).sqrt().clamp_max(1)
        self._mean.mul_(shrink)
        self._log_variance.mul_(shrink)
