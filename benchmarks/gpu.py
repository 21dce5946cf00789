"""One GPU in ten minutes: images per second of this engine and of diffusers, on the architectures of Stable Diffusion 1.5
and XL with random weights.

The engine is measured step by step, all slots full and in the same step: guided steps first, then steps that only record. An
image of 50 steps, of which 25 are guided and none refined, is counted from these and from its decoding. At the end
one run is measured as a whole.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import StableDiffusionAttendAndExcitePipeline

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.manifest.price import count_sampling
from aae_batch.sampling.model.family import Network, network_of
from benchmarks.architectures import stable_diffusion, stable_diffusion_xl
from benchmarks.flops import on_meta

MODELS: dict[str, Callable[..., Any]] = {"sd15": stable_diffusion, "sdxl": stable_diffusion_xl}

STEPS, GUIDED = 50, 25
PROMPT, SUBJECTS, TOKENS = "a red circle and a blue square", ["circle", "square"], [3, 7]

PEAK = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
"""TFLOP/s of dense bfloat16 that the makers' data sheets state."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        warm, timed: steps of each kind before and while the clock runs.
        diffusers_steps: of an image of diffusers' pipelines, counted as one of 50.
    """

    device: str = "cuda"
    dtype: str = "bfloat16"
    narrow: bool = False
    warm: int = 3
    timed: int = 4
    diffusers_steps: int = 10

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        images_per_s: of 50 steps; with guidance in 25 of them, without refinements.
        peak: share of the GPU's peak rate that the network's FLOPs of such an image take; None if it is not known.
        step_ms, host_ms: of a step (guided, if there is guidance), and how much of it the host was busy.
        later_ms, later_host_ms: of a step that is not guided any more.
        decode_ms: of an image.
        memory_gib: most memory of the GPU.
        compile_s: time spent on compiling.
    """

    model: str
    what: str
    slots: int
    images_per_s: float
    peak: float | None = None
    step_ms: float | None = None
    host_ms: float | None = None
    later_ms: float | None = None
    later_host_ms: float | None = None
    decode_ms: float | None = None
    memory_gib: float | None = None
    compile_s: float | None = None


@dataclass
class _Waited:
    """Seconds that the host waited for the device's numbers."""

    seconds: float = 0.0


@contextmanager
def waiting() -> Iterator[_Waited]:
    """Time the engine's waits: every copy of numbers to the host."""
    waited = _Waited()

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                waited.seconds += time.perf_counter() - start

        return call

    tensor = torch.Tensor
    with (
        patch.object(tensor, "cpu", timed(tensor.cpu)),
        patch.object(tensor, "tolist", timed(tensor.tolist)),
    ):
        yield waited


def requests(count: int, method: str) -> list[Request]:
    subjects = None if method == "stable-diffusion" else SUBJECTS
    return [Request(PROMPT, subjects, seed=i, method=method) for i in range(count)]


def timed_step(batch: Any, plan: Plan, waited: _Waited) -> tuple[float, float]:
    """Return the seconds of a step, and those of them in which the host was busy.

    Raises:
        RuntimeError: a sample failed, so that not all slots were full.
    """
    plan.synchronize()
    before, start = waited.seconds, time.perf_counter()
    failed = [result.error for result in batch.step() if result.error is not None]
    host = time.perf_counter() - start - (waited.seconds - before)
    plan.synchronize()
    if failed:
        raise RuntimeError(f"{len(failed)} samples failed: {failed[0]}")
    return time.perf_counter() - start, host


