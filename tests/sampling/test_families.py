"""Every family of models beside Stable Diffusion 1 and 2: its plain samples against its own pipeline in
diffusers, its guided ones against the papers' loop (`oracle.py`) over its own network (`network_oracle.py`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.errors import ModelError, RequestError, SettingsError, SubjectError
from aae_batch.methods import METHODS, NoiseSearch
from aae_batch.sampling.families import FAMILIES
from aae_batch.sampling.model.family import Network, network_of
from aae_batch.sampling.words import resolve_subjects
from tests import network_oracle, pipelines
from tests.conftest import small_pipeline
from tests.family_oracle import LOSSES, Asked, Phrase
from tests.oracle import Search, guide
from tests.pipelines import PIPELINES, T5_LENGTH
from tests.sampling.test_paper import difference

PAIR = "a red circle and a blue square"
HEIGHT, WIDTH = 96, 64
"""Of images: 6 x 4 places in every family's maps."""

GUIDED = sorted(LOSSES)
TRANSFORMERS = [name for name in PIPELINES if name != "SDXL"]
families = pytest.mark.parametrize("family", PIPELINES)
transformers = pytest.mark.parametrize("family", TRANSFORMERS)


def made(make: Callable[[], Any]):
    """A pipeline in float64, as all of them here are, so that no bound has to allow for rounding."""
    pipe = make().to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sequence(family: str) -> dict[str, int]:
    return {} if family == "SDXL" else {"max_sequence_length": T5_LENGTH}


def only(results: Iterator) -> Any:
    (result,) = results
    assert result.error is None
    return result


# --- plain sampling ---


def xl(**changes: Any):
    pipe = pipelines.stable_diffusion_xl()
    pipe.register_to_config(**changes)
    return pipe


def ancestral():
    pipe = pipelines.stable_diffusion_xl()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


def shifted():
    """With a schedule that depends on the image's size."""
    pipe = pipelines.stable_diffusion_3()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return pipe


SHORT = {"num_inference_steps": 4, "height": HEIGHT, "width": WIDTH}
WIDE = {"num_inference_steps": 3, "height": 64, "width": 112}
FEW = {"max_sequence_length": T5_LENGTH}

PLAIN: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "SDXL": (xl, {**SHORT, "guidance_scale": 3.5, "negative_prompt": "a star"}),
    "SDXL-empty": (xl, {**WIDE, "guidance_scale": 3.5, "negative_prompt": ""}),
    "SDXL-zeros": (xl, {**WIDE, "guidance_scale": 3.5}),
    "SDXL-trained-without-zeros": (
        partial(xl, force_zeros_for_empty_prompt=False),
        {**WIDE, "guidance_scale": 3.5},
    ),
    "SDXL-unguided": (xl, {**SHORT, "guidance_scale": 1.0}),
    "SDXL-ancestral": (ancestral, {**SHORT, "guidance_scale": 2.5}),
    "SD3": (
        pipelines.stable_diffusion_3,
        {**SHORT, **FEW, "guidance_scale": 2.5, "negative_prompt": "a star"},
    ),
    "SD3-whole": (pipelines.stable_diffusion_3, {**WIDE, "guidance_scale": 2.5}),
    "SD3-unguided": (pipelines.stable_diffusion_3, {**WIDE, **FEW, "guidance_scale": 0.5}),
    "SD3-without-T5": (
        partial(pipelines.stable_diffusion_3, with_t5=False),
        {**WIDE, **FEW, "guidance_scale": 2.5},
    ),
    "SD3-shifted": (shifted, {**WIDE, **FEW, "guidance_scale": 2.5}),
    "SD3.5-medium": (
        pipelines.stable_diffusion_35_medium,
        {**SHORT, **FEW, "guidance_scale": 4.5, "negative_prompt": "a green cross"},
    ),
    "FLUX-dev": (pipelines.flux, {**SHORT, **FEW, "guidance_scale": 2.5}),
    "FLUX-dev-whole": (pipelines.flux, {**WIDE, "guidance_scale": 6.5}),
    "FLUX-dev-empty": (
        pipelines.flux,
        {**WIDE, **FEW, "guidance_scale": 2.5, "true_cfg_scale": 2.0, "negative_prompt": ""},
    ),
    "FLUX-dev-negative": (
        pipelines.flux,
        {**WIDE, **FEW, "guidance_scale": 2.5, "true_cfg_scale": 2.0, "negative_prompt": "a star"},
    ),
    "FLUX-schnell": (pipelines.flux_schnell, {**SHORT, **FEW, "guidance_scale": 0.0}),
    "Chroma": (
        pipelines.chroma,
        {**SHORT, **FEW, "guidance_scale": 2.5, "negative_prompt": "a star"},
    ),
    "Chroma-whole": (pipelines.chroma, {**WIDE, "guidance_scale": 2.5}),
    "Chroma-unguided": (pipelines.chroma, {**WIDE, **FEW, "guidance_scale": 1.0}),
}
"""Pipelines, and settings, which both sides call the same."""


