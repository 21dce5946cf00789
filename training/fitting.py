"""The training loop: data-parallel on one machine, and resumable."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Place:
    """Where this process works: its rank among the workers, the device, the folder of the run."""

    rank: int
    workers: int
    device: torch.device
    folder: Path

    def random(self, seed: int, stage: str, step: int) -> Random:
        """Randomness that depends on the step alone, so that a resumed run draws the same."""
        return Random(f"{seed}/{stage}/{step}/{self.rank}")

    def log(self, **values) -> None:
        if self.rank == 0:
            print(
                " ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                    for k, v in values.items()
                ),
                flush=True,
            )
            with (self.folder / "curve.jsonl").open("a") as file:
                file.write(json.dumps(values) + "\n")

    def together(self) -> None:
        """Wait until every worker is here."""
        if self.workers > 1:
            dist.barrier()


def fit(
    stage: str,
    module: nn.Module,
    batch_loss: Callable[[nn.Module, int], dict[str, Tensor]],
    steps: int,
    lr: float,
    decay: float,
    ema: float | None,
    place: Place,
) -> None:
    """Minimise `batch_loss(module, step)["loss"]` with AdamW, and leave the (averaged) weights in `module`.

    Every worker holds the whole model and its own part of a batch. The state is saved every 200
    steps; where there is one, training goes on from it.
    """
    checkpoint = place.folder / f"{stage}.pt"
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    warmup, falling = 100, decay * steps
    schedule = LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup, max((steps - step) / falling, 0.0))
    )
    average = (
        EMAModel(parameters, decay=ema, inv_gamma=1, power=3 / 4, use_ema_warmup=True)
        if ema
        else None
    )
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=place.device, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
        if average:
            average.shadow_params = state["average"]
            average.optimization_step = start

    model = DistributedDataParallel(module) if place.workers > 1 else module
    clock, since = time.monotonic(), 0
    sums: dict[str, float] = {}
    for step in range(start, steps):
        losses = batch_loss(model, step)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if average:
            average.step(parameters)

        since += 1
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = (time.monotonic() - clock) / since
            means = {name: round(total / since, 5) for name, total in sums.items()}
            place.log(
                stage=stage, step=step + 1, of=steps, seconds_a_step=round(seconds, 3), **means
            )
            clock, since, sums = time.monotonic(), 0, {}
        if place.rank == 0 and ((step + 1) % 200 == 0 or step + 1 == steps):
            save(
                checkpoint,
                {
                    "step": step + 1,
                    "module": module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "average": average.shadow_params if average else [],
                },
            )
    if average:
        average.copy_to(parameters)


def save(path: Path, state: object) -> None:
    """Write so that an interrupted save leaves the previous one whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
