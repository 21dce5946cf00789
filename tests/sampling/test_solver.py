from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from aae_batch.sampling.solver import LinearSolver, combined

SHAPE, STEPS = (4, 8, 8), 9
DISCRETE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def ddim(eta: float = 0.0, **config):
    return DDIMScheduler(**DISCRETE, clip_sample=False, **config), eta


def dpm(**config):
    return DPMSolverMultistepScheduler(**DISCRETE, **config), 0.0


CASES = {
    "ddim": lambda: ddim(),
    "ddim, eta .7": lambda: ddim(eta=0.7, set_alpha_to_one=False, steps_offset=1),
    "ddim, v": lambda: ddim(eta=0.3, prediction_type="v_prediction", timestep_spacing="trailing"),
    "euler": lambda: (EulerDiscreteScheduler(**DISCRETE), 0.0),
    "euler, karras": lambda: (
        EulerDiscreteScheduler(**DISCRETE, use_karras_sigmas=True, prediction_type="v_prediction"),
        0.0,
    ),
    "dpm++ 2": lambda: dpm(),
    "dpm++ 3, karras": lambda: dpm(solver_order=3, use_karras_sigmas=True),
    "dpm++ 2, heun, trailing": lambda: dpm(solver_type="heun", timestep_spacing="trailing"),
    "sde-dpm++": lambda: dpm(algorithm_type="sde-dpmsolver++"),
    "flow": lambda: (FlowMatchEulerDiscreteScheduler(shift=3.0), 0.0),
}


def path(made, predictions: torch.Tensor, dtype: torch.dtype, with_solver: bool) -> torch.Tensor:
    """The latents after each step."""
    scheduler, eta = made()
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(SHAPE, generator=generator, dtype=dtype)
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    solver = LinearSolver(scheduler, generator, eta)
    how = {"generator": generator}
    if isinstance(scheduler, DDIMScheduler):
        how["eta"] = eta
    made_each = []
    for step, timestep in enumerate(scheduler.timesteps):
        predicted = predictions[step].to(dtype)
        if with_solver:
            (latents,) = combined([solver.terms(step, latents, predicted)])
        else:
            latents = scheduler.step(predicted[None], timestep, latents[None], **how).prev_sample[0]
        made_each.append(latents)
    return torch.stack(made_each)


@pytest.mark.parametrize("case", CASES)
def test_linear_steps_are_the_scheduler_s_own(case):
    scheduler, _ = CASES[case]()
    predictions = torch.randn(STEPS, *SHAPE, generator=torch.Generator().manual_seed(1))
    kinds = {torch.float32: 1e-5, torch.float64: 1e-12}
    for dtype, tolerance in kinds.items():
        if not LinearSolver.fits(scheduler, dtype):
            assert dtype == torch.float64
            continue
        ours, theirs = (path(CASES[case], predictions, dtype, own) for own in (True, False))
        assert (ours - theirs).abs().max() / theirs.abs().max() < tolerance


def test_steps_that_are_not_linear_are_left_to_their_scheduler():
    others = [
        DDIMScheduler(clip_sample=True),
        DPMSolverMultistepScheduler(thresholding=True),
        EulerAncestralDiscreteScheduler(),
        PNDMScheduler(),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ]
    assert not any(LinearSolver.fits(scheduler, torch.float32) for scheduler in others)


def test_a_sum_does_not_depend_on_the_others_to_the_bit():
    torch.manual_seed(0)
    short = [(0.3, torch.randn(SHAPE)), (-1.7, torch.randn(SHAPE))]
    long = [(0.1 * i, torch.randn(SHAPE)) for i in range(1, 6)]
    assert torch.equal(combined([short, long])[0], combined([short])[0])
    assert torch.equal(combined([long, short])[0], combined([long])[0])
