"""Tune guidance for a model: a grid over step sizes and the layers that guidance reads.

Every cell generates the same prompts from the same noise. Attention measured at different layers is not
comparable: choose the layers by the images (`--images`), and the step size by attention and images together.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from aae_batch import Engine, GuidanceConfig, Request, Result
from aae_batch.manifest.build.benchmark import PAPER_SETS, benchmark
from aae_batch.methods import BASELINE
from aae_batch.sampling.model.loading import EMBEDDED
from aae_batch.shapes.splits import SPLITS
from aae_batch.shapes.world import caption


def requests_of(model: str, count: int, seed: int) -> list[Request]:
    """Return prompts evenly spaced over the paper's benchmark, or over the embedded models' tuning prompts."""
    if model in EMBEDDED:
        pairs = SPLITS["tuning"].pairs
        prompts = [(caption(pair), tuple(map(str, pair))) for pair in pairs]
    else:
        prompts = [(one.text, one.subjects or ()) for one in benchmark(PAPER_SETS).prompts]
    count = min(count, len(prompts))
    places = [i * len(prompts) // count for i in range(count)]
    return [Request(*prompts[place], seed=seed + i) for i, place in enumerate(places)]


def where(text: str) -> dict[str, Any]:
    """Parse `8-15` (layers), `@32x32` (a UNet's resolution), `0-19@32x32` (both) or `default`."""
    layers, _, size = text.strip().partition("@")
    chosen = {"attn_layers": layers if layers != "default" else "", "attn_res": size}
    return {name: value for name, value in chosen.items() if value}


def grid(options: argparse.Namespace) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Yield each cell's labels and settings: no guidance first, with each choice of layers."""
    layers = [one.strip() for one in options.layers.split(";")]
    for one in layers:
        yield [one, "none", ""], {**where(one), "method": BASELINE}
    for one, update, factor in product(layers, options.updates.split(","), options.scale_factors):
        steering = {"method": options.method, "update": update, "scale_factor": factor}
        yield [one, f"{factor:g}", update], {**where(one), **steering}


def measure(
    engine: Engine, config: GuidanceConfig, requests: list[Request], images: Path | None
) -> list[str]:
    """Return a cell's figures; save its images in a folder, if one is given."""
    start = time.perf_counter()
    results = list(engine.generate(requests, config))
    seconds = (time.perf_counter() - start) / len(requests)
    done = [result for result in results if result.error is None and result.attention is not None]
    if images is not None:
        images.mkdir(parents=True, exist_ok=True)
        for result in done:
            assert result.image is not None
            result.image.save(images / f"{result.request.seed}.png")
    failed = [str(result.error) for result in results if result.error is not None]
    if not done:
        return ["", "", "", f"{seconds:.2f}", f"{len(failed)}: {failed[0]}"]
    records = [result.attention for result in done if result.attention is not None]
    neglected = [one.neglected for one in records if one.neglected is not None]
    return [
        f"{statistics.mean(map(worst, done)):.3f}",
        f"{statistics.mean(neglected):.2f}" if neglected else "",
        f"{statistics.mean(one.num_refinements for one in records):.1f}",
        f"{seconds:.2f}",
        f"{len(failed)}: {failed[0]}" if failed else "0",
    ]


def worst(result: Result) -> float:
    """Return the attention of an image's most neglected subject at the last step."""
    assert result.attention is not None
    return min(float(subject.max_attention[-1]) for subject in result.attention.subjects)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    add = parser.add_argument
    add("model", help="a hub id, a folder, a URL, or 'shapes'")
    add("--scale-factors", type=lambda text: [float(one) for one in text.split(",")], default="20")
    add("--layers", default="default", help="choices, e.g. '8-15;4-19', '@32x32;0-19@32x32'")
    add("--updates", default="latents", help="'latents,velocity' compares both (flow matching)")
    add("--method", default="attend-and-excite")
    add("--prompts", type=int, default=20, help="number of prompts")
    add("--seed", type=int, default=0, help="seed of the first prompt; each has its own")
    add("--steps", type=int, help="denoising steps; default: the model's own")
    add("--max-iter-to-alter", type=int, help="guide the steps before this one")
    add("--slots", type=int, default=8)
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--images", type=Path, help="a folder for the images, one subfolder a cell")
    options = parser.parse_args(arguments)
    engine = Engine.from_pretrained(
        options.model, options.slots, device=options.device, dtype=options.dtype
    )
    common = {"num_inference_steps": options.steps, "max_iter_to_alter": options.max_iter_to_alter}
    common = {name: value for name, value in common.items() if value is not None}
    cells = [
        (labels, engine.defaults.updated(**{**common, **changes}))
        for labels, changes in grid(options)
    ]
    for _, config in cells:
        with engine.open(config):  # complains of layers that the model lacks before the first image
            pass
    requests = requests_of(options.model, options.prompts, options.seed)
    print("| layers | factor | update | attention | neglected | refinements | s/image | failed |")
    print("|---|---|---|---|---|---|---|---|")
    for labels, config in cells:
        folder = options.images and options.images / "_".join(filter(None, labels))
        figures = measure(engine, config, requests, folder)
        print(f"| {' | '.join([*labels, *figures])} |", flush=True)


if __name__ == "__main__":
    main()
