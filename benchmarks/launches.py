"""What one step of the engine asks of a GPU: kernels, and how often the host waits for it.

Counted on the CPU with a small pipeline of any family, since both depend on the network's architecture and the number
of slots, not on its width. All samples are guided in the first step, and none in the second.
"""

from __future__ import annotations

import argparse
from dataclasses import astuple, dataclass
from typing import Any

from aae_batch import Engine, Request
from aae_batch.sampling.config import GuidanceConfig
from benchmarks.counting_device import NAME, Counts, counting

PROMPT, SUBJECTS = "a red circle and a blue square", ["red circle", "blue square"]


@dataclass(frozen=True)
class Step:
    """What a step, or a part of it, asked of the device.

    Attributes:
        statistics: those kernels that make the loss and the statistics from the maps.
    """

    kernels: int
    syncs: int
    statistics: int


def launches(pipe, slots: int, config: GuidanceConfig | None = None) -> tuple[Step, Step, Step]:
    """Return the counts of a guided and of an unguided step with `slots` samples, and those of decoding
    them all.

    Args:
        pipe: a pipeline on the CPU. It is moved to the counting device, and of no further use.
    """
    config = (config or GuidanceConfig()).updated(
        num_inference_steps=4, max_iter_to_alter=2, thresholds={}
    )
    with counting() as counts:
        pipe.to(NAME)
        engine = Engine.from_pipeline(pipe, slots=slots)
        with engine.open(config) as batch:
            observing = _count_inside(batch, "_observe", counts)
            finishing = _count_inside(batch, "_finish", counts)
            for seed in range(slots):
                batch.add(Request(PROMPT, SUBJECTS, seed=seed))
            steps = []
            for _ in range(4):  # the first step fills caches
                before = Step(counts.kernels, counts.syncs, observing.kernels)
                batch.step()
                now = Step(counts.kernels, counts.syncs, observing.kernels)
                steps.append(
                    Step(*(b - a for a, b in zip(*map(astuple, (before, now)), strict=True)))
                )
    return steps[1], steps[2], Step(finishing.kernels, finishing.syncs, 0)


def _count_inside(of: Any, method: str, counts: Counts) -> Counts:
    """Return counts that only calls of a method add to."""
    inside, own = Counts(), getattr(of, method)

    def counted(*arguments: Any) -> Any:
        before, waited = counts.kernels, counts.syncs
        try:
            return own(*arguments)
        finally:
            inside.kernels += counts.kernels - before
            inside.waits["inside"] = inside.syncs + counts.syncs - waited

    setattr(of, method, counted)
    return inside


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--model", default="shapes", help="an embedded model, a folder or a hub id")
    parser.add_argument("--slots", default="1,8,32", help="numbers of samples in flight")
    parser.add_argument("--scheduler", help="default: the model's own")
    options = parser.parse_args()
    from aae_batch.sampling.model.loading import default_guidance, load_pipeline

    config = default_guidance(options.model).updated(scheduler=options.scheduler)
    heads = (
        "slots",
        "guided: kernels",
        "of them statistics",
        "waits",
        "not guided: kernels",
        "waits",
    )
    heads = (*heads, "decoding: kernels", "waits")
    print(f"| {' | '.join(heads)} |")
    print(f"|{'---|' * len(heads)}")
    for slots in map(int, options.slots.split(",")):
        pipe = load_pipeline(options.model, device="cpu", dtype="float32")
        guided, plain, end = launches(pipe, slots, config)
        cells = (slots, guided.kernels, guided.statistics, guided.syncs, plain.kernels, plain.syncs)
        cells = (*cells, end.kernels, end.syncs)
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
