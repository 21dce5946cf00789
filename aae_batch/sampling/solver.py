"""One step of the schedulers of many samples at once.

A step of most schedulers is linear: a combination of latents, predictions and noise, of this step and of earlier ones. Its
coefficients are found by letting the scheduler itself take the step with unit vectors in place of images, on the host. Then
the steps of all samples are a few operations on the device, instead of a dozen small ones for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from aae_batch.sampling.objectives.maps import sent

_LINEAR = {
    "DDIMScheduler": ("thresholding", "clip_sample"),
    "EulerDiscreteScheduler": (),
    "DPMSolverMultistepScheduler": ("thresholding",),
    "FlowMatchEulerDiscreteScheduler": ("stochastic_sampling",),
}
"""Schedulers whose steps are linear, unless one of these settings is on."""

_OF_A_STEP = 3
"""Latents, prediction and noise, which are the units that a step adds."""


class LinearSolver:
    """A sample's scheduler, if its steps are linear.

    Args:
        generator: of the sample's noise.
    """

    def __init__(self, scheduler: Any, generator: torch.Generator, eta: float) -> None:
        self._scheduler = scheduler
        self._generator = generator
        self._units = _OF_A_STEP * len(scheduler.timesteps)
        self._known: dict[int, Tensor] = {}
        config = scheduler.config
        self._reach = config.get("solver_order", 1)  # how many steps' units a step depends on
        self._draws = str(config.get("algorithm_type", "")).startswith("sde")
        self._how: dict[str, Any] = {}
        if type(scheduler).__name__ == "DDIMScheduler":
            self._how, self._draws = {"eta": eta}, eta > 0

    @staticmethod
    def fits(scheduler: Any, dtype: torch.dtype) -> bool:
        """True if the scheduler's steps are linear. All but DDIM compute in float32 whatever the latents
        are: in float64 a combination would be more exact than diffusers, and not equal."""
        name = type(scheduler).__name__
        settings = _LINEAR.get(name)
        if settings is None or (dtype == torch.float64 and name != "DDIMScheduler"):
            return False
        return not any(scheduler.config.get(setting, False) for setting in settings)

    def terms(self, step: int, latents: Tensor, predicted: Tensor) -> list[tuple[float, Tensor]]:
        """Take a step, and return the next latents as a sum of coefficients times tensors.

        Args:
            step: its index; steps are taken one after the other.
            latents, predicted: [channels, height, width].
        """
        first = _OF_A_STEP * step
        units = torch.eye(_OF_A_STEP, self._units - first, dtype=torch.float64)
        units = torch.nn.functional.pad(units, (first, 0))
        self._known |= {first: latents, first + 1: predicted}
        how = dict(self._how)
        if self._draws:
            noise = randn_tensor((1, *latents.shape), self._generator, dtype=latents.dtype)[0]
            self._known[first + 2] = sent(noise, latents.device)
            how["variance_noise"] = units[2]
        timestep = self._scheduler.timesteps[step]
        moved = self._scheduler.step(units[1], timestep, units[0], **how).prev_sample.tolist()
        found = [(moved[unit], one) for unit, one in self._known.items() if moved[unit] != 0]
        oldest = _OF_A_STEP * (step - self._reach + 2)
        self._known = {unit: one for unit, one in self._known.items() if unit >= oldest}
        return found


def combined(sums: Sequence[list[tuple[float, Tensor]]]) -> Tensor:
    """Return several sums of coefficients times tensors, [sums, channels, height, width].

    A sum does not depend on the others, to the bit.
    """
    most = max(map(len, sums))
    padded = [[*some, *[(0.0, some[0][1])] * (most - len(some))] for some in sums]
    first = padded[0][0][1]
    weights = torch.tensor([[weight for weight, _ in some] for some in padded], dtype=first.dtype)
    weights = sent(weights, first.device)[:, :, None, None, None]
    total = None
    for i in range(most):
        term = weights[:, i] * torch.stack([some[i][1] for some in padded])
        total = term if total is None else total + term
    assert total is not None
    return total
