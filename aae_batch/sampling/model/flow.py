"""What transformers that are trained by flow matching share: joint attention, a grid of patches,
and schedules of sigmas."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from aae_batch.errors import SettingsError
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.model.family import Network, chosen, named_scheduler
from aae_batch.sampling.model.recorder import Layer

SCHEDULER_CLASSES = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)


class FlowTransformer(Network):
    """Image and text are one sequence, in which every token attends to all others.

    Velocities point from image to noise, and `sigma` is the noise's share, as in diffusers.
    """

    @property
    def network(self) -> Any:
        return self.pipe.transformer

    @property
    def text_length(self) -> int:
        """The number of text tokens in the sequence."""
        return self.max_sequence_length or 0

    @property
    def image_and_text(self) -> tuple[slice, slice]:
        """Where image and text are in the sequence."""
        raise NotImplementedError

    def default_layers(self, count: int) -> Sequence[int]:
        """Return the blocks that guidance reads by default, of `count`."""
        raise NotImplementedError

    def map_size(self, latents: Tensor) -> tuple[int, int]:
        height, width = latents.shape[-2:]
        return height // self.facts.patch, width // self.facts.patch

    def scheduler(self, name: str | None):
        own = self.pipe.scheduler
        if name is None and not own.config.get("use_flow_sigmas", False):
            name = type(own).__name__  # refused by its name if it is none of these
        scheduler = named_scheduler(own, name, SCHEDULER_CLASSES)
        if self._shifts(own) and "mu" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise SettingsError(
                f"scheduler {type(scheduler).__name__!r} cannot shift its schedule with the image's "
                f"size, as this model needs; take {SCHEDULER_CLASSES[0]}."
            )
        return scheduler

    def _shifts(self, scheduler) -> bool:
        """True if the schedule depends on the image's size."""
        return bool(scheduler.config.get("use_dynamic_shifting", False))

    def _mu(self, scheduler, shape: Sequence[int]) -> float:
        """Return the shift of the schedule for an image of this size: linear in its tokens."""
        config = scheduler.config
        tokens = shape[-2] * shape[-1] // self.facts.patch**2
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", self.max_shift)
        slope = (most - least) / (high - low)
        return tokens * slope + least - slope * low

    max_shift = 1.15

    def _layers(self, config: GuidanceConfig) -> list[Layer]:
        if config.attn_res is not None:
            raise SettingsError(
                f"attn_res is {config.attn_res[0]}x{config.attn_res[1]}, but the maps of "
                f"{self.facts.name} have one size only, that of its tokens; choose attn_layers."
            )
        blocks = self.network.transformer_blocks
        numbers = config.attn_layers
        if numbers is None:
            numbers = tuple(self.default_layers(len(blocks)))
        some: list[Any] = chosen(blocks, numbers, "blocks")
        image, text = self.image_and_text
        return [Layer(block.attn, image, text, with_affinity=True) for block in some]


def linear_sigmas(steps: int) -> np.ndarray:
    """Return FLUX's sigmas before the shift: from 1 to 1 / steps."""
    return np.linspace(1.0, 1 / steps, steps)
