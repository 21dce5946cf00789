"""Compiled passes make what the passes make as written."""

from __future__ import annotations

import logging

import pytest
import torch

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.sampling.model import compiled
from tests.conftest import small_pipeline

CONFIG = GuidanceConfig(
    num_inference_steps=4,
    max_iter_to_alter=2,
    thresholds={0: 0.3},
    max_refinement_steps=2,
    guidance_scale=4.0,
)
PROMPT, SUBJECTS = "a red circle and a blue square", ["red circle", "blue square"]


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """Trace whole passes as for any compiler, and run what was traced."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()


def pipeline():
    return small_pipeline().to(dtype=torch.float64)


def compiled_engine(pipe, slots: int) -> Engine:
    engine = Engine.from_pipeline(pipe, slots)
    engine.model.compile()
    return engine


def requests(count: int, **changes) -> list[Request]:
    return [Request(PROMPT, SUBJECTS, seed=seed, **changes) for seed in range(count)]


def latents(engine: Engine, wanted: list[Request], config: GuidanceConfig = CONFIG):
    made = {result.request.seed: result for result in engine.generate(wanted, config)}
    assert not any(result.error for result in made.values())
    return [made[seed].latents for seed in sorted(made)], [
        made[seed].attention.loss for seed in sorted(made)
    ]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("fixed", "named"), [(4, " of 4"), (1, "")], ids=["padded", "any number"])
def test_compiled_passes_equal_those_as_written(fixed, named, monkeypatch, caplog):
    monkeypatch.setitem(compiled.FIXED, "cpu", fixed)
    pipe, wanted = pipeline(), requests(3)
    plain = latents(Engine.from_pipeline(pipe, 3), wanted)
    with caplog.at_level(logging.INFO, logger="aae_batch"):
        engine = compiled_engine(pipe, 3)
        for ours, theirs in zip(latents(engine, wanted), plain, strict=True):
            assert_same(ours, theirs)
    for told in ("guided pass", "denoising", "denoising with maps"):
        assert any(
            line.startswith(f"compiled the {told}{named}; that took") for line in caplog.messages
        )
    assert engine.model.compiling_seconds > 0

    caplog.clear()
    latents(engine, wanted)
    assert not any("compil" in line for line in caplog.messages)  # once for all runs


def test_a_pass_is_compiled_when_it_has_run_for_long_enough(caplog):
    engine = Engine.from_pipeline(pipeline(), 1)
    wanted = requests(1, method="stable-diffusion")
    with caplog.at_level(logging.INFO, logger="aae_batch"):
        engine.model.compile(patience=1e9)
        latents(engine, wanted)
        assert not any("compil" in line for line in caplog.messages)
    engine.model.compile(patience=1e-9)
    with engine.open(CONFIG) as batch:
        batch.add(*wanted)
        batch.step()
        assert "compile" not in batch.seconds
        batch.step()
        assert batch.seconds["compile"] > 0


def test_a_model_that_cannot_be_compiled_runs_as_it_is(monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr(compiled, "BACKEND", fail)
    engine = compiled_engine(pipeline(), 2)
    latents(engine, requests(2))
    told = [line for line in caplog.messages if "could not be compiled" in line]
    assert len(told) == 3  # once for each kind of pass
    assert all("there is no compiler" in line for line in told)


def test_a_network_that_is_compiled_already_is_not_compiled_again(caplog):
    pipe = pipeline()
    pipe.unet.compile(backend="eager")
    Engine.from_pipeline(pipe, 1, compile=True)
    assert "compiled already" in caplog.text


@pytest.mark.parametrize("stride", [1, 2])
def test_frozen_convolutions_have_the_gradient_of_others(stride):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 8, 3, stride, 2, dilation=2, groups=2).double().requires_grad_(False)
    given = torch.randn(2, 4, 9, 12, dtype=torch.float64, requires_grad=True)
    slope = torch.randn_like(layer(given))
    (theirs,) = torch.autograd.grad(layer(given), given, slope)
    with compiled._FrozenConvolutions():
        made = layer(given)
    (ours,) = torch.autograd.grad(made, given, slope)
    assert "_FrozenConvolution" in type(made.grad_fn).__name__
    torch.testing.assert_close(ours, theirs)


def test_a_hook_that_comes_after_compiling_counts():
    pipe = pipeline()
    engine = compiled_engine(pipe, 1)
    wanted = requests(1, method="stable-diffusion")
    (before,), _ = latents(engine, wanted)
    pipe.unet.mid_block.register_forward_hook(lambda module, given, made: made * 0.5)
    (after,), _ = latents(engine, wanted)
    (plain,), _ = latents(Engine.from_pipeline(pipe, 1), wanted)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, plain, rtol=1e-9, atol=1e-9)