def of_diffusers(pipe, settings: dict[str, Any], output: str) -> Any:
    generator = torch.Generator("cpu").manual_seed(41)
    return pipe(PAIR, **settings, generator=generator, output_type=output).images[0]


@pytest.mark.parametrize("case", PLAIN)
def test_a_plain_sample_is_that_of_the_familys_own_pipeline(case):
    make, settings = PLAIN[case]
    pipe = made(make)
    theirs = of_diffusers(pipe, settings, "latent")
    if theirs.dim() == 2:  # packed
        unpack = partial(pipe._unpack_latents, vae_scale_factor=8)
        (theirs,) = unpack(theirs[None], settings["height"], settings["width"])
    request = Request(PAIR, seed=41, method="stable-diffusion")
    ours = only(Engine.from_pipeline(pipe).generate([request], GuidanceConfig(**settings)))
    assert ours.latents.shape == theirs.shape
    assert difference(ours.latents, theirs) < 1e-9


@families
def test_latents_are_decoded_to_the_image_of_the_familys_own_pipeline(family):
    pipe = made(PIPELINES[family])
    settings = {**WIDE, **sequence(family), "guidance_scale": 2.5}
    theirs = np.asarray(of_diffusers(pipe, settings, "pil"))
    request = Request(PAIR, seed=41, method="stable-diffusion")
    ours = only(Engine.from_pipeline(pipe).generate([request], GuidanceConfig(**settings)))
    ours = np.asarray(ours.image)
    assert ours.shape == theirs.shape == (64, 112, 3)
    assert theirs.std() > 1  # not one colour, which any decoder could have made
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@families
def test_without_a_size_images_are_as_large_as_those_of_the_familys_own_pipeline(family):
    pipe = made(PIPELINES[family])
    settings = {"num_inference_steps": 1, **sequence(family), "guidance_scale": 1.0}
    theirs = of_diffusers(pipe, settings, "pil")
    request = Request(PAIR, seed=41, method="stable-diffusion")
    ours = only(Engine.from_pipeline(pipe).generate([request], GuidanceConfig(**settings)))
    assert ours.image.size == theirs.size == (128, 128)


@families
def test_defaults_are_those_of_the_familys_own_pipeline(family):
    pipe = PIPELINES[family]()
    facts = FAMILIES[type(pipe).__name__]
    theirs = inspect.signature(pipe.__call__).parameters
    ours = GuidanceConfig(**facts.defaults)
    assert ours.num_inference_steps == theirs["num_inference_steps"].default
    assert ours.guidance_scale == theirs["guidance_scale"].default
    if facts.is_guidance_embedded:
        assert ours.true_cfg_scale == theirs["true_cfg_scale"].default
    if facts.max_sequence_length is None:
        assert "max_sequence_length" not in theirs
    else:
        assert facts.max_sequence_length == theirs["max_sequence_length"].default


# --- batches ---