def measure(name: str, model: Network, slots: int, method: str, plan: Plan) -> Line:
    """Measure the engine with all slots full.

    Raises:
        torch.OutOfMemoryError: so many do not fit.
    """
    each = plan.warm + plan.timed
    guided = method != "stable-diffusion"
    count = (2 * each if guided else each) + 1  # the last one decodes
    config = _config(count, each)
    engine, pipe = Engine(model, slots), model.pipe
    before_s = model.compiling_seconds
    if plan.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with waiting() as waited, engine.open(config) as batch:
        for request in requests(slots, method):
            batch.add(request)
        times = [timed_step(batch, plan, waited) for _ in range(count - 1)]
        before = batch.seconds["decode"]
        timed_step(batch, plan, waited)
        decode = (batch.seconds["decode"] - before) / slots
        if batch.slots < slots:
            raise torch.OutOfMemoryError(f"{slots} samples do not fit")
    first, later = times[plan.warm : each], times[each + plan.warm :]
    step, host = (statistics.median(some) for some in zip(*first, strict=True))
    rest, rest_host = (statistics.median(some) for some in zip(*(later or first), strict=True))
    guided_steps = GUIDED if guided else 0
    image = (guided_steps * step + (STEPS - guided_steps) * rest) / slots + decode
    return Line(
        model=name,
        what=method + (", compiled" if model.compiles else ""),
        slots=slots,
        images_per_s=1 / image,
        peak=share_of_peak(flops_of(pipe, guided) / image),
        step_ms=1e3 * step,
        host_ms=1e3 * host,
        later_ms=1e3 * rest if guided else None,
        later_host_ms=1e3 * rest_host if guided else None,
        decode_ms=1e3 * decode,
        memory_gib=torch.cuda.max_memory_allocated() / 2**30 if plan.on_gpu else None,
        compile_s=model.compiling_seconds - before_s or None,
    )


