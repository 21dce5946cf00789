"""Which steps are guided, which refine, and with what step size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aae_batch.methods import Steering


@dataclass(frozen=True)
class GuidanceSchedule:
    """The guidance schedule of one sample whose scheduler takes `steps` steps.

    PNDM takes one step more than `num_inference_steps`; as upstream, all indices here count the
    scheduler's steps.
    """

    steering: Steering
    steps: int

    def guides(self, step: int) -> bool:
        """True if `step` needs the guided forward."""
        return step < self.steering.max_iter_to_alter or step in self.steering.thresholds

    def updates(self, step: int) -> bool:
        """True if `step` ends with a latent update."""
        return step < self.steering.max_iter_to_alter

    def target(self, step: int) -> float | None:
        """Return the threshold that `step` refines to; None if it does not refine."""
        return self.steering.thresholds.get(step)

    def step_size(self, step: int) -> float:
        """Return the factor of the gradient, which decays over the steps (upstream's
        `scale_range`)."""
        scale = np.linspace(*self.steering.scale_range, self.steps)[step]
        return float(self.steering.scale_factor * np.sqrt(scale))


LEAST_SIGNAL = 0.1
"""Of the image in the latents, for the size of a velocity term: it bounds the factor where there is
only noise."""


def velocity_factor(sigma: float) -> float:
    """Return the factor of the gradient that is added to a velocity of flow matching: FOCUS's
    2 (1 - t)^2 / t (arXiv 2510.02315), with t = 1 - sigma the image's share. It is 0 at the end,
    and bounded at the beginning.

    Velocities point from image to noise and a step goes against them, so adding the gradient of
    the loss moves the latents down it.
    """
    return 2 * sigma**2 / max(1 - sigma, LEAST_SIGNAL)


@dataclass
class Progress:
    """Progress of the guidance within one step. Call `advance` after each guided forward.

    Upstream decides whether to refine again from the value *before* an update. So the first update
    made once the target is reached is the last refinement; one more forward follows, which makes
    the step's own update.

    Attributes:
        refinements: refinement updates made at this step.
        settled: refinement is over, or was not needed.
        done: all guided forwards of the step are done; the sample can be denoised.
    """

    refinements: int = 0
    settled: bool = False
    done: bool = False

    def advance(self, reached: float, target: float | None, most: int) -> None:
        """Process the value `reached` in a guided forward: refine (at most `most` times), or
        finish the step."""
        refining = target is not None and (self.refinements > 0 or reached < target)
        if self.settled or not refining:
            self.settled = self.done = True
            return
        assert target is not None
        self.refinements += 1
        self.settled = reached >= target or self.refinements >= most