def mixed(family: str) -> list[Request]:
    """Rows that differ in all that a row may set, and in the length of their prompts."""
    one = Request(PAIR, subjects=["red circle", "blue square"], height=HEIGHT, width=WIDTH)
    rows = [
        replace(one, method="attend-and-excite", seed=1, num_inference_steps=3),
        replace(one, method="focus", seed=2, num_inference_steps=5, guidance_scale=1.0),
        replace(
            one,
            prompt="a red circle and a blue square and a green star",
            subjects=["circle", "blue square", "green star"],
            method="initno",
            seed=3,
            negative_prompt="a blue cross and a red star",
        ),
        replace(one, method="composable-diffusion", seed=4, guidance_scale=4.0),
        replace(
            one, prompt="a star", subjects=None, method="stable-diffusion", num_inference_steps=2
        ),
        replace(one, method="self-cross", seed=6, height=WIDTH, width=HEIGHT),
        replace(
            one,
            prompt="a green cross",
            subjects=["green cross"],
            method="syngen",
            seed=7,
            num_inference_steps=3,
        ),
        replace(one, method="composable-diffusion", seed=8, guidance_scale=0.0),
        replace(one, method="stable-diffusion", seed=9, guidance_scale=1.0),
        replace(one, method="conform", seed=10),
    ]
    if family == "SDXL":
        rows.append(replace(one, method="structure-diffusion", seed=11))
    return rows


@families
def test_a_batch_of_all_sorts_is_each_sample_alone(family, monkeypatch):
    for name in ("initno", "self-cross"):
        start = NoiseSearch(rounds=2, steps=2, target=0.99)
        monkeypatch.setitem(METHODS, name, replace(METHODS[name], start=start))
    config = GuidanceConfig(
        num_inference_steps=4,
        guidance_scale=2.5,
        true_cfg_scale=1.0 if family == "FLUX-schnell" else 1.5,
        max_iter_to_alter=2,
        thresholds={0: 0.5, 3: 0.99},
        max_refinement_steps=2,
        scale_factor=13.0,
        **sequence(family),
    )
    pipe = made(PIPELINES[family])
    rows = mixed(family)
    together = list(Engine.from_pipeline(pipe, slots=3).generate(rows, config))
    assert [result.error for result in together] == [None] * len(rows)
    engine = Engine.from_pipeline(pipe, slots=1)
    for result in together:
        alone = only(engine.generate([result.request], config))
        assert difference(result.latents, alone.latents) < 1e-9, result.request
        assert result.attention.num_refinements == alone.attention.num_refinements
        np.testing.assert_allclose(result.attention.loss, alone.attention.loss, atol=1e-6)


# --- guided sampling ---

ODD = {
    "max_iter_to_alter": 2,
    "max_refinement_steps": 2,
    "scale_factor": 13.0,
    "scale_range": (2.0, 0.3),
    "negative_prompt": "a star",
}

THRESHOLDS = {
    "attend-and-excite": {0: 0.55, 1: 0.01, 2: 0.99},
    "conform": {0: 0.3, 1: 0.01, 2: 0.99},
    "divide-and-bind": {0: 0.1, 1: 0.001, 2: 0.99},
    "focus": {0: 0.5, 1: 0.01, 2: 0.99},
    "initno": {0: 0.55, 1: 0.01, 2: 0.99},
    "predicated": {0: 0.5, 1: 0.01, 2: 0.99},
    "self-cross": {0: 0.55, 1: 0.01, 2: 0.99},
    "syngen": {0: 0.55, 1: 0.01, 2: 0.99},
}
"""The first are reached at once, after some refinements, or never, as the family is; the second at once, the third
never."""

SEARCHES = {
    "initno": NoiseSearch(2, 2, 0.03, 0.99, 0.0002),
    "self-cross": NoiseSearch(2, 2, 0.03, 0.55, 0.1),
}
"""One never finds what it looks for, and is drawn back to the normal distribution."""


