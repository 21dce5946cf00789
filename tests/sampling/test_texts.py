"""The methods that differ in the texts they show the UNet, against their papers' equations.

In float64, as in the parity tests, so that rounding does not hide another algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.methods import METHODS
from aae_batch.sampling.model.attention_layers import cross_attention_layers
from aae_batch.sampling.texts import Condition, Conditioning, Text, combine
from tests.conftest import small_pipeline

PROMPT = "a red circle and a blue square"
SUBJECTS = ["red circle", "blue square"]
CONFIG = GuidanceConfig(num_inference_steps=4, max_iter_to_alter=2, thresholds={0: 0.3, 1: 0.5})


@pytest.fixture(scope="module", params=[1, 2], ids=["epsilon", "v"])
def pipe(request):
    return small_pipeline(version=request.param).to(torch.float64)


@pytest.fixture(scope="module")
def one_pipe():
    return small_pipeline().to(torch.float64)


def generate(pipe, requests, slots: int = 8, config: GuidanceConfig = CONFIG):
    results = list(Engine.from_pipeline(pipe, slots=slots).generate(requests, config))
    for result in results:
        assert result.error is None
    return {(result.request.method, result.request.seed): result for result in results}


def latents_of(pipe, request: Request, config: GuidanceConfig = CONFIG) -> Tensor:
    (result,) = generate(pipe, [request], 1, config).values()
    return result.latents


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def encode(pipe, text: str) -> Tensor:
    return pipe.encode_prompt(text, "cpu", 1, False)[0]


@torch.no_grad()
def sampled(pipe, seed: int, predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A plain DDIM loop around `predict(latents, timestep)`."""
    generator = torch.Generator("cpu").manual_seed(seed)
    latents = torch.randn(1, 4, 16, 16, generator=generator, dtype=torch.float64)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(CONFIG.num_inference_steps)
    for t in scheduler.timesteps:
        latents = scheduler.step(predict(latents, t), t, latents).prev_sample
    return latents[0]


# --- composable-diffusion ---


@pytest.mark.parametrize(("guidance_scale", "weight"), [(7.5, 7.5), (0.0, 1.0)])
def test_composable_diffusion_adds_the_scores_of_the_conjuncts(pipe, guidance_scale, weight):
    negative, *conjuncts = [encode(pipe, text) for text in ("red", "a red circle", "a blue square")]

    def conjunction(latents: Tensor, t: Tensor) -> Tensor:
        """Liu et al., equation 11."""
        alone = pipe.unet(latents, t, encoder_hidden_states=negative).sample
        total = alone.clone()
        for text in conjuncts:
            total += weight * (pipe.unet(latents, t, encoder_hidden_states=text).sample - alone)
        return total

    request = Request(
        PROMPT,
        subjects=SUBJECTS,
        seed=3,
        method="composable-diffusion",
        negative_prompt="red",
        guidance_scale=guidance_scale,
    )
    assert difference(latents_of(pipe, request), sampled(pipe, 3, conjunction)) < 1e-9


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_composable_diffusion_of_one_conjunct_is_stable_diffusion(one_pipe, guidance_scale):
    fields = {"subjects": ["star"], "seed": 5, "guidance_scale": guidance_scale}
    plain = latents_of(one_pipe, Request("a red star", method="stable-diffusion", **fields))
    composed = latents_of(one_pipe, Request("a red star", method="composable-diffusion", **fields))
    assert torch.equal(composed, plain)


def test_a_subject_is_seen_in_the_maps_of_its_own_conjunct(one_pipe):
    """At the first step both have the same latents: the noise of the seed."""
    whole = Request(PROMPT, subjects=SUBJECTS, seed=5, method="composable-diffusion")
    parts = [
        Request(f"a {subject}", subjects=[subject], seed=5, method="stable-diffusion")
        for subject in SUBJECTS
    ]
    seen = generate(one_pipe, [whole])["composable-diffusion", 5].attention.subjects
    assert [subject.token_indices for subject in seen] == [(2, 3), (6, 7)]
    for subject, part in zip(seen, parts, strict=True):
        (alone,) = generate(one_pipe, [part])["stable-diffusion", 5].attention.subjects
        for figure in ("max_attention", "mean_attention", "entropy", "center_x", "center_y"):
            assert np.isclose(getattr(subject, figure)[0], getattr(alone, figure)[0], atol=1e-6)
        assert subject.map.max() == 255


# --- structure-diffusion ---


class MeanOverSequences:
    """Cross-attention as Feng et al. write it: `O = 1 / (k + 1) sum_i M V_i`."""

    def __init__(self, sequences: Sequence[Tensor]) -> None:
        self.sequences = sequences

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, temb=None):
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(self.sequences[0]))
        maps = attn.get_attention_scores(query, key)
        outputs = [maps @ attn.head_to_batch_dim(attn.to_v(text)) for text in self.sequences]
        mean = torch.stack(outputs).mean(dim=0)
        return attn.to_out[0](attn.batch_to_head_dim(mean))


