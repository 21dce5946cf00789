"""Rows of one sample are computed once until their texts come in, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.sampling.model.family import TEXT, network_of
from aae_batch.sampling.model.recorder import NONE
from aae_batch.sampling.model.shared_prefix import prefix_of
from tests.conftest import small_pipeline
from tests.pipelines import stable_diffusion_xl

TWO = [0, 1, 0, 1]  # negatives, then conditions
COMPOSED = [0, 1, 0, 0, 1, 1, 1]
PLAIN = GuidanceConfig(num_inference_steps=1, method="stable-diffusion")
PROMPT, SUBJECTS = "a red circle and a star", ["circle", "star"]


def inputs(model, sample_of: list[int], height: int = 16, width: int = 16):
    """Latents and timesteps of each row's sample, and a text for each row."""
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, height, width, generator=draw, dtype=model.dtype)
    shape = (len(sample_of), *model.blank()[TEXT].shape)
    text = torch.randn(shape, generator=draw, dtype=model.dtype)
    return latents[sample_of], torch.tensor([500.0, 20.0])[sample_of], {TEXT: text}


def denoised(
    model, rows, record=NONE, affinity_rows=NONE, sample_of=()
) -> tuple[list[Tensor], int]:
    with FlopCounterMode(display=False) as flops:
        made = model.denoise(*rows, None, record, affinity_rows, None, sample_of)
    return [one for one in made if one is not None], flops.get_total_flops()


def free_u(pipe) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


@pytest.mark.parametrize(
    ("version", "prepare", "size", "sample_of", "attn_res"),
    [
        (1, free_u, (16, 16), TWO, None),
        (2, free_u, (13, 9), COMPOSED, None),
        (1, lambda pipe: pipe.enable_attention_slicing(1), (9, 14), TWO, (16, 16)),
        (2, lambda pipe: pipe.fuse_qkv_projections(), (16, 16), COMPOSED, (16, 16)),
        (1, lambda pipe: pipe.unet.to(memory_format=torch.channels_last), (8, 8), TWO, (8, 8)),
    ],
)
def test_predictions_and_maps_are_those_of_rows_computed_alone(
    version, prepare, size, sample_of, attn_res
):
    pipe = small_pipeline(version=version).to(torch.float64)
    prepare(pipe)
    model = network_of(pipe)
    rows = inputs(model, sample_of, *size)
    last = slice(len(sample_of) - 2, None)
    with model.recording_maps(GuidanceConfig(attn_res=attn_res)):
        alone, dear = denoised(model, rows, last, last)
        shared, cheap = denoised(model, rows, last, last, sample_of)
    assert cheap < dear
    assert len(shared) == len(alone) == 3
    for ours, theirs in zip(shared, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in pipe.unet.modules())


@pytest.mark.parametrize(
    ("second", "before", "after"),
    [
        ({}, 2, 4),
        ({"method": "composable-diffusion"}, 2, 5),
        ({"method": "structure-diffusion"}, 2, 4),
        ({"guidance_scale": 1.0}, 3, 3),
    ],
)
def test_the_engine_shares_if_the_first_rows_are_one_of_each_sample(second, before, after):
    pipe = small_pipeline()
    rows = []
    for module in (pipe.unet.down_blocks[0].resnets[0].conv1, pipe.unet.mid_block):
        module.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    requests = [
        Request(PROMPT, SUBJECTS, seed=seed, **own) for seed, own in enumerate([{}, second])
    ]
    results = Engine.from_pipeline(pipe, slots=3).generate(requests, PLAIN)
    assert [result.error for result in results] == [None, None]
    assert rows == [before, after]


def test_compiled_code_shares_what_is_shared_and_only_that():
    model = network_of(small_pipeline().to(torch.float64))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def forward(latents, timesteps, text):
        return model._forward(latents, timesteps, {TEXT: text})

    compiled = torch.compile(forward, backend=backend, fullgraph=True)
    latents, timesteps, text = inputs(model, TWO)
    others = torch.randn_like(latents)
    with model.recording_maps(), torch.no_grad():
        for given, sample_of in [(latents, TWO), (others, ()), (latents, TWO), (others, ())]:
            expected = forward(given, timesteps, text[TEXT])
            with model._sharing(sample_of):
                made = compiled(given, timesteps, text[TEXT])
            torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
    assert len(graphs) == 2


def test_a_network_whose_start_depends_on_the_text_or_is_compiled_is_left_alone():
    assert prefix_of(stable_diffusion_xl().unet) == []
    unet = small_pipeline().unet
    assert len(prefix_of(unet)) == 5
    unet.mid_block.compile(backend="eager")
    assert prefix_of(unet) == []
