"""What only a GPU can show. Run with `make test-gpu`."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import torch

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.sampling.model.family import TEXT, network_of
from aae_batch.sampling.model.loading import default_guidance, load_pipeline
from benchmarks.architectures import stable_diffusion

pytestmark = pytest.mark.gpu

PROMPT, SUBJECTS = "a red circle and a blue square", ["red circle", "blue square"]


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.fail("there is no GPU; leave these tests out")


def pipeline(device: str = "cuda", dtype: str = "float64"):
    return load_pipeline("shapes", device=device, dtype=dtype)


def settings(**changes) -> GuidanceConfig:
    few = {"num_inference_steps": 6, "max_iter_to_alter": 3, "thresholds": {}}
    return default_guidance("shapes").updated(**few, **changes)


def generate(engine: Engine, count: int, config: GuidanceConfig):
    wanted = [Request(PROMPT, SUBJECTS, seed=seed) for seed in range(count)]
    made = {result.request.seed: result for result in engine.generate(wanted, config)}
    assert not [result.error for result in made.values() if result.error]
    return [made[seed] for seed in sorted(made)]


def largest_difference(ours, theirs) -> float:
    return max(
        float((a.latents - b.latents).abs().max()) for a, b in zip(ours, theirs, strict=True)
    )


def test_passes_are_those_of_a_processor():
    """One pass at a time: guidance magnifies rounding from step to step."""
    here, there = (stable_diffusion(narrow=True).to(dtype=torch.float64) for _ in range(2))
    made = [_passes(network_of(pipe)) for pipe in (here, there.to("cuda"))]
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs.cpu(), rtol=1e-9, atol=1e-10)


def _passes(model) -> list[torch.Tensor]:
    torch.manual_seed(1)
    shapes = (3, 4, 16, 16), (3, 77, 64)
    latents, text = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    timesteps = torch.tensor([981.0, 501.0, 21.0]).to(model.device)
    latents, bag = latents.to(model.device), {TEXT: text.to(model.device)}
    with model.recording_maps():
        moving = latents.clone().requires_grad_(True)
        maps, _ = model.attend(moving.view_as(moving), timesteps, bag)
        weights = torch.linspace(0, 1, maps.numel(), dtype=torch.float64).view_as(maps)
        (gradient,) = torch.autograd.grad((maps * weights.to(maps.device)).sum(), moving)
        predicted, recorded, _ = model.denoise(latents, timesteps, bag, record=slice(None))
        shared, *_ = model.denoise(
            torch.cat([latents] * 2),
            torch.cat([timesteps] * 2),
            {TEXT: torch.cat([bag[TEXT], -bag[TEXT]])},
            sample_of=[0, 1, 2] * 2,
        )
    return [maps.detach(), gradient, predicted, recorded, shared]


def test_images_without_guidance_are_those_of_a_processor():
    config = settings(method="stable-diffusion")
    ours = generate(Engine.from_pipeline(pipeline(), 3), 4, config)
    theirs = generate(Engine.from_pipeline(pipeline("cpu"), 3), 4, config)
    assert largest_difference(ours, theirs) < 1e-8
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(np.int16(a.image) - np.int16(b.image)).max() <= 1


def test_a_step_waits_three_times_at_most_and_two_without_guidance():
    engine = Engine.from_pipeline(pipeline(dtype="float32"), 8)
    with engine.open(settings()) as batch:
        for seed in range(8):
            batch.add(Request(PROMPT, SUBJECTS, seed=seed))
        waits = [_waits(batch.step) for _ in range(5)]
    assert max(waits[1:3]) <= 3  # the first step fills caches
    assert waits[4] <= 2


def _waits(run) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in caught)


def test_slots_are_measured_and_fit():
    engine = Engine.from_pipeline(pipeline(dtype="bfloat16"), "auto")
    with engine.open(settings()) as batch:
        assert batch.slots > 8
    assert len(generate(engine, 9, settings())) == 9


@pytest.mark.parametrize("count", [3, 20], ids=["as a CUDA graph", "for any number"])
def test_compiled_passes_make_the_same_images(count, caplog):
    config = settings(method="stable-diffusion")  # records the subjects, and magnifies no rounding
    pipe = pipeline(dtype="float32")
    plain = generate(Engine.from_pipeline(pipe, count), count, config)
    with caplog.at_level(logging.INFO, logger="aae_batch"):
        engine = Engine.from_pipeline(pipe, count)
        engine.model.compile()
        for _ in range(3):  # a graph is recorded in the second run
            assert largest_difference(generate(engine, count, config), plain) < 1e-3
        generate(engine, count, settings())
    assert "could not be compiled" not in caplog.text
    assert engine.model.compiling_seconds > 0
