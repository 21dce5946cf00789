"""The FLOPs benchmark: its ratios, and that both samplers make the passes it multiplies."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionAttendAndExcitePipeline

from aae_batch import Engine, GuidanceConfig, Request
from benchmarks.flops import count_passes, ours, theirs


@pytest.fixture(scope="module")
def passes():
    return count_passes()


@pytest.mark.parametrize(("refinements", "most"), [(0, 0.79), (10, 0.78), (30, 0.77), (60, 0.76)])
def test_an_image_costs_less_than_with_diffusers(passes, refinements, most):
    assert ours(passes, refinements) <= most * theirs(passes, refinements)


def test_a_conjunct_costs_a_row_and_values_of_noun_phrases_cost_nothing(passes):
    assert passes.composed == pytest.approx(1.5 * passes.denoise, rel=1e-3)
    assert passes.structured == passes.denoise


def test_both_make_as_many_passes_as_are_counted(sd1_pipeline):
    config = GuidanceConfig(num_inference_steps=5, max_iter_to_alter=3, thresholds={0: 0.5, 2: 0.6})
    request = Request("a red circle and a blue square", token_indices=[3, 7], seed=1)
    calls = []
    hook = sd1_pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        (result,) = Engine.from_pipeline(sd1_pipeline, slots=1).generate([request], config)
        refinements = result.attention.num_refinements
        assert refinements > 0
        assert len(calls) == config.max_iter_to_alter + refinements + config.num_inference_steps

        calls.clear()
        parts = {
            name: part for name, part in sd1_pipeline.components.items() if name != "image_encoder"
        }
        upstream = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
        upstream.set_progress_bar_config(disable=True)
        upstream(
            request.prompt,
            token_indices=request.token_indices,
            num_inference_steps=5,
            max_iter_to_alter=3,
            thresholds=config.thresholds,
            attn_res=(4, 4),
            generator=torch.Generator("cpu").manual_seed(1),
            output_type="latent",
        )
        refining_steps = len(calls) - 2 * config.num_inference_steps - refinements
        assert 1 <= refining_steps <= len(config.thresholds)
    finally:
        hook.remove()
