"""Continuous batching: what a caller sees of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.errors import (
    ModelError,
    NonFiniteError,
    PromptError,
    RequestError,
    SettingsError,
    SubjectError,
)
from aae_batch.sampling.families import STABLE_DIFFUSION
from tests.conftest import small_pipeline

CONFIG = GuidanceConfig(num_inference_steps=4, max_iter_to_alter=2, thresholds={0: 0.3, 1: 0.5})
FAST = GuidanceConfig(num_inference_steps=1, max_iter_to_alter=1, thresholds={})
PROMPTS = [
    "a red circle and a blue square",
    "a star",
    "a green cross and a circle",
    "a yellow star",
]


def request(i: int, **fields) -> Request:
    prompt = PROMPTS[i % len(PROMPTS)]
    return Request(prompt, subjects=[prompt.split()[-1]], seed=i, id=f"r{i}", **fields)


def generate(pipe, requests, slots: int, config: GuidanceConfig = CONFIG):
    results = list(Engine.from_pipeline(pipe, slots=slots).generate(requests, config))
    return {result.request.id: result for result in results}


def test_a_row_does_not_depend_on_its_neighbours(sd1_pipeline):
    requests = [request(i) for i in range(4)]
    alone = generate(sd1_pipeline, requests, slots=1)
    together = generate(sd1_pipeline, requests[::-1], slots=4)
    for name, result in alone.items():
        scale = result.latents.abs().max()
        assert (result.latents - together[name].latents).abs().max() < 1e-3 * scale


def test_an_endless_iterator_is_taken_row_by_row(sd1_pipeline):
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield request(i)

    results = Engine.from_pipeline(sd1_pipeline, slots=2).generate(endless(), CONFIG)
    first = list(itertools.islice(results, 3))
    assert len(first) == 3
    assert len(taken) <= 3 + 2
    results.close()


def test_out_of_memory_halves_the_slots_and_loses_nothing(sd1_pipeline):
    def small_memory(unet, arguments, named) -> None:
        if len(arguments[0]) > 4:  # two samples, each with and without its prompt
            raise torch.OutOfMemoryError("out of memory")

    requests = [request(i) for i in range(5)]
    expected = generate(sd1_pipeline, requests, slots=2)
    engine = Engine.from_pipeline(sd1_pipeline, slots=8)
    handle = sd1_pipeline.unet.register_forward_pre_hook(small_memory, with_kwargs=True)
    try:
        with engine.open(CONFIG) as batch:
            results = {result.request.id: result for result in batch.run(requests)}
    finally:
        handle.remove()
    assert batch.slots == 2
    assert set(results) == set(expected)
    for name, result in results.items():
        assert result.error is None
        assert torch.allclose(result.latents, expected[name].latents, rtol=1e-3, atol=1e-3)


def test_out_of_memory_with_a_single_slot_is_the_callers(sd1_pipeline):
    def no_memory(unet, arguments, named) -> None:
        raise torch.OutOfMemoryError("out of memory")

    handle = sd1_pipeline.unet.register_forward_pre_hook(no_memory, with_kwargs=True)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            generate(sd1_pipeline, [request(0), request(1)], slots=2)
    finally:
        handle.remove()


def test_rows_may_differ_in_size_steps_method_and_guidance(sd1_pipeline):
    requests = [
        request(0),
        request(1, height=64, width=192),
        request(2, num_inference_steps=2, guidance_scale=1.0),
        request(3, method="stable-diffusion", negative_prompt="red"),
    ]
    own = CONFIG.updated(attention_maps="every:3")
    results = generate(sd1_pipeline, requests, slots=4, config=own)
    assert [results[f"r{i}"].error for i in range(4)] == [None] * 4
    assert results["r1"].image.size == (192, 64)
    assert results["r1"].attention.subjects[0].map.shape == (2, 6)
    assert len(results["r2"].attention.loss) == 2
    assert results["r3"].attention.num_refinements == 0
    assert [results[f"r{i}"].method for i in (2, 3)] == ["attend-and-excite", "stable-diffusion"]
    steps = [list(results[f"r{i}"].attention.subjects[0].map_steps) for i in (1, 2, 3)]
    assert steps == [[0, 3], [0, 1], [0, 3]], "every third of the row's own, and the last"
    for name in ("r1", "r3"):
        first, last = results[name].attention.subjects[0].maps
        assert not np.array_equal(first, last)


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (Request(" ", token_indices=[1], id="bad"), PromptError, "empty"),
        (Request("a star", id="bad"), PromptError, "no subject"),
        (Request("a star", token_indices=[0], id="bad"), SubjectError, "start token"),
        (Request("a star", subjects=["frog"], id="bad"), SubjectError, "'frog'"),
        (Request("a star", token_indices=[2], height=100, id="bad"), RequestError, "multiple of 8"),
        (Request("a star", token_indices=[2], method="magic", id="bad"), RequestError, "method"),
        (Request("a \ud800", token_indices=[2], id="bad"), RequestError, "surrogate"),
        (Request("a star", subjects=[None], id="bad"), RequestError, "not a list of words"),
        (Request("a star", token_indices=[[None]], id="bad"), RequestError, "token positions"),
        (
            Request("a star", token_indices=[2], seed=1.5, id="bad"),
            RequestError,
            "seed: 1.5 is not",
        ),
        (Request("a star", token_indices=[2], seed=2**64, id="bad"), RequestError, "64 bits"),
        (Request("a star", token_indices=[2], seed=object(), id="bad"), RequestError, "seed"),
        (Request(None, token_indices=[2], id="bad"), RequestError, "prompt: is None"),
    ],
)
def test_a_bad_row_fails_alone_and_says_why(sd1_pipeline, bad, error, says):
    results = generate(sd1_pipeline, [request(0), bad, request(1)], slots=2)
    assert isinstance(results["bad"].error, error)
    assert says in str(results["bad"].error)
    assert "bad" in str(results["bad"].error)
    assert results["r0"].image
    assert results["r1"].image


CIRCLE = Request("a red circle", subjects=["red circle"], seed=3, height=64)


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": np.int64(3), "height": np.float32(64)},
        {"seed": torch.tensor(3), "token_indices": torch.tensor([[2, 3]]), "subjects": None},
        {"seed": pa.scalar(3), "subjects": pa.array(["red circle"])},
        {"seed": 3.0, "subjects": np.array(["red circle"]), "negative_prompt": float("nan")},
        {"seed": "3", "subjects": pd.Series(["red circle"]), "negative_prompt": pd.NA},
        {"seed": np.array(3), "subjects": ("red circle",), "token_indices": [np.array([2.0, 3.0])]},
        {"subjects": {"red circle"}, "id": pd.NA},
        {"subjects": "red circle", "height": "64"},
    ],
)
def test_a_request_takes_values_as_tables_and_arrays_give_them(sd1_pipeline, fields):
    given = replace(CIRCLE, **fields)
    engine = Engine.from_pipeline(sd1_pipeline, slots=2)
    expected, result = engine.generate([CIRCLE, given], FAST)
    assert result.error is None
    assert result.request is given
    assert torch.equal(result.latents, expected.latents)
    one, other = result.attention.subjects[0], expected.attention.subjects[0]
    assert sorted(one.token_indices) == sorted(other.token_indices)


@pytest.mark.parametrize("one", ["a red circle", None, 7, {"prompt": "a red circle"}])
def test_what_is_no_request_is_refused_before_anything_runs(sd1_pipeline, one):
    engine = Engine.from_pipeline(sd1_pipeline)
    for given in (one, [CIRCLE, one]):
        with pytest.raises(SettingsError, match="is not a Request; write"):
            engine.generate(given, FAST)
    with pytest.raises(SettingsError, match="is not a Request; write"):
        list(engine.generate(iter([CIRCLE, one]), FAST))


def test_one_request_alone_none_and_the_same_one_twice_are_taken(sd1_pipeline):
    engine = Engine.from_pipeline(sd1_pipeline, slots=8)
    assert [result.error for result in engine.generate(CIRCLE, FAST)] == [None]
    assert list(engine.generate([], FAST)) == []
    one, other = engine.generate([CIRCLE, CIRCLE], FAST)
    assert torch.equal(one.latents, other.latents)


def test_a_nan_in_the_middle_fails_its_row_and_names_the_step():
    pipe = small_pipeline()
    calls = []

    def poison_the_third_forward(module, inputs, output):
        calls.append(1)
        return output * torch.nan if len(calls) == 3 else output

    pipe.unet.conv_out.register_forward_hook(poison_the_third_forward)
    results = generate(pipe, [request(0), request(1)], slots=1)
    assert isinstance(results["r0"].error, NonFiniteError)
    assert "at step 3" in str(results["r0"].error)
    assert results["r1"].error is None


def test_an_overflowing_row_leaves_its_neighbours_unharmed(sd1_pipeline):
    alone = generate(sd1_pipeline, [request(1)], slots=1)
    results = generate(sd1_pipeline, [request(0, guidance_scale=1e38), request(1)], slots=2)
    assert isinstance(results["r0"].error, NonFiniteError)
    assert torch.allclose(results["r1"].latents, alone["r1"].latents, atol=1e-3)


def test_statistics_have_an_entry_for_every_step_of_every_subject(sd1_pipeline):
    row = Request(PROMPTS[0], subjects=["red circle", "square"], seed=1, id="r")
    attention = generate(sd1_pipeline, [row], slots=1)["r"].attention
    assert [subject.subject for subject in attention.subjects] == ["red circle", "square"]
    assert attention.subjects[0].token_indices == (2, 3)
    for subject in attention.subjects:
        for series in (subject.max_attention, subject.mean_attention, subject.entropy):
            assert series.shape == (4,)
            assert series.dtype == np.float32
            assert np.isfinite(series).all()
        assert ((subject.center_x > 0) & (subject.center_x < 1)).all()
        assert (subject.entropy <= math.log(16) + 1e-5).all()
        assert subject.map.shape == (4, 4)
        assert subject.map.max() == 255
    worst = np.min([subject.max_attention for subject in attention.subjects], axis=0)
    assert np.allclose(attention.loss, 1 - worst, atol=1e-6)
    assert attention.final_loss == pytest.approx(attention.loss[-1])
    best = [subject.max_attention.max() for subject in attention.subjects]
    assert attention.neglected == (min(best) < 0.5)


def test_statistics_cost_no_extra_forward(sd1_pipeline):
    calls = []
    hook = sd1_pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = GuidanceConfig(num_inference_steps=4, method="stable-diffusion")
    generate(sd1_pipeline, [request(0)], slots=1, config=plain)
    hook.remove()
    assert len(calls) == 4


def test_a_plain_row_without_subjects_has_an_image_and_no_statistics(sd1_pipeline):
    row = Request("a star", method="stable-diffusion", id="r")
    result = generate(sd1_pipeline, [row], slots=1)["r"]
    assert result.image
    assert result.attention.subjects == ()


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "euler", "euler-ancestral"])
def test_other_schedulers_guide_too(sd1_pipeline, scheduler):
    config = CONFIG.updated(scheduler=scheduler)
    alone = generate(sd1_pipeline, [request(0), request(1)], slots=1, config=config)
    together = generate(sd1_pipeline, [request(1), request(0)], slots=2, config=config)
    for name, result in alone.items():
        assert result.error is None
        assert torch.allclose(result.latents, together[name].latents, atol=1e-2)


def test_more_steps_than_the_scheduler_has_fail_their_row_alone(sd1_pipeline):
    requests = [
        Request("a red circle", subjects=["circle"], num_inference_steps=steps, id=str(steps))
        for steps in (1001, 1)
    ]
    config = GuidanceConfig(thresholds={})
    results = {
        r.request.id: r for r in Engine.from_pipeline(sd1_pipeline).generate(requests, config)
    }
    assert "use 1 to 1000" in str(results["1001"].error)
    assert results["1"].error is None


def test_a_scheduler_of_another_family_is_refused(sd1_pipeline):
    engine = Engine.from_pipeline(sd1_pipeline)
    with pytest.raises(SettingsError, match=r"FlowMatch.*take one of ddim"):
        list(engine.generate([], CONFIG.updated(scheduler="FlowMatchEulerDiscreteScheduler")))


def test_a_resolution_without_cross_attention_is_refused_with_those_that_have_it(sd1_pipeline):
    engine = Engine.from_pipeline(sd1_pipeline)
    with pytest.raises(SettingsError, match="16x16, 8x8, 4x4"):
        list(engine.generate([], CONFIG.updated(attn_res=(5, 5))))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        *(({"num_inference_steps": steps}, "num_inference_steps") for steps in (0, 1001)),
        *(({"height": pixels}, "height") for pixels in (0, 16_392)),
        *(({"attn_res": size}, r"attn_res\.0: .* greater than 0") for size in ("0x0", (-1, 16))),
        *(({"guidance_scale": scale}, "finite number") for scale in (math.nan, math.inf)),
        ({"scale_range": "-1:0.5"}, r"scale_range\.0: .* or equal to 0"),
        ({"attn_layers": "0-999999999999"}, "--attn-layers"),
        ({"thresholds": {0: 1.5}}, "thresholds"),
        ({"guidance": 3}, "guidance"),
        *(
            ({"attention_maps": said}, "write e.g. 'every:10'")
            for said in ("all", "every:0", "last:2")
        ),
    ],
)
def test_a_wrong_setting_is_named(values, says):
    with pytest.raises(SettingsError, match=says):
        GuidanceConfig(**values)


def test_a_pipeline_of_another_kind_is_refused():
    pipe = small_pipeline()
    pipe.text_encoder_2 = pipe.text_encoder
    with pytest.raises(ModelError, match="cannot be guided as Stable Diffusion 1 and 2"):
        Engine.from_pipeline(pipe)


def test_a_class_made_from_a_pipeline_is_of_its_family_unless_it_is_diffusers_own():
    pipe = small_pipeline()

    class Mine(type(pipe)):
        pass

    pipe.__class__ = Mine
    assert Engine.from_pipeline(pipe).model.facts is STABLE_DIFFUSION
    Mine.__module__ = "diffusers.pipelines.new"
    with pytest.raises(ModelError, match="a Mine, which cannot be guided"):
        Engine.from_pipeline(pipe)


# --- decoders ---


class Overflowing(torch.nn.Module):
    """A decoder whose activations float16 cannot hold, as those of SDXL's VAE are known to."""

    def __init__(self, decoder: torch.nn.Module, factor: float) -> None:
        super().__init__()
        self.decoder, self.factor = decoder, factor

    def forward(self, sample: torch.Tensor, *rest) -> torch.Tensor:
        return self.decoder(sample, *rest) * self.factor / self.factor