def test_structure_diffusion_takes_the_mean_over_the_noun_phrases_values(pipe):
    prompt = encode(pipe, PROMPT)
    circle, square = prompt.clone(), prompt.clone()
    circle[:, 1:4] = encode(pipe, "a red circle")[:, 1:4]
    square[:, 5:8] = encode(pipe, "a blue square")[:, 1:4]
    negative = encode(pipe, "")
    structured = dict(pipe.unet.attn_processors)
    names = {module: name for name, module in pipe.unet.named_modules()}
    for layer in cross_attention_layers(pipe.unet):
        structured[f"{names[layer]}.processor"] = MeanOverSequences([prompt, circle, square])

    def guided(latents: Tensor, t: Tensor) -> Tensor:
        alone = pipe.unet(latents, t, encoder_hidden_states=negative).sample
        originals = pipe.unet.attn_processors
        pipe.unet.set_attn_processor(dict(structured))
        conditional = pipe.unet(latents, t, encoder_hidden_states=prompt).sample
        pipe.unet.set_attn_processor(originals)
        return alone + CONFIG.guidance_scale * (conditional - alone)

    request = Request(PROMPT, subjects=SUBJECTS, seed=3, method="structure-diffusion")
    ours = latents_of(pipe, request)
    assert difference(ours, sampled(pipe, 3, guided)) < 1e-9
    plain = latents_of(pipe, Request(PROMPT, seed=3, method="stable-diffusion"))
    assert difference(ours, plain) > 1e-6


def test_structure_diffusion_of_one_noun_phrase_is_stable_diffusion(one_pipe):
    fields = {"subjects": ["star"], "seed": 5}
    plain = latents_of(one_pipe, Request("a red star", method="stable-diffusion", **fields))
    structured = latents_of(one_pipe, Request("a red star", method="structure-diffusion", **fields))
    assert difference(structured, plain) < 1e-12


# --- all methods in one batch ---


def test_a_row_does_not_depend_on_the_methods_of_its_neighbours(one_pipe):
    methods = list(METHODS)[:4]  # the others are mixed with each other in test_family
    requests = [
        Request(PROMPT, subjects=SUBJECTS, seed=1, method=method, num_inference_steps=steps)
        for method, steps in zip(methods, (4, 3, 5, 4), strict=True)
    ] + [
        Request("a star and a cross", subjects=["star", "cross"], seed=2, method=method)
        for method in methods
    ]
    config = CONFIG.updated(max_refinement_steps=2)
    alone = generate(one_pipe, requests, 1, config)
    assert len(alone) == 2 * len(methods)
    for slots in (3, 8):
        together = generate(one_pipe, requests[::-1], slots, config)
        for name, result in alone.items():
            assert difference(together[name].latents, result.latents) < 1e-9
            for one, other in zip(
                result.attention.subjects, together[name].attention.subjects, strict=True
            ):
                assert one.token_indices == other.token_indices
                assert np.allclose(one.max_attention, other.max_attention, atol=1e-6)
                assert np.allclose(one.entropy, other.entropy, atol=1e-5)


def test_all_methods_begin_with_the_same_noise(one_pipe):
    engine = Engine.from_pipeline(one_pipe, slots=4)
    with engine.open(CONFIG) as batch:
        for method in METHODS:
            batch.add(Request(PROMPT, subjects=SUBJECTS, seed=9, method=method))
        first, *others = [sample.latents for sample in batch.samples]
    assert all(torch.equal(first, other) for other in others)


def test_out_of_memory_halves_the_slots_of_composed_rows_too(one_pipe):
    def small_memory(unet, arguments, named) -> None:
        if len(arguments[0]) > 3:  # one sample: its negative text, and two conjuncts
            raise torch.OutOfMemoryError("out of memory")

    requests = [
        Request(PROMPT, subjects=SUBJECTS, seed=seed, method=method)
        for seed, method in enumerate(["composable-diffusion", "structure-diffusion"] * 2)
    ]
    expected = generate(one_pipe, requests)
    handle = one_pipe.unet.register_forward_pre_hook(small_memory, with_kwargs=True)
    try:
        results = generate(one_pipe, requests)
    finally:
        handle.remove()
    for name, result in results.items():
        assert difference(result.latents, expected[name].latents) < 1e-9


@pytest.mark.parametrize(
    "kinds",
    [[(7.1, 1, 0.0), (1.3, 1, 0.0)], [(7.1, 1, 0.0), (3.0, 2, 0.0), (2.0, 1, 0.7), (1.0, 0, 0.0)]],
    ids=["all at once", "one by one"],
)
def test_predictions_are_combined_together_as_alone(kinds):
    torch.manual_seed(0)
    texts, negatives, conditional, alone = [], [], [], []
    for weight, conditions, rescale in kinds:
        unconditional = Text({}) if conditions else None
        parts = (Condition({}, positions=(), starts=(), words=()),) * max(1, conditions)
        texts.append(Conditioning(parts, unconditional, weight, rescale))
        noise, own = torch.randn(1, 4, 3, 5), torch.randn(len(parts), 4, 3, 5)
        negatives += [noise] if conditions else []
        conditional.append(own)
        alone.append(texts[-1].combine(noise[0] if conditions else None, own))
    together = combine(texts, torch.cat(negatives), torch.cat(conditional))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
