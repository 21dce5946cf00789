"""The engine against diffusers' own pipelines: the same weights, seeds and schedulers.

float64 tells a different algorithm from rounding: there the two agree to about 1e-14, so a bound of
1e-9 leaves no room for a difference in the method.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionAttendAndExcitePipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import KarrasDiffusionSchedulers

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.errors import SettingsError
from aae_batch.sampling.config import SCHEDULERS
from aae_batch.sampling.model.flux import _packed
from tests.conftest import small_pipeline
from tests.pipelines import flux, stable_diffusion_3, stable_diffusion_xl
from tests.sampling.test_paper import NATIVE, difference, paper_latents

REQUESTS = [
    Request("a red circle and a blue square", token_indices=[3, 7], seed=1),
    Request("a star and a green cross", token_indices=[2], seed=2),
    Request("a yellow triangle and a circle and a star", token_indices=[2, 3, 9], seed=3),
    Request("a cross", token_indices=[2], seed=4, guidance_scale=1.0),
    Request(
        "a blue star", subjects=["star", "blue"], token_indices=[3, 2], seed=5, negative_prompt="a"
    ),
]
CONFIG = GuidanceConfig(
    num_inference_steps=8,
    max_iter_to_alter=5,
    thresholds={0: 0.2, 2: 0.3, 4: 0.35, 6: 0.1},
    max_refinement_steps=20,
    scale_factor=20.0,
    scale_range=(1.0, 0.5),
)
MAPS = (4, 4)  # upstream's default of 16 x 16 is for pictures of 512 pixels


def with_scheduler(pipe, name: str):
    kinds = {"ddim": DDIMScheduler, "pndm": PNDMScheduler}
    arguments = {"skip_prk_steps": True} if name == "pndm" else {}
    pipe.scheduler = kinds[name].from_config(pipe.scheduler.config, **arguments)
    return pipe


def upstream_latents(pipe, request: Request, config: GuidanceConfig = CONFIG) -> torch.Tensor:
    components = dict(pipe.components)
    components.pop("image_encoder")
    upstream = StableDiffusionAttendAndExcitePipeline(**components, requires_safety_checker=False)
    upstream.set_progress_bar_config(disable=True)
    return upstream(
        request.prompt,
        token_indices=list(request.token_indices),
        negative_prompt=request.negative_prompt,
        guidance_scale=request.guidance_scale or config.guidance_scale,
        num_inference_steps=config.num_inference_steps,
        max_iter_to_alter=config.max_iter_to_alter,
        thresholds=config.thresholds,
        scale_factor=config.scale_factor,
        attn_res=MAPS,
        eta=config.eta,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
    ).images[0]


def plain(pipe: StableDiffusionPipeline, request: Request, output_type: str):
    return pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        guidance_scale=request.guidance_scale or CONFIG.guidance_scale,
        num_inference_steps=CONFIG.num_inference_steps,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type=output_type,
    ).images[0]


@pytest.mark.parametrize("scheduler", ["ddim", "pndm"])
@pytest.mark.parametrize("version", [1, 2])
def test_guided_sampling_is_diffusers_attend_and_excite(version, scheduler):
    pipe = with_scheduler(small_pipeline(version=version).to(torch.float64), scheduler)
    config = CONFIG
    if version == 2:  # where diffusers keeps the end token among the words as well
        config = CONFIG.updated(normalize_eot=False, thresholds={0: 0.2, 2: 0.5, 4: 0.75, 6: 0.1})
    theirs = {request.seed: upstream_latents(pipe, request, config) for request in REQUESTS}

    for slots in (1, 3, 8):
        engine = Engine.from_pipeline(pipe, slots=slots)
        results = list(engine.generate(REQUESTS, config))
        assert len(results) == len(REQUESTS)
        for result in results:
            assert result.error is None
            assert difference(result.latents, theirs[result.request.seed]) < 1e-9
        refinements = {result.attention.num_refinements for result in results}
        assert min(refinements) <= 3, "some sample should hardly need refinement"
        assert max(refinements) >= 20, "some sample should refine as often as it may"


def test_noise_added_on_the_way_is_diffusers_too():
    pipe = small_pipeline(version=1).to(torch.float64)
    config = CONFIG.updated(eta=1.0)
    for result in Engine.from_pipeline(pipe, slots=3).generate(REQUESTS[:3], config):
        theirs = upstream_latents(pipe, result.request, config)
        assert difference(result.latents, theirs) < 1e-9


def test_float32_agrees_to_a_thousandth():
    pipe = small_pipeline(version=1)
    for result in Engine.from_pipeline(pipe, slots=3).generate(REQUESTS[:3], CONFIG):
        assert difference(result.latents, upstream_latents(pipe, result.request)) < 1e-3


@pytest.mark.parametrize("version", [1, 2])
def test_plain_sampling_is_diffusers_stable_diffusion(version):
    pipe: StableDiffusionPipeline = small_pipeline(version=version)
    requests = [
        Request("a red circle", seed=7, method="stable-diffusion"),
        Request(
            "a star", seed=8, method="stable-diffusion", negative_prompt="red", guidance_scale=3.0
        ),
    ]
    for result in Engine.from_pipeline(pipe, slots=2).generate(requests, CONFIG):
        latents = plain(pipe, result.request, output_type="latent")
        assert difference(result.latents, latents) < 1e-3
        picture = plain(pipe, result.request, output_type="np")
        assert np.abs(np.asarray(result.image) / 255 - picture).max() < 2 / 255


@pytest.mark.parametrize("make", [small_pipeline, stable_diffusion_xl])
def test_rescaled_guidance_is_diffusers_too(make):
    pipe = make().to(torch.float64)
    engine = Engine.from_pipeline(pipe)
    config = GuidanceConfig(method="stable-diffusion", num_inference_steps=3, guidance_rescale=0.7)
    request = Request("a red star", ["star"], seed=1, negative_prompt="a circle")
    (result,) = engine.generate(request, config)
    (default,) = engine.generate(request, config.updated(guidance_rescale=0.0))
    theirs = pipe(
        "a red star",
        negative_prompt="a circle",
        num_inference_steps=3,
        guidance_scale=config.guidance_scale,
        guidance_rescale=config.guidance_rescale,
        generator=torch.Generator("cpu").manual_seed(1),
        output_type="latent",
    ).images[0]
    assert difference(result.latents, theirs) < 1e-9
    assert difference(result.latents, default.latents) > 1e-6


KARRAS = sorted({one.name for one in KarrasDiffusionSchedulers} - {"DPMSolverSDEScheduler"})


@pytest.fixture(scope="module")
def exact_pipeline() -> StableDiffusionPipeline:
    return small_pipeline().to(torch.float64)


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, *KARRAS, "LCMScheduler"])
def test_plain_sampling_is_diffusers_under_every_scheduler(exact_pipeline, scheduler):
    """Rows of different steps, so that no scheduler's state is another row's. EDM's has a noise schedule
    of its own, and is the pipeline's or none."""
    pipe, config = exact_pipeline, GuidanceConfig(method="stable-diffusion", scheduler=scheduler)
    own = pipe.scheduler
    requests = [Request("a star", seed=n, num_inference_steps=n) for n in (3, 5)]
    try:
        if scheduler == "EDMEulerScheduler":
            with pytest.raises(SettingsError, match="noise schedule of this model's DDIM"):
                list(Engine.from_pipeline(pipe).generate(requests, config))
            pipe.scheduler = EDMEulerScheduler()
        results = list(Engine.from_pipeline(pipe, slots=2).generate(requests, config))
        for result in results:
            pipe.scheduler = Engine.from_pipeline(pipe).model.scheduler(scheduler)
            theirs = pipe(
                "a star",
                num_inference_steps=result.request.num_inference_steps,
                generator=torch.Generator("cpu").manual_seed(result.request.seed),
                output_type="latent",
            ).images[0]
            assert difference(result.latents, theirs) < 1e-9
    finally:
        pipe.scheduler = own


