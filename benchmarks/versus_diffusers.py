"""Wall clock: this engine against diffusers' Attend-and-Excite pipeline, with the results compared.

Both run in one process on the same weights, prompts, seeds and settings, in turns, so that whatever
else the machine does meets both.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from diffusers import AutoencoderKL, StableDiffusionAttendAndExcitePipeline, StableDiffusionPipeline
from torch import Tensor

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.sampling.model.loading import default_guidance, load_pipeline
from aae_batch.shapes.splits import SPLITS
from aae_batch.shapes.world import caption
from benchmarks.architectures import stable_diffusion
from training import networks

Latents = dict[int, Tensor]


def with_diffusers(
    pipe: StableDiffusionPipeline, requests: list[Request], config: GuidanceConfig
) -> Latents:
    """One picture after the other, as its pipeline is meant to be used."""
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    upstream = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    upstream.set_progress_bar_config(disable=True)
    steering = config.steering()
    return {
        request.seed: upstream(
            request.prompt,
            token_indices=[index for (index,) in request.token_indices],
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            eta=config.eta,
            max_iter_to_alter=steering.max_iter_to_alter,
            thresholds=steering.thresholds,
            scale_factor=steering.scale_factor,
            attn_res=config.attn_res or (16, 16),
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="latent",
        )
        .images[0]
        .cpu()
        for request in requests
    }


def with_engine(engine: Engine, requests: list[Request], config: GuidanceConfig) -> Latents:
    return {result.request.seed: result.latents for result in engine.generate(requests, config)}


def seconds_of(run: Callable[[], Latents], device: str) -> tuple[float, Latents]:
    """Time a run. With one thread on a processor its own time counts, which other work disturbs little."""
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    synchronize(device)
    start = clock()
    latents = run()
    synchronize(device)
    return clock() - start, latents


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def difference(ours: Latents, theirs: Latents) -> float:
    """The largest difference of any picture's final latents, relative to its largest latent."""
    return max(
        float((ours[seed] - latents).abs().max() / latents.abs().max())
        for seed, latents in theirs.items()
    )


def small_requests(count: int) -> list[Request]:
    """Two-subject prompts of the embedded model, with the positions of their shapes."""
    return [
        Request(caption(pair), token_indices=[(3,), (7,)], seed=i)
        for i, pair in enumerate(SPLITS["tuning"].pairs[:count])
    ]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.versus_diffusers",
        description="Images per second of this engine and of diffusers' Attend-and-Excite pipeline.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="shapes", help="'shapes', or a folder with its layout")
    parser.add_argument(
        "--sd14",
        action="store_true",
        help="instead of --model: SD 1.4's architecture at 512 px, randomly initialised (slow)",
    )
    parser.add_argument("--prompts", type=int, default=8, help="pictures a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--slots", default="1,8", help="slots of the engine to try")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's own")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is a GPU")
    parser.add_argument("--dtype", default="float32", help="float32, float16, bfloat16, float64")
    parser.add_argument("--compile", action="store_true", help="also measure the engine compiled")
    parser.add_argument("--threads", type=int, help="torch's threads; default: its own choice")
    options = parser.parse_args(given)
    warnings.filterwarnings("ignore", module="torch.functional")
    if options.threads:
        torch.set_num_threads(options.threads)

    if options.sd14:
        small = AutoencoderKL.from_config(
            {**networks.vae().config, "latent_channels": 4}
        )  # hardly any time
        pipe = stable_diffusion(vae=small).to(options.device, getattr(torch, options.dtype))
        config = GuidanceConfig(num_inference_steps=4, max_iter_to_alter=2, thresholds={0: 0.3})
    else:
        pipe = load_pipeline(options.model, device=options.device, dtype=options.dtype)
        # A shape's share of its phrase's attention cannot reach the model's thresholds, which are for
        # phrases: every picture would be refined to the end, and rounding be magnified with it.
        config = default_guidance(options.model).updated(thresholds={})
    if options.steps:
        config = config.updated(num_inference_steps=options.steps)
    # upstream has no such settings, and none of these prompts needs them
    config = config.updated(normalize_eot=False, subject_pooling="sum", scheduler=None)
    requests = small_requests(options.prompts)
    slots = [int(count) for count in options.slots.split(",")]
    runs = {"diffusers": partial(with_diffusers, pipe, requests, config)}
    for count in slots:
        name = f"this engine, {count} slot{'s' * (count > 1)}"
        runs[name] = partial(with_engine, Engine.from_pipeline(pipe, count), requests, config)
        if options.compile:
            engine = Engine.from_pipeline(pipe, count)
            engine.model.compile()
            runs[f"{name}, compiled"] = partial(with_engine, engine, requests, config)
            with_engine(engine, requests, config)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    latents: dict[str, Latents] = {}
    with_engine(Engine.from_pipeline(pipe, 1), requests[:1], config)  # warm up
    with_diffusers(pipe, requests[:1], config)
    for _ in range(options.rounds):
        for name, run in runs.items():
            taken, latents[name] = seconds_of(run, options.device)
            seconds[name].append(taken)

    print("| | images/s | times diffusers | largest difference of final latents |")
    print("|---|---|---|---|")
    base = statistics.median(seconds["diffusers"])
    for name, taken_each in seconds.items():
        taken = statistics.median(taken_each)
        off = (
            f"{difference(latents[name], latents['diffusers']):.1e}" if name != "diffusers" else ""
        )
        print(f"| {name} | {len(requests) / taken:.3f} | {base / taken:.2f} | {off} |")


if __name__ == "__main__":
    main()