def whole_run(name: str, model: Network, slots: int, method: str, plan: Plan, steps: int) -> Line:
    """Measure two rounds of all slots, from their texts to their images."""
    engine, pipe = Engine(model, slots), model.pipe
    config = _config(steps, steps // 2)
    plan.synchronize()
    start = time.perf_counter()
    made = list(engine.generate(requests(2 * slots, method), config))
    taken = time.perf_counter() - start
    if any(result.error for result in made):
        raise RuntimeError(f"a sample failed: {next(r.error for r in made if r.error)}")
    what = f"{method}{', compiled' if model.compiles else ''}, a whole run"
    rate = len(made) / taken
    guided = method != "stable-diffusion"
    return Line(name, what, slots, rate, share_of_peak(flops_of(pipe, guided) * rate))


def _config(steps: int, guided: int) -> GuidanceConfig:
    """Guidance without refinements, on diffusers' own layers."""
    return GuidanceConfig(
        num_inference_steps=steps, max_iter_to_alter=guided, thresholds={}, guidance_scale=7.5
    )


def with_diffusers(name: str, pipe: Any, count: int, plan: Plan) -> Line:
    """Measure diffusers' own pipeline without guidance, `count` images at a time."""

    def run(steps: int) -> None:
        pipe([PROMPT] * count, num_inference_steps=steps, guidance_scale=7.5, output_type="latent")

    image = _seconds(run, plan) / count
    return Line(name, "diffusers", count, 1 / image, share_of_peak(flops_of(pipe, False) / image))


def with_diffusers_guided(name: str, pipe: Any, plan: Plan) -> Line:
    """Measure diffusers' Attend-and-Excite pipeline, which makes one image at a time."""
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    upstream = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    upstream.set_progress_bar_config(disable=True)
    size = pipe.unet.config.sample_size // 4
    own = dict(pipe.unet.attn_processors)

    def run(steps: int) -> None:
        upstream(
            PROMPT,
            token_indices=TOKENS,
            num_inference_steps=steps,
            guidance_scale=7.5,
            max_iter_to_alter=steps // 2,
            thresholds={},
            attn_res=(size, size),
            output_type="latent",
        )

    try:
        image = _seconds(run, plan)
    finally:
        pipe.unet.set_attn_processor(own)
        pipe.unet.requires_grad_(False)
    what = "diffusers' attend-and-excite"
    return Line(name, what, 1, 1 / image, share_of_peak(flops_of(pipe, True) / image))


def _seconds(run: Callable[[int], None], plan: Plan) -> float:
    """Return the seconds of 50 steps, from fewer."""
    run(2)
    plan.synchronize()
    start = time.perf_counter()
    run(plan.diffusers_steps)
    plan.synchronize()
    return (time.perf_counter() - start) * STEPS / plan.diffusers_steps


_flops: dict[str, tuple[int, int]] = {}


def flops_of(pipe: Any, guided: bool) -> int:
    """Return the FLOPs of the engine's passes for an image of 50 steps."""
    name = type(pipe).__name__  # the process has one of each
    if name not in _flops:
        with torch.device("meta"):
            unet = type(pipe.unet).from_config(pipe.unet.config)
        model = on_meta(type(pipe).__name__, unet)
        latents = torch.empty(1, *model.latent_shape(None, None), device="meta")
        passes = count_sampling(model, latents)
        plain = STEPS * passes.denoise
        _flops[name] = plain, plain + GUIDED * (passes.attend + passes.attend_backward)
    return _flops[name][guided]


def share_of_peak(flops_per_s: float) -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peaks = [peak for known, peak in PEAK.items() if known in name]
    return flops_per_s / (peaks[0] * 1e12) if peaks else None


def lines(
    model: str, slots: list[int], compiled_slots: list[int], plan: Plan, whole: int
) -> Iterator[Line]:
    """Yield every line of a model."""
    pipe = MODELS[model](plan.device, narrow=plan.narrow).to(dtype=getattr(torch, plan.dtype))
    few = _config(2, 1)
    written, compiled = network_of(pipe), network_of(pipe)
    compiled.compile()
    list(Engine.from_pipeline(pipe, 2).generate(requests(2, "attend-and-excite"), few))  # warm up
    if model == "sd15":
        yield with_diffusers_guided(model, pipe, plan)
    for count in (1, 8):
        yield with_diffusers(model, pipe, count, plan)
    wanted = [(count, written) for count in slots] + [(count, compiled) for count in compiled_slots]
    best: tuple[Line, Network] | None = None
    for count, network in wanted:
        for method in ("stable-diffusion", "attend-and-excite"):
            try:
                line = measure(model, network, count, method, plan)
            except torch.OutOfMemoryError:
                print(f"{model}: {count} samples do not fit", file=sys.stderr)
                torch.cuda.empty_cache()
                continue
            yield line
            is_better = best is None or line.images_per_s > best[0].images_per_s
            if method != "stable-diffusion" and is_better:
                best = line, network
    if best is not None and whole:
        yield whole_run(model, best[1], best[0].slots, "attend-and-excite", plan, whole)


COLUMNS = {
    "model": "{}",
    "what": "{}",
    "slots": "{}",
    "images_per_s": "{:.3g}",
    "peak": "{:.0%}",
    "step_ms": "{:.1f}",
    "host_ms": "{:.1f}",
    "later_ms": "{:.1f}",
    "later_host_ms": "{:.1f}",
    "decode_ms": "{:.1f}",
    "memory_gib": "{:.1f}",
    "compile_s": "{:.0f}",
}


def cells(line: Line) -> str:
    values = asdict(line)
    shown = ["" if values[n] is None else how.format(values[n]) for n, how in COLUMNS.items()]
    return f"| {' | '.join(shown)} |"


def head() -> str:
    return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Images per second on one GPU, of this engine and of diffusers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--models", default="sd15,sdxl", help="architectures")
    parser.add_argument("--slots", default="1,8,16,32,64", help="samples in flight")
    parser.add_argument("--compiled", default="8,32", help="slots to measure compiled; '' for none")
    parser.add_argument("--whole", type=int, default=50, help="steps of the whole run; 0 for none")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16, float32")
    parser.add_argument("--json", type=Path, help="write every line to this file, too")
    parser.add_argument("--dry", action="store_true", help="narrow networks on the CPU: a test")
    options = parser.parse_args(given)
    warnings.filterwarnings("ignore", module="torch.functional")
    plan = Plan(dtype=options.dtype)
    if options.dry:
        plan = replace(
            plan, device="cpu", dtype="float32", narrow=True, warm=1, timed=1, diffusers_steps=2
        )
    elif not torch.cuda.is_available():
        parser.error("there is no GPU; --dry runs narrow networks on the CPU")
    found = {"device": torch.cuda.get_device_name() if plan.on_gpu else "cpu"}
    found |= {"torch": torch.__version__, "dtype": plan.dtype}
    print(", ".join(found.values()))
    print(head(), flush=True)
    made: list[Line] = []
    for model in options.models.split(","):
        slots = [
            [int(one) for one in some.split(",") if one]
            for some in (options.slots, options.compiled)
        ]
        for line in lines(model, *slots, plan, options.whole):
            print(cells(line), flush=True)
            made.append(line)
            if options.json:
                whole = {**found, "lines": [asdict(one) for one in made]}
                options.json.write_text(json.dumps(whole, indent=1))


if __name__ == "__main__":
    main()