def decoded(dtype: torch.dtype, factor: float):
    pipe = small_pipeline()
    request = Request("a red circle", method="stable-diffusion", num_inference_steps=2)
    pipe.vae.to(dtype).decoder = Overflowing(pipe.vae.decoder, factor)
    (result,) = Engine.from_pipeline(pipe).generate([request], CONFIG)
    return pipe, result


def test_a_decoder_that_overflows_is_run_again_in_float32():
    _, expected = decoded(torch.float32, 1e30)
    pipe, result = decoded(torch.float16, 1e30)
    assert result.error is None
    assert pipe.vae.dtype == torch.float16, "the pipeline is left as it was"
    difference = np.asarray(result.image, dtype=int) - np.asarray(expected.image, dtype=int)
    assert np.abs(difference).max() <= 1
    assert np.asarray(result.image).std() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_picture_of_nan_is_an_error(dtype):
    _, result = decoded(dtype, float("inf"))
    assert result.image is None
    assert isinstance(result.error, NonFiniteError)
    assert "decoder" in result.error.reason


# --- words ---


def test_words_that_a_model_says_it_does_not_know_are_refused():
    pipe = small_pipeline()
    pipe.tokenizer.init_kwargs["known_words"] = ["a", "and", "red", "circle"]
    engine = Engine.from_pipeline(pipe)
    requests = [
        Request("a cat and a Frog", subjects=["cat"], id="prompt"),
        Request("a red circle", subjects=["circle"], negative_prompt="ugly", id="negative"),
        Request("A red circle.", subjects=["circle"], num_inference_steps=1, id="known"),
    ]
    results = {r.request.id: r for r in engine.generate(requests, CONFIG.updated(thresholds={}))}
    assert results["prompt"].error.reason == (
        "the prompt has words that this model does not know: 'cat', 'frog'; it knows only a, and, red, "
        "circle, so use these, or a model for all words (--model)"
    )
    assert "negative_prompt has words" in results["negative"].error.reason
    assert results["known"].error is None
    with pytest.raises(SettingsError, match=r"negative_prompt has words .*'blurry'"):
        list(engine.generate([], CONFIG.updated(negative_prompt="blurry")))


def test_a_given_setting_comes_before_the_models_and_that_before_the_papers():
    config = GuidanceConfig(
        max_iter_to_alter=7,
        by_method={"syngen": {"max_iter_to_alter": 9, "scale_factor": 3.0}},
    )
    syngen, conform = config.steering("syngen"), config.steering("conform")
    assert (syngen.max_iter_to_alter, syngen.scale_factor, syngen.scale_range) == (7, 3.0, (1, 1))
    assert (conform.max_iter_to_alter, conform.scale_factor) == (7, 20.0)
    assert GuidanceConfig(thresholds={}).steering("conform").thresholds == {}