@dataclass(frozen=True)
class Case:
    """How a family reads `PAIR`, and settings other than the defaults.

    Attributes:
        adapter: the family's network for the oracle.
        shown: the subjects, and the positions they stand at in all streams.
        spoken: the positions of the prompt's words.
        classifier_free: the scale of classifier-free guidance.
        settings: of the engine, for the same.
    """

    make: Callable[[], Any]
    adapter: Callable[[Any], Any]
    shown: Sequence[Phrase]
    spoken: list[int]
    classifier_free: float
    settings: dict[str, Any] = field(default_factory=dict)
    pooling: str = "sum"

    def requests(self, methods: Sequence[str]) -> list[Request]:
        return [
            Request(
                PAIR,
                subjects=["red circle", "blue square"],
                method=method,
                seed=30 + number,
                num_inference_steps=3 + number % 2,
                height=HEIGHT,
                width=WIDTH,
            )
            for number, method in enumerate(methods)
        ]

    def config(self) -> GuidanceConfig:
        by_method = {name: {"thresholds": thresholds} for name, thresholds in THRESHOLDS.items()}
        return GuidanceConfig(
            **{**ODD, "max_sequence_length": T5_LENGTH, **self.settings},
            subject_pooling=self.pooling,
            by_method=by_method,
        )

    def paper(self, pipe, request: Request) -> tuple[Tensor, int, list[float]]:
        """The final latents, the refinements, and each step's last loss by the oracle."""
        method = request.method or ""
        guided = method in LOSSES
        asked = Asked(self.shown, 0, self.spoken, self.pooling, spoken=self.spoken)
        plan = SEARCHES.get(method)
        last: dict[int, float] = {}

        def loss(cross: Tensor, affinity: Tensor, step: int) -> tuple[Tensor, Tensor]:
            own = LOSSES.get(method, LOSSES["attend-and-excite"])
            value, reached = own(cross, affinity, step, asked)
            last[step] = value.item()
            return value, reached

        latents, refinements = guide(
            self.adapter(pipe),
            PAIR,
            loss,
            seed=request.seed,
            steps=request.num_inference_steps or 0,
            size=(HEIGHT // 8, WIDTH // 8),
            thresholds=THRESHOLDS.get(method, {}),
            guided_steps=ODD["max_iter_to_alter"] if guided else 0,
            guidance_scale=self.classifier_free,
            scale_factor=ODD["scale_factor"],
            scale_range=ODD["scale_range"],
            most_refinements=ODD["max_refinement_steps"],
            negative_prompt=ODD["negative_prompt"],
            search=plan and Search(**vars(plan)),
        )
        return latents, refinements, [last[step] for step in sorted(last)]


def embedded(pipe, blocks: Sequence[int] = (0, 1)) -> network_oracle.Flux:
    network = network_oracle.Flux(pipe, blocks)
    network.guidance = 2.5
    return network


IN_CLIP = (Phrase((3,), ((2,),)), Phrase((7,), ((6,),)))
IN_BOTH = (Phrase((3, 18), ((2, 17),)), Phrase((7, 22), ((6, 21),)))
IN_T5 = (Phrase((2,), ((1,),)), Phrase((6,), ((5,),)))
"""CLIP has a start token before the words and T5 none; in Stable Diffusion 3 T5's tokens follow CLIP's 16."""
SPOKEN_IN_BOTH = [*range(1, 8), *range(16, 23)]

CASES = {
    "SDXL": Case(
        pipelines.stable_diffusion_xl,
        partial(network_oracle.StableDiffusionXL, size=(6, 4)),
        IN_CLIP,
        [*range(1, 8)],
        2.5,
        {"guidance_scale": 2.5, "max_sequence_length": None},
    ),
    "SD3": Case(
        pipelines.stable_diffusion_3,
        partial(network_oracle.StableDiffusion3, blocks=(1, 2)),
        IN_BOTH,
        SPOKEN_IN_BOTH,
        2.5,
        {"guidance_scale": 2.5},
    ),
    "SD3.5-medium": Case(
        pipelines.stable_diffusion_35_medium,
        partial(network_oracle.StableDiffusion3, blocks=(1, 2)),
        IN_BOTH,
        SPOKEN_IN_BOTH,
        3.5,
        {"guidance_scale": 3.5},
        pooling="max",
    ),
    "FLUX-dev": Case(
        pipelines.flux,
        embedded,
        IN_T5,
        [*range(7)],
        1.7,
        {"guidance_scale": 2.5, "true_cfg_scale": 1.7},
    ),
    "FLUX-schnell": Case(
        pipelines.flux_schnell,
        partial(network_oracle.Flux, blocks=(0, 1)),
        IN_T5,
        [*range(7)],
        1.0,
        {"guidance_scale": 3.0},
        pooling="max",
    ),
    "Chroma": Case(
        pipelines.chroma,
        partial(network_oracle.Chroma, blocks=(0, 1)),
        IN_T5,
        [*range(7)],
        2.5,
        {"guidance_scale": 2.5},
    ),
}


def agrees(case: Case, methods: Sequence[str]) -> None:
    """In a batch the engine has the latents, the losses and the refinements of the papers' loop."""
    requests = case.requests(methods)
    results = list(Engine.from_pipeline(made(case.make), slots=3).generate(requests, case.config()))
    assert len(results) == len(requests)
    pipe = made(case.make)  # another than the engine's, which it may change
    for result in results:
        method = result.request.method
        latents, refinements, losses = case.paper(pipe, result.request)
        assert result.error is None
        assert result.attention.num_refinements == refinements, method
        assert refinements > 0 or method == "stable-diffusion"
        assert difference(result.latents, latents) < 1e-9, method
        np.testing.assert_allclose(result.attention.loss, losses, rtol=1e-6)  # float32


@pytest.fixture
def searches(monkeypatch) -> None:
    for name, plan in SEARCHES.items():
        monkeypatch.setitem(METHODS, name, replace(METHODS[name], start=plan))


def test_every_family_has_a_case():
    assert list(CASES) == list(PIPELINES)


@families
def test_a_sample_is_guided_as_its_paper_does_beside_all_others(family, searches):
    agrees(CASES[family], [*GUIDED, "stable-diffusion"])


@families
def test_conjuncts_are_composed_as_in_the_equation(family):
    """e + sum_i w (e_i - e), the conjunction of Liu et al. (their equation 11), with the family's own forwards."""
    case, pipe = CASES[family], made(PIPELINES[family])
    (request,) = case.requests(["composable-diffusion"])
    ours = only(Engine.from_pipeline(pipe, slots=2).generate([request], case.config()))
    pipe = made(PIPELINES[family])
    network, scheduler = case.adapter(pipe), pipe.scheduler
    size = (HEIGHT // 8, WIDTH // 8)
    network.set_timesteps(scheduler, request.num_inference_steps, size)
    negative = ODD["negative_prompt"]
    texts = [network.texts(text, negative) for text in ("a red circle", "a blue square")]
    generator = torch.Generator("cpu").manual_seed(request.seed)
    latents = torch.randn(1, network.channels, *size, generator=generator, dtype=torch.float64)
    latents = latents * getattr(scheduler, "init_noise_sigma", 1)
    scaled = getattr(scheduler, "scale_model_input", lambda latents, t: latents)
    with torch.no_grad():
        for t in scheduler.timesteps:
            seen = scaled(latents, t)
            without = network.predict(seen, t, texts[0][1])
            parts = [network.predict(seen, t, text) - without for text, _ in texts]
            noise = without + case.classifier_free * sum(parts)
            latents = scheduler.step(noise, t, latents).prev_sample
    assert difference(ours.latents, latents[0]) < 1e-9


LAYERS = {
    "SD3": ((0, 3), partial(network_oracle.StableDiffusion3, blocks=(0, 3))),
    "SD3.5-medium": ((2,), partial(network_oracle.StableDiffusion3, blocks=(2,))),
    "FLUX-dev": ((1,), partial(embedded, blocks=(1,))),
    "Chroma": ((0,), partial(network_oracle.Chroma, blocks=(0,))),
}


@pytest.mark.parametrize("family", LAYERS)
def test_guidance_reads_the_layers_that_are_chosen(family, searches):
    numbers, adapter = LAYERS[family]
    case = CASES[family]
    case = replace(case, adapter=adapter, settings={**case.settings, "attn_layers": numbers})
    agrees(case, ["attend-and-excite", "self-cross"])


def test_a_subject_that_t5_does_not_see_is_guided_by_clip_alone(searches):
    """T5 sees "a red circle and a blue", and CLIP the whole prompt."""
    case = replace(
        CASES["SD3"],
        adapter=partial(network_oracle.StableDiffusion3, blocks=(1, 2), length=7),
        shown=[IN_BOTH[0], IN_CLIP[1]],
        spoken=[*range(1, 8), *range(16, 22)],
        settings={"guidance_scale": 2.5, "max_sequence_length": 7},
    )
    agrees(case, ["attend-and-excite", "syngen", "initno"])


def test_without_t5_guidance_reads_clips_tokens():
    case = replace(
        CASES["SD3"],
        make=partial(pipelines.stable_diffusion_3, with_t5=False),
        shown=IN_CLIP,
        spoken=[*range(1, 8)],
    )
    agrees(case, ["attend-and-excite", "syngen", "conform"])


@pytest.mark.parametrize(
    ("family", "words"), [("FLUX-dev", [*range(7)]), ("SD3", [*range(1, 8), *range(16, 23)])]
)
def test_only_the_words_of_some_row_are_recorded(family, words, monkeypatch):
    """Of "a star" and of a longer prompt, in guided forwards and in others."""
    engine = Engine.from_pipeline(PIPELINES[family](), slots=2)
    asked: list[tuple[str, list[int]]] = []
    for name in ("attend", "denoise"):
        forward = getattr(engine.model, name)
        monkeypatch.setattr(
            engine.model,
            name,
            lambda *given, forward=forward, name=name, **named: (
                asked.append((name, given[-1])),
                forward(*given, **named),
            )[1],
        )
    config = GuidanceConfig(
        **sequence(family), num_inference_steps=2, max_iter_to_alter=1, thresholds={}
    )
    rows = [
        Request(text, subjects=[text.split()[-1]], height=64, width=64) for text in ("a star", PAIR)
    ]
    assert all(result.image for result in engine.generate(rows, config))
    assert asked == [("attend", words), ("denoise", []), ("denoise", words)]


# --- subjects ---


def network(family: str) -> Network:
    return network_of(PIPELINES[family]())


def found(model: Network, request: Request, length: int | None = T5_LENGTH) -> list[tuple]:
    """Of each subject all positions, those of its noun, and those of its modifiers."""
    with model.recording_maps(GuidanceConfig(max_sequence_length=length)):
        subjects = resolve_subjects(model.streams, request)
    return [(one.token_indices, one.head, one.modifiers) for one in subjects]


def test_a_subject_has_positions_in_both_texts_of_stable_diffusion_3():
    request = Request(PAIR, subjects=["blue square", "red circle"])
    assert found(network("SD3"), request) == [
        ((6, 7, 21, 22), (7, 22), ((6, 21),)),
        ((2, 3, 17, 18), (3, 18), ((2, 17),)),
    ]


def test_without_t5_a_subject_has_positions_in_clips_text_only():
    model = network_of(pipelines.stable_diffusion_3(with_t5=False))
    request = Request(PAIR, subjects=["blue square"])
    assert found(model, request) == [((6, 7), (7,), ((6,),))]
    assert found(model, replace(request, subjects=None, token_indices=[[6, 7]])) == [
        ((6, 7), (7,), ((6,),))
    ]


@pytest.mark.parametrize("length", [4, 6, 7])
def test_a_subject_that_t5_cuts_off_keeps_its_positions_in_clips_text(length):
    """At 4 all of it is cut off, at 6 its first word is the end token, at 7 its second."""
    request = Request(PAIR, subjects=["red circle", "blue square"])
    assert found(network("SD3"), request, length) == [
        ((2, 3, 17, 18), (3, 18), ((2, 17),)),
        ((6, 7), (7,), ((6,),)),
    ]


LONG = "a red circle and a blue square and a green star and a red cross and a blue star"
"""CLIP sees 14 words of it, up to "a red"; T5 is at 0 to 17."""


def test_a_subject_that_clip_cuts_off_keeps_its_positions_in_t5s_text():
    request = Request(LONG, subjects=["green star", "red cross", "blue star"])
    assert found(network("SD3"), request, 24) == [
        ((10, 11, 25, 26), (11, 26), ((10, 25),)),
        ((29, 30), (30,), ((29,),)),
        ((33, 34), (34,), ((33,),)),
    ]


@pytest.mark.parametrize("family", ["SD3", "SDXL"])
def test_a_subject_that_is_cut_off_in_all_texts_is_an_error(family):
    length = None if family == "SDXL" else 14
    with pytest.raises(SubjectError, match=r"'blue star' is cut off: .* first 14 tokens"):
        found(network(family), Request(LONG, subjects=["blue star"]), length)


def test_positions_are_refused_where_a_word_has_several():
    with pytest.raises(SubjectError, match=r"read.* by CLIP and T5.* name it in subjects"):
        found(network("SD3"), Request(PAIR, token_indices=[3]))
    rows = [Request(PAIR, token_indices=[3], num_inference_steps=1, height=HEIGHT, width=WIDTH)]
    (result,) = Engine.from_pipeline(pipelines.stable_diffusion_3()).generate(rows)
    assert isinstance(result.error, SubjectError)


@pytest.mark.parametrize("family", ["FLUX-dev", "Chroma"])
def test_positions_are_t5s_for_flux(family):
    request = Request(PAIR, token_indices=[[1, 2], 6], subjects=["square", "red circle"])
    assert found(network(family), replace(request, subjects=None)) == [
        ((1, 2), (2,), ((1,),)),
        ((6,), (6,), ()),
    ]
    assert len(found(network(family), request)) == 2  # the same subjects, named twice


def test_a_position_that_is_no_word_of_flux_is_an_error():
    model = network("FLUX-dev")
    for index, length, reason in [
        (7, T5_LENGTH, "the end token"),
        (8, T5_LENGTH, "padding"),
        (T5_LENGTH, T5_LENGTH, "outside the 12 positions"),
        (5, 6, "the end token, where the prompt is cut off"),
        (6, 6, "outside the 6 positions"),
        (-1, T5_LENGTH, "outside the 12 positions"),
    ]:
        with pytest.raises(SubjectError, match=f"token index {index} is {reason}"):
            found(model, Request(PAIR, token_indices=[index]), length)


# --- what is refused ---


def is_one_sentence(message: str) -> bool:
    return message.endswith(".") and ". " not in message and "\n" not in message


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("SD3", {"attn_res": (4, 4)}, "attn_res is 4x4.* choose attn_layers"),
        ("FLUX-dev", {"attn_res": (16, 16)}, "attn_res is 16x16.* choose attn_layers"),
        ("Chroma", {"attn_res": (4, 4)}, "attn_res is 4x4.* choose attn_layers"),
        ("SDXL", {"attn_res": (3, 3)}, "attn_res is 3x3.*8x8, 4x4.* choose one"),
        ("SD3", {"attn_layers": (1, 4)}, "attn_layers has 4, .* 0 to 3"),
        ("FLUX-dev", {"attn_layers": (2,)}, "attn_layers has 2, .* 0 to 1"),
        ("SDXL", {"attn_layers": (99,)}, "attn_layers has 99, .* 0 to"),
        ("SDXL", {"max_sequence_length": 12}, "max_sequence_length is 12, .* leave it out"),
        ("SD3", {"scheduler": "ddim"}, "'DDIMScheduler' cannot be used; .*FlowMatchEuler"),
        ("FLUX-dev", {"scheduler": "EulerDiscreteScheduler"}, "cannot be used; .*FlowMatchEuler"),
        ("Chroma", {"scheduler": "nonsense"}, "'nonsense' cannot be used; .*FlowMatchEuler"),
        ("SDXL", {"scheduler": "FlowMatchEulerDiscreteScheduler"}, "cannot be used; .*euler"),
    ],
)
def test_settings_that_do_not_fit_the_family_are_refused_in_a_sentence(family, settings, says):
    engine = Engine.from_pipeline(PIPELINES[family]())
    with pytest.raises(SettingsError, match=says) as refused:
        list(engine.generate([Request(PAIR)], GuidanceConfig(**settings)))
    assert is_one_sentence(str(refused.value))
    request = Request(PAIR, method="stable-diffusion", num_inference_steps=1)
    assert only(engine.generate([request], GuidanceConfig(**sequence(family)))).image


