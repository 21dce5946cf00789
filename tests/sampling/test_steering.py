"""Schedules of fewer steps than the paper's, and guidance through the velocity of flow matching."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.errors import RequestError
from aae_batch.methods import METHODS, Steering
from aae_batch.sampling.sample import admit
from aae_batch.sampling.steering import velocity_factor
from tests.conftest import small_pipeline
from tests.pipelines import T5_LENGTH, stable_diffusion_3

PROMPT = Request("a red circle and a blue square", subjects=["circle", "square"], seed=5)


@pytest.mark.parametrize(
    ("steps", "altered", "thresholds"),
    [
        (50, 25, {0: 0.05, 10: 0.5, 20: 0.8}),
        (28, 14, {0: 0.05, 5: 0.5, 11: 0.8}),
        (30, 15, {0: 0.05, 6: 0.5, 12: 0.8}),
        (100, 50, {0: 0.05, 20: 0.5, 40: 0.8}),
        (4, 2, {0: 0.5, 1: 0.8}),
        (1, 1, {0: 0.8}),
    ],
)
def test_the_papers_steps_are_those_of_fifty(steps, altered, thresholds):
    scaled = Steering().for_steps(steps)
    assert (scaled.max_iter_to_alter, scaled.thresholds) == (altered, thresholds)


def test_steps_that_are_given_count_the_runs_own():
    config = GuidanceConfig(num_inference_steps=10, max_iter_to_alter=7)
    steering = config.steering("attend-and-excite")
    assert steering.max_iter_to_alter == 7
    assert steering.thresholds == {0: 0.05, 2: 0.5, 4: 0.8}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_guided_in_a_single_step(method):
    steering = METHODS[method].steering.for_steps(1)
    assert steering.max_iter_to_alter == 1
    assert set(steering.thresholds) <= {0}


def test_a_velocity_term_is_bounded_where_there_is_only_noise():
    assert velocity_factor(1.0) == pytest.approx(20)
    assert velocity_factor(0.5) == pytest.approx(1)
    assert velocity_factor(0.0) == 0


def test_guidance_through_the_velocity_moves_the_step_down_the_gradient():
    engine = Engine.from_pipeline(stable_diffusion_3().to(torch.float64))
    base = GuidanceConfig(
        num_inference_steps=4,
        max_sequence_length=T5_LENGTH,
        height=96,
        width=64,
        scale_factor=3.0,
        thresholds={},
        max_iter_to_alter=1,
    )

    def after(**settings):
        """The sample after its guided forward, and after the step."""
        with engine.open(base.updated(**settings)) as batch:
            batch.add(PROMPT)
            (sample,) = batch.samples
            start = sample.latents
            batch.excite([one for one in batch.samples if one.guided_now])
            moved = sample.latents
            batch.denoise(batch.samples)
            return start, moved, sample

    start, moved, _ = after()
    slope = (start - moved) / 3.0
    assert slope.abs().max() > 0
    _, _, plain = after(method="stable-diffusion")
    _, still, sample = after(update="velocity")
    assert torch.equal(still, start)
    sigmas = sample.scheduler.sigmas
    expected = plain.latents + (sigmas[1] - sigmas[0]) * 3.0 * velocity_factor(sigmas[0]) * slope
    # The scheduler steps in float32.
    assert torch.allclose(sample.latents, expected, atol=1e-5)


def test_a_model_without_velocities_refuses_them():
    engine = Engine.from_pipeline(small_pipeline())
    with pytest.raises(RequestError, match="update is velocity, which Stable Diffusion 1 and 2"):
        admit(engine.model, PROMPT, GuidanceConfig(update="velocity"))
    plain = replace(PROMPT, method="stable-diffusion")
    assert admit(engine.model, plain, GuidanceConfig(update="velocity"))
