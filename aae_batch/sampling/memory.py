"""What fits in memory: slots from a measured probe, and half as much at once after it ran out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aae_batch.sampling.model.family import Bag, Network

Item = TypeVar("Item")
Made = TypeVar("Made")

ON_CPU = 8
"""Slots on a processor, which more would not make faster."""

MOST = 64
SHARE = 0.9
"""Of the free memory that is planned with; the rest is for fragments."""

Peak = Callable[[Callable[[], object]], int]
"""Returns how many bytes a function takes at most, beyond what is taken already."""

logger = logging.getLogger("aae_batch.sampling.memory")


@dataclass
class AtOnce:
    """How many of something a forward takes: half as many after each time that memory ran out.

    Attributes:
        most: how many.
        what: its name in the log.
    """

    most: int
    what: str

    def fitting(
        self,
        forward: Callable[[list[Item]], Made],
        items: list[Item],
        release: Callable[[], object],
        limit: int | None = None,
    ) -> Iterator[tuple[list[Item], Made]]:
        """Apply `forward` to some items at a time, and yield them with what it returned.

        Args:
            release: called after running out of memory, before the next try.
            limit: of this call; `most` holds too.
        """
        while items:
            now = items[: min(self.most, limit or self.most)]
            try:
                made = forward(now)
            except torch.OutOfMemoryError:
                if len(now) == 1:
                    raise
                half = len(now) // 2
                if limit is not None and limit < self.most:  # others may be smaller
                    limit = half
                else:
                    self.most = half
            else:
                items = items[len(now) :]
                yield now, made
                continue
            logger.warning(
                "out of memory with %d %s, going on with %d", len(now), self.what, self.most
            )
            release()


def measured_slots(model: Network, rows: int) -> int:
    """Return how many samples fit in the device's free memory at the model's native size.

    Runs a guided forward and backward, and a denoising forward, with one sample and with two, as
    `recording_maps` set the model up. Larger images than native need fewer; the engine halves its
    slots when memory runs out.

    Args:
        rows: of the denoising forward, for each sample.
    """
    if model.device.type != "cuda":
        return ON_CPU
    model.make_room()
    free, _ = torch.cuda.mem_get_info(model.device)
    try:
        return slots_for(model, free, _cuda_peak(model.device), rows)
    finally:
        model.release_memory()


def slots_for(model: Network, free: int, peak_of: Peak, rows: int) -> int:
    """Return how many samples fit in `free` bytes, at least 1: every sample is a row of the guided
    pass, and `rows` of the denoising pass."""
    try:
        guided = _line(lambda count: peak_of(lambda: _guided(model, count)))
        denoised = _line(lambda count: peak_of(lambda: _denoised(model, rows * count)))
    except torch.OutOfMemoryError:  # two do not fit
        return 1
    fits = [
        int((SHARE * free - fixed) // a_row) for fixed, a_row in (guided, denoised) if a_row > 0
    ]
    return min([MOST, *(max(1, count) for count in fits)])


def _line(bytes_of: Callable[[int], int]) -> tuple[int, int]:
    """Return what a pass takes by itself, and with every row."""
    one, two = bytes_of(1), bytes_of(2)
    return 2 * one - two, two - one


def _guided(model: Network, rows: int) -> Tensor:
    latents, timesteps, text = _inputs(model, rows)
    latents.requires_grad_(True)
    with torch.enable_grad():
        maps, _ = model.attend(latents.view_as(latents), timesteps, text)
        (gradient,) = torch.autograd.grad(maps.amax(dim=(1, 2)).sum(), latents)
    return gradient


def _denoised(model: Network, rows: int) -> Tensor:
    return model.denoise(*_inputs(model, rows))[0]


def _inputs(model: Network, rows: int) -> tuple[Tensor, Tensor, Bag]:
    shape = model.latent_shape(None, None)
    latents = torch.zeros(rows, *shape, device=model.device, dtype=model.latents_dtype)
    timesteps = torch.full((rows,), 500.0, device=model.device)
    text = {name: torch.stack([one] * rows) for name, one in model.blank().items()}
    return latents, timesteps, text


def _cuda_peak(device: torch.device) -> Peak:
    def peak_of(run: Callable[[], object]) -> int:
        run()  # the first run also takes what libraries keep
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before

    return peak_of
