"""Which steps guide, which refine, and how hard."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aae_batch.methods import Steering


@dataclass(frozen=True)
class GuidanceSchedule:
    """The plan of one sample, whose scheduler takes `steps` steps.

    PNDM takes one step more than `num_inference_steps`; as upstream, everything here counts the
    scheduler's steps.
    """

    steering: Steering
    steps: int

    def guides(self, step: int) -> bool:
        """Does `step` need the guided forward at all?"""
        return step < self.steering.max_iter_to_alter or step in self.steering.thresholds

    def updates(self, step: int) -> bool:
        """Does `step` end with a latent update?"""
        return step < self.steering.max_iter_to_alter

    def target(self, step: int) -> float | None:
        """What refinement at `step` aims at; None where it does not refine."""
        return self.steering.thresholds.get(step)

    def step_size(self, step: int) -> float:
        """The factor of the gradient, falling over the steps (upstream's `scale_range`)."""
        scale = np.linspace(*self.steering.scale_range, self.steps)[step]
        return float(self.steering.scale_factor * np.sqrt(scale))


@dataclass
class Progress:
    """How far the guidance of one step has come. `advance` is told of each guided forward.

    Upstream looks at what it had *before* an update to decide whether to refine once more, so the first
    update made on target is the last one, and one more forward follows, which makes the step's own
    update.

    Attributes:
        refinements: updates made by refinement at this step.
        settled: refinement is over, or was not needed.
        done: the step's guided forwards are over; the sample can be denoised.
    """

    refinements: int = 0
    settled: bool = False
    done: bool = False

    def advance(self, reached: float, target: float | None, most: int) -> None:
        """Take in what the objective had reached in a guided forward: refine, or finish the step."""
        refining = target is not None and (self.refinements > 0 or reached < target)
        if self.settled or not refining:
            self.settled = self.done = True
            return
        assert target is not None
        self.refinements += 1
        self.settled = reached >= target or self.refinements >= most
