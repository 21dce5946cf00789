"""What fits in memory: slots from a measured probe, and text encoders that leave when they are done."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aae_batch.sampling.model.family import Bag, Network

ON_CPU = 8
"""Slots on a processor, which more would not make faster."""

MOST = 64
SHARE = 0.9
"""Of the free memory that is planned with; the rest is for fragments."""

Peak = Callable[[Callable[[], object]], int]
"""Returns how many bytes a function takes at most, beyond what is taken already."""


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
