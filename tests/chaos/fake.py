"""Actors whose pictures cost nothing, and which do not import torch: they start in a second."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from aae_batch.errors import NonFiniteError
from aae_batch.generate.worker import GenerateWorker
from aae_batch.request import Request, Result
from tests.chaos import mines
from tests.chaos.picture import SIDE, pixels

PACE = float(os.environ.get("AAE_CHAOS_PACE", "0.01"))
"""Seconds of a step."""

UNLUCKY = "unlucky"
"""While a file of this name lies among the mines, every fourth row fails."""


class MinedWorker(GenerateWorker):
    """The real one, in a field of mines."""

    def __init__(self, context: Any) -> None:
        mines.watch("actor", context.root)
        super().__init__(context)


class FakeWorker(MinedWorker):
    def load(self) -> Any:
        self.context = dataclasses.replace(self.context, threads=None)  # they are torch's
        return super().load()

    def load_engine(self) -> Any:
        return FakeEngine(self.settings.slots)


class FakeEngine:
    model = SimpleNamespace(device=SimpleNamespace(type="cpu"), dtype="float32")

    def __init__(self, slots: int) -> None:
        self.slots = slots

    @contextmanager
    def open(self, config: Any) -> Iterator[FakeBatch]:
        yield FakeBatch(config, self.slots)


class FakeBatch:
    """As `aae_batch.sampling.engine.Batch` is fed and asked. A picture takes one to three steps."""

    def __init__(self, config: Any, slots: int) -> None:
        self.config = config
        self.slots = slots
        self.seconds: dict[str, float] = {}
        self._samples: list[tuple[Request, int]] = []

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def free(self) -> int:
        return self.slots - len(self)

    def expect(self, requests: Iterable[Request]) -> int:
        return sum(1 for _ in requests)

    def add(self, request: Request, give_up_below: float | None = None) -> None:
        if is_unlucky(request.name):
            raise NonFiniteError(request.name, "out of luck")
        self._samples.append((request, random.randint(1, 3)))

    def step(self) -> list[Result]:
        time.sleep(PACE)
        left = [(request, steps - 1) for request, steps in self._samples]
        self._samples = [(request, steps) for request, steps in left if steps]
        return [self._result(request) for request, steps in left if not steps]

    def _result(self, request: Request) -> Result:
        image = Image.frombytes("RGB", (SIDE, SIDE), pixels(request.prompt, request.seed))
        if self.slots > 1:  # what rounding does to neighbours in a batch
            image.putpixel((0, 0), tuple(os.urandom(3)))
        seen: Any = attention(
            request, request.num_inference_steps or self.config.num_inference_steps
        )
        return Result(request, image=image, attention=seen, seconds=PACE)


def is_unlucky(row_id: str) -> bool:
    folder = os.environ.get(mines.FOLDER)
    return (
        folder is not None
        and hashlib.sha256(row_id.encode()).digest()[0] % 4 == 0
        and Path(folder, UNLUCKY).exists()
    )


def attention(request: Request, steps: int) -> Any:
    """Has what an `AttentionRecord` has, whose module imports torch."""
    each = np.linspace(0.1, 0.9, steps, dtype=np.float32)
    per_step = ("max_attention", "mean_attention", "entropy", "center_x", "center_y")
    subjects = [
        SimpleNamespace(
            subject=subject,
            token_indices=(place,),
            tokens=(subject,),
            map=np.full((4, 4), 128, np.uint8),
            map_scale=0.5,
            **dict.fromkeys(per_step, each),
        )
        for place, subject in enumerate(request.subjects or (), 1)
    ]
    return SimpleNamespace(
        subjects=subjects, loss=1 - each, num_refinements=2, final_loss=0.1, neglected=False
    )