def test_a_scheduler_whose_noise_is_not_of_the_seed_is_refused(exact_pipeline):
    config = GuidanceConfig(scheduler="DPMSolverSDEScheduler")
    with pytest.raises(SettingsError, match="'DPMSolverSDEScheduler' cannot be used; take one of"):
        list(Engine.from_pipeline(exact_pipeline).generate([], config))


@pytest.mark.parametrize("make", [stable_diffusion_3, flux])
@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        UniPCMultistepScheduler,
        DPMSolverMultistepScheduler,
        DDIMScheduler,
    ],
)
def test_flow_matching_is_diffusers_under_its_schedulers_and_no_others(make, scheduler):
    pipe = make().to(torch.float64)
    how = {}
    if scheduler in (UniPCMultistepScheduler, DPMSolverMultistepScheduler):
        how = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **how)
    request = Request("a star", seed=1, method="stable-diffusion", height=64, width=64)
    engine, config = Engine.from_pipeline(pipe), GuidanceConfig(num_inference_steps=3)
    if scheduler is DDIMScheduler or (scheduler, make) == (FlowMatchHeunDiscreteScheduler, flux):
        says = "cannot be used; take" if scheduler is DDIMScheduler else "image's size"
        with pytest.raises(SettingsError, match=says):
            list(engine.generate(request, config))
        return
    (result,) = engine.generate(request, config)
    theirs = pipe(
        "a star",
        num_inference_steps=3,
        guidance_scale=config.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(1),
        output_type="latent",
        height=64,
        width=64,
    ).images[0]
    ours = result.latents if make is stable_diffusion_3 else _packed(result.latents[None])[0]
    assert difference(ours, theirs) < 1e-9


def test_the_oracle_is_diffusers_pipeline_too():
    """So that it can stand where that pipeline is no more."""
    pipe = small_pipeline().to(torch.float64)
    for request in REQUESTS[:3]:
        subjects = [(index,) for index in request.token_indices]
        theirs, _ = paper_latents(pipe, request, CONFIG, subjects, **NATIVE)
        assert difference(theirs, upstream_latents(pipe, request)) < 1e-9
