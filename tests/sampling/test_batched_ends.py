"""Where the way of a sample begins and ends: texts that are encoded together, and images that are decoded
together, are those of one alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.errors import NonFiniteError
from aae_batch.sampling import engine, memory
from aae_batch.sampling.model import family
from aae_batch.sampling.model.family import network_of
from aae_batch.sampling.model.unet import StableDiffusion
from tests.conftest import small_pipeline
from tests.pipelines import PIPELINES, T5_LENGTH

FAMILIES = {"SD1": small_pipeline, **PIPELINES}
TEXTS = ["a red circle and a blue square", "", "a star", "a green cross", "a yellow star"]
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-14}


def made(name: str, dtype: torch.dtype = torch.float32):
    pipe = FAMILIES[name]().to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def config(name: str = "SD1") -> GuidanceConfig:
    own = {} if name in ("SD1", "SDXL") else {"max_sequence_length": T5_LENGTH}
    return GuidanceConfig(
        method="stable-diffusion", num_inference_steps=1, height=64, width=64, **own
    )


# --- texts ---


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_is_encoded_in_a_batch_as_alone(name, dtype):
    pipe, bags = made(name, dtype), []
    for together in (False, True):
        model = network_of(pipe)
        with model.recording_maps(config(name)):
            shapes = {part: one.shape for part, one in model.blank().items()}
            model.expect(TEXTS, together)
            bags.append([model.encode(text, config(name)) for text in TEXTS])
    for alone, shared in zip(*bags, strict=True):
        assert {part: one.shape for part, one in shared.items()} == shapes
        for part, one in alone.items():
            bound = BOUNDS[dtype] * one.abs().max()
            assert (one - shared[part]).abs().max() <= bound, part


@pytest.fixture
def encoded(monkeypatch) -> list[list[str]]:
    """The texts of every forward of the text encoders, at most three."""
    for module in (engine, family):
        monkeypatch.setattr(module, "TEXTS_AT_ONCE", 3)
    forwards: list[list[str]] = []
    embed = StableDiffusion._embed
    monkeypatch.setattr(
        StableDiffusion, "_embed", lambda self, texts: forwards.append(texts) or embed(self, texts)
    )
    return forwards


def batching(slots: int) -> Engine:
    """An engine as it is on a GPU."""
    made_ = Engine.from_pipeline(small_pipeline(), slots=slots)
    made_.model.batches_texts_and_images = True
    return made_


ROWS = [
    Request(f"a {word}", seed=seed)
    for word in ("circle", "square", "star", "cross")
    for seed in (0, 1)
]


def test_texts_are_encoded_some_time_ahead_each_once(encoded):
    assert len(list(batching(2).generate(ROWS, config()))) == 8
    assert encoded == [["a circle", ""], ["a square", "a star"], ["a cross"]]


def test_requests_that_an_iterator_makes_are_not_taken_ahead(encoded):
    asked = 0

    def made_one_by_one():
        nonlocal asked
        for row in ROWS:
            asked += 1
            yield row

    for number, _ in enumerate(batching(2).generate(made_one_by_one(), config()), 1):
        assert asked <= number + 2
    assert encoded == [["a circle", ""], ["a square"], ["a star"], ["a cross"]]


@pytest.mark.parametrize(("slots", "on_a_cpu"), [(1, False), (2, True)])
def test_with_one_slot_and_on_a_cpu_each_text_is_encoded_alone(encoded, slots, on_a_cpu):
    one = batching(slots)
    one.model.batches_texts_and_images = not on_a_cpu
    assert len(list(one.generate(ROWS, config()))) == 8
    assert encoded == [["a circle"], [""], ["a square"], ["a star"], ["a cross"]]


def test_a_bad_row_among_those_ahead_fails_alone(encoded):
    rows = [ROWS[0], Request(""), Request("a star", subjects=["cross"]), ROWS[2]]
    results = list(batching(4).generate(rows, config()))
    assert sorted(result.request.prompt for result in results if result.error) == [
        "",
        "a star",
    ]
    assert encoded == [["a circle", "", "a square"]]


# --- images ---


def latents(model, count: int, dtype: torch.dtype) -> torch.Tensor:
    shape = model.latent_shape(64, 96)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pixels_are_those_of_diffusers_to_the_byte(dtype):
    pipe = made("SD1", dtype)
    model = network_of(pipe)
    final = 3 * latents(model, 4, torch.float32)
    with torch.no_grad():
        decoded = pipe.vae.decode((final / pipe.vae.config.scaling_factor).to(dtype)).sample
    decoded = decoded * 4  # so that some are clipped
    pipe.vae.decode = lambda *_, **__: (decoded,)
    expected = pipe.image_processor.postprocess(decoded, output_type="pil")
    ours = model.decode(final)
    assert {0, 255} <= set(np.unique(ours)), "some are clipped"
    for pixels, image in zip(ours, expected, strict=True):
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert np.array_equal(pixels, np.asarray(image))


@pytest.mark.parametrize("name", ["SD1", "SD3", "FLUX-dev"])
def test_an_image_is_decoded_in_a_batch_as_alone(name):
    model = network_of(made(name))
    final = latents(model, 3, torch.float32)
    for together, one in zip(model.decode(final), final, strict=True):
        (alone,) = model.decode(one[None])
        assert np.abs(np.subtract(together, alone, dtype=int)).max() <= 1
        assert alone.shape == (64, 96, 3)


def test_of_a_batch_only_what_overflows_is_decoded_again_and_only_nan_fails():
    """float16 holds no 1e6, float32 does."""
    pipe = made("SD1", torch.float16)
    model = network_of(pipe)
    final = latents(model, 4, torch.float32)
    final[1] *= 1e6
    final[2] = torch.nan
    decode, forwards = pipe.vae.decode, []
    pipe.vae.decode = lambda z, **how: forwards.append((z.dtype, len(z))) or decode(z, **how)
    first, large, nan, last = model.decode(final)
    assert forwards == [(torch.float16, 4), (torch.float32, 2)]
    assert pipe.vae.dtype == torch.float16, "the pipeline is left as it was"
    assert nan is None
    assert large.std() > 0
    for one, own in ((first, final[0]), (last, final[3])):
        (alone,) = model.decode(own[None])
        assert np.abs(np.subtract(one, alone, dtype=int)).max() <= 1


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[int, ...]]:
    """The shape of the latents of every decoding."""
    shapes: list[tuple[int, ...]] = []
    decode = family.Network.decode
    monkeypatch.setattr(
        family.Network, "decode", lambda self, z: shapes.append(tuple(z.shape)) or decode(self, z)
    )
    return shapes


def test_images_of_one_size_that_finish_in_one_step_are_decoded_together(decoded):
    rows = [Request("a star", seed=seed, width=96 if seed == 3 else None) for seed in range(5)]
    results = list(batching(8).generate(rows, config()))
    assert sorted(decoded) == [(1, 4, 8, 12), (4, 4, 8, 8)]
    alone = {
        one.request: one
        for one in Engine.from_pipeline(small_pipeline(), 1).generate(rows, config())
    }
    for result in results:
        other = alone[result.request]
        assert torch.allclose(result.latents, other.latents, atol=1e-4)
        assert result.latents.untyped_storage().nbytes() == result.latents.nbytes
        assert np.abs(np.subtract(result.image, other.image, dtype=int)).max() <= 1


def test_no_more_pixels_are_decoded_together_than_one_image_may_have(decoded, monkeypatch):
    monkeypatch.setattr(engine, "TILED_ABOVE", 2 * 64 * 64)
    rows = [Request("a star", seed=seed) for seed in range(5)]
    assert len(list(batching(8).generate(rows, config()))) == 5
    assert [shape[0] for shape in decoded] == [2, 2, 1]


def test_images_that_do_not_fit_in_memory_are_decoded_in_smaller_batches(decoded, monkeypatch):
    def small_memory(self, latents):
        if len(latents) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return decode(self, latents)

    decode = family.Network.decode
    monkeypatch.setattr(family.Network, "decode", small_memory)
    rows = [Request("a star", seed=seed) for seed in range(16)]
    results = list(batching(8).generate(rows, config()))
    assert all(result.image for result in results)
    assert [shape[0] for shape in decoded] == [2] * 8


def test_one_image_of_nan_fails_alone():
    one = batching(4)
    decode = one.model.decode

    def broken(latents):
        spoiled = latents.clone()
        spoiled[1] = torch.nan
        return decode(spoiled)

    one.model.decode = broken
    results = list(one.generate([Request("a star", seed=seed) for seed in range(3)], config()))
    errors = {result.request.seed: result.error for result in results}
    assert isinstance(errors.pop(1), NonFiniteError)
    assert set(errors.values()) == {None}


# --- memory ---


def test_what_runs_out_of_memory_is_halved_for_good():
    tried: list[int] = []

    def forward(items: list[int]) -> list[int]:
        tried.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return items

    at_once, released = memory.AtOnce(16, "texts"), []
    done = list(at_once.fitting(forward, list(range(8)), lambda: released.append(1)))
    assert [some for some, _ in done] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert tried == [8, 4, 2, 2, 2, 2]
    assert (at_once.most, len(released)) == (2, 2)


def test_a_limit_of_one_call_is_not_kept():
    at_once = memory.AtOnce(16, "texts")
    done = list(at_once.fitting(len, [1, 2, 3], lambda: None, limit=2))
    assert [made for _, made in done] == [2, 1]
    assert at_once.most == 16