def test_a_sequence_length_is_refused_by_stable_diffusion_1():
    engine = Engine.from_pipeline(small_pipeline())
    with pytest.raises(
        SettingsError, match=r"max_sequence_length is 12, .* leave it out"
    ) as refused:
        list(engine.generate([Request(PAIR)], GuidanceConfig(max_sequence_length=12)))
    assert is_one_sentence(str(refused.value))


@transformers
def test_rows_that_do_not_fit_the_family_are_errors_beside_good_ones(family):
    good = Request(PAIR, method="stable-diffusion", num_inference_steps=1, height=64, width=64)
    bad = {
        "height is 72; it must be a multiple of 16": replace(good, height=72),
        "width is 88; it must be a multiple of 16": replace(good, width=88),
        "width is 48; it must be a multiple of 16, and at least 64": replace(good, width=48),
        "method structure-diffusion needs cross-attention": replace(
            good, method="structure-diffusion"
        ),
    }
    engine = Engine.from_pipeline(PIPELINES[family]())
    config = GuidanceConfig(**sequence(family))
    results = list(engine.generate([*bad.values(), good], config))
    by_request = {id(result.request): result for result in results}
    for reason, row in bad.items():
        error = by_request[id(row)].error
        assert isinstance(error, RequestError)
        assert reason in str(error)
        assert ". " not in str(error)
    assert by_request[id(good)].error is None


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ((-1,), "by numbers from 0"),
        ((), "name at least one"),
        *(
            (text, f"--attn-layers '{text}' is not")
            for text in ("5-3", "1-", "-1", "2.7", "1-2-3", "1,")
        ),
    ],
)
def test_layers_that_are_none_are_refused(layers, says):
    with pytest.raises(SettingsError, match=says):
        GuidanceConfig(attn_layers=layers)


