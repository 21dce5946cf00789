"""Methods mixed in batches of 8, against each method in batches of its own: kernels, FLOPs, CPU seconds.

The same rows of every guided method run on the embedded model: method by method, in the order in which the job's worker
takes them, and in turns, so that every batch has all methods. Kernels are the operators that torch runs but for those that
only make views. The embedded network is small: on a larger one the same objectives are a smaller share.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.generate.worker import together
from aae_batch.methods import METHODS
from aae_batch.shapes.splits import SPLITS
from aae_batch.shapes.world import caption

SLOTS = 8
GUIDED = [name for name, method in METHODS.items() if method.is_guided]


class Kernels(TorchDispatchMode):
    """Counts operators that compute something."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        self.count += not function.is_view and "empty" not in str(function)
        return made


def rows_of(method: str, rows: int) -> list[Request]:
    pairs = SPLITS["tuning"].pairs
    return [
        Request(caption(pairs[i]), [str(one) for one in pairs[i]], seed=i, method=method)
        for i in range(rows)
    ]


def cost(engine: Engine, config: GuidanceConfig, batches: list[list[Request]]) -> tuple[float, ...]:
    """Kernels, FLOPs and CPU seconds of some lists of requests, one list after the other."""

    def run() -> None:
        for requests in batches:
            for result in engine.generate(requests, config):
                assert result.error is None

    with Kernels() as kernels, FlopCounterMode(display=False) as flops:
        run()
    start = time.process_time()
    run()
    return kernels.count, flops.get_total_flops(), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed_methods", description=__doc__)
    parser.add_argument("--rows", type=int, default=16, help="of each method")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine.from_pretrained("shapes", slots=SLOTS)
    config = engine.defaults.updated(num_inference_steps=options.steps, max_refinement_steps=5)

    each = [rows_of(method, options.rows) for method in GUIDED]
    in_turns = [request for some in zip(*each, strict=True) for request in some]
    orders = {
        "each method alone": each,
        "as the worker takes them": [together(in_turns, config)],
        "in turns": [in_turns],
    }
    costs = {name: cost(engine, config, batches) for name, batches in orders.items()}
    alone = costs["each method alone"]
    print(
        f"| {len(GUIDED)} methods, {options.rows} rows each, {SLOTS} slots | kernels | FLOPs | CPU s |"
    )
    print("|---|---|---|---|")
    for name, found in costs.items():
        ratios = (f"{value / base:.3f}" for value, base in zip(found, alone, strict=True))
        print(f"| {name} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
