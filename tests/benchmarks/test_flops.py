"""The FLOPs benchmark: its ratios, and that both samplers make the passes it multiplies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionAttendAndExcitePipeline,
)

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.manifest.price import WORDS, count_sampling
from aae_batch.sampling.steering import GuidanceSchedule
from benchmarks.flops import (
    Guided,
    Live,
    count_passes,
    guided_cost,
    on_meta,
    ours,
    per_image,
    plain_forward,
    theirs,
)


@pytest.fixture(scope="module")
def passes():
    return count_passes()


@pytest.mark.parametrize(("refinements", "most"), [(0, 0.76), (10, 0.75), (30, 0.74), (60, 0.72)])
def test_an_image_costs_less_than_with_diffusers(passes, refinements, most):
    assert ours(passes, refinements) <= most * theirs(passes, refinements)


def test_a_conjunct_costs_a_row_and_values_of_noun_phrases_cost_nothing(passes):
    row = passes.upstream_denoise / 2
    assert passes.composed - passes.denoise == pytest.approx(row, rel=1e-3)
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


WIDTH, TOKENS, PLACES = 32, 8, 64


def small_flux(blocks: int):
    with torch.device("meta"):
        network = FluxTransformer2DModel(
            num_layers=blocks,
            num_single_layers=1,
            attention_head_dim=WIDTH // 2,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
    return on_meta("FluxPipeline", network, size=16)


def flux_config(*layers: int) -> GuidanceConfig:
    return GuidanceConfig(max_sequence_length=TOKENS, attn_layers=layers)


def test_a_block_of_flux_costs_what_its_matrices_do():
    config = flux_config(0)
    block = plain_forward(small_flux(3), config) - plain_forward(small_flux(2), config)
    tokens = TOKENS + PLACES
    matrices = 3 + 1 + 4 + 4  # queries, keys and values; output; and the two of the feed-forward
    by_hand = 2 * tokens * matrices * WIDTH**2 + 4 * tokens**2 * WIDTH
    modulations = 2 * 2 * 6 * WIDTH**2  # of image and text
    assert block == by_hand + modulations
    # a guided forward that ends one block later has that block more
    model = small_flux(3)
    latents = torch.empty(1, *model.latent_shape(None, None), device="meta")
    first, second = (count_sampling(model, latents, flux_config(layer)) for layer in (0, 1))
    assert second.attend - first.attend == block


def test_recording_costs_attention_to_one_hot_words():
    cost = guided_cost(small_flux(2), flux_config(0, 1))
    once = 2 * PLACES * (TOKENS + PLACES) * (WIDTH + 2 * TOKENS)  # two heads
    assert cost.record == 2 * once
    assert 0 < cost.recomputed < cost.forward
    assert cost.checkpointed < cost.memory


def test_recording_does_not_pay_for_padding():
    def record(tokens: int) -> int:
        config = GuidanceConfig(max_sequence_length=tokens, attn_layers=(0,))
        return guided_cost(small_flux(1), config).record

    tokens, width = 4 * len(WORDS), WIDTH + 2 * len(WORDS)
    assert record(tokens) == 2 * PLACES * (tokens + PLACES) * width


def test_checkpointing_is_priced_where_the_family_has_it():
    model, config = small_flux(1), flux_config(0).updated(num_inference_steps=4)
    guided = Guided(forward=100, backward=200, recomputed=50, record=7, memory=0, checkpointed=0)
    count = sum(GuidanceSchedule(config.steering(), 4).guides(step) for step in range(4))
    assert per_image(model, config, 1000, guided) == (
        4000,
        4000 + count * 350 + (4 - count) * 7,
        count,
    )


def test_reading_the_middle_of_sd3_ends_the_guided_forward_there():
    with torch.device("meta"):
        network = SD3Transformer2DModel(
            sample_size=16,
            num_layers=6,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=16,
            pos_embed_max_size=16,
        )
    model, config = on_meta("StableDiffusion3Pipeline", network), GuidanceConfig()
    plain, middle = plain_forward(model, config), guided_cost(model, config)
    assert middle.forward - middle.record < plain * 4 / 6  # blocks 2 and 3 of 6
    guided = replace(middle, record=0)
    image, with_guidance, count = per_image(model, config, plain, guided)
    assert image == 50 * 2 * plain
    once = middle.forward + middle.backward + middle.recomputed
    assert with_guidance - image == count * once
    assert count == 25


def test_live_bytes_end_when_tensors_do():
    kept = torch.empty(10, device="meta")
    with Live([kept]) as live:
        kept.view(2, 5)
        one = torch.zeros(100, device="meta")
        assert (live.bytes, live.most) == (400, 400)
        two = one + one
        del one
        assert (live.bytes, live.most) == (400, 800)
        del two
    assert (live.bytes, live.most) == (0, 800)