def test_layers_named_twice_are_read_once():
    assert GuidanceConfig(attn_layers="3,1-2,3").attn_layers == (1, 2, 3)


def test_an_image_larger_than_the_networks_positions_fails_beside_a_good_one():
    engine = Engine.from_pipeline(pipelines.stable_diffusion_3())
    rows = [
        Request(PAIR, subjects=["circle"], height=height, width=WIDTH, num_inference_steps=1)
        for height in (24 * 16 + 16, HEIGHT)
    ]
    results = {
        r.request.height: r for r in engine.generate(rows, GuidanceConfig(**sequence("SD3")))
    }
    assert "at most 384" in str(results.pop(400).error)
    assert results.pop(HEIGHT).image


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("SD3", "text_encoder"),
        ("SD3", "text_encoder_2"),
        ("SD3", "tokenizer_3"),
        ("FLUX-dev", "text_encoder"),
        ("FLUX-dev", "text_encoder_2"),
        ("Chroma", "text_encoder"),
        ("SDXL", "text_encoder_2"),
    ],
)
def test_a_pipeline_without_a_part_is_refused_by_its_name(family, part):
    pipe = PIPELINES[family]()
    setattr(pipe, part, None)
    with pytest.raises(ModelError, match=f"no {part}"):
        Engine.from_pipeline(pipe)


@transformers
def test_a_network_is_checkpointed_while_it_is_guided_and_left_as_it_was(family):
    pipe = PIPELINES[family]()
    with Engine.from_pipeline(pipe).open(GuidanceConfig(**sequence(family))):
        assert pipe.transformer.is_gradient_checkpointing
    assert not pipe.transformer.is_gradient_checkpointing
