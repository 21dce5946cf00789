"""Compute what comes before a UNet's first cross-attention once for all texts of a sample."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, DownBlock2D
from torch import Tensor
from torch.nn import Module

from aae_batch.sampling.model.recorder import is_compiled
from aae_batch.sampling.objectives.maps import on_device


class SharedPrefix:
    """Keeps rows that differ only in their texts from being computed twice before the texts come in.

    Every row still passes through the whole network. Inside `among`, the expensive modules before the
    first cross-attention compute the rows of one text of each sample, and repeat the output for the
    others: they treat rows independently, so nothing else in the network has to know.

    The hooks stay while a run is open and read attributes, because compiled code checks attributes and
    not hooks.
    """

    def __init__(self) -> None:
        self._samples = 0
        self._sample_of: Tensor | None = None

    @contextmanager
    def hooked(self, modules: Sequence[Module]) -> Iterator[None]:
        """Let `among` apply to these modules inside the block."""
        with ExitStack() as stack:
            for module in modules:
                before = module.register_forward_pre_hook(self._once)
                after = module.register_forward_hook(self._for_every_row)
                # Handles have weak references, which are dead where the garbage collector ends a run.
                stack.callback(module._forward_pre_hooks.pop, before.id)
                stack.callback(module._forward_hooks.pop, after.id)
            yield

    @contextmanager
    def among(self, sample_of: Sequence[int], device: torch.device) -> Iterator[None]:
        """Compute each sample's prefix once inside the block.

        Args:
            sample_of: the sample of each row. Shared only if the first rows are samples 0, 1, ..., one
                each; rows of a sample have equal latents and timesteps.
        """
        samples = len(set(sample_of))
        shared = samples < len(sample_of) and list(sample_of[:samples]) == list(range(samples))
        with self.of(samples, on_device(sample_of, device)) if shared else nullcontext():
            yield

    @contextmanager
    def of(self, samples: int, sample_of: Tensor) -> Iterator[None]:
        """Compute the prefix of the first rows, which are one of each sample, for all inside the block."""
        self._samples, self._sample_of = samples, sample_of
        try:
            yield
        finally:
            self._samples, self._sample_of = 0, None

    def _once(self, _: Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._sample_of is None:
            return None
        return tuple(one[: self._samples] if isinstance(one, Tensor) else one for one in arguments)

    def _for_every_row(self, _: Module, __: Any, output: Tensor) -> Tensor | None:
        # Indexing keeps the memory format, which index_select does not.
        return None if self._sample_of is None else output[self._sample_of]


def prefix_of(unet: UNet2DConditionModel, recorded: Collection[Module] = ()) -> list[Module]:
    """Return the modules before the first cross-attention that take most of the time. None if a text
    reaches them as part of the time embedding, as in Stable Diffusion XL, or if the network is
    compiled.

    Args:
        recorded: attention layers that are recorded, which must see all rows.
    """
    if is_compiled(unet) or unet.config.addition_embed_type is not None:
        return []
    modules = [unet.conv_in]
    for block in unet.down_blocks:
        if isinstance(block, DownBlock2D):
            modules += [*block.resnets, *(block.downsamplers or ())]
            continue
        if isinstance(block, CrossAttnDownBlock2D):
            modules += _before_cross_attention(block, recorded)
        break
    return modules


def _before_cross_attention(
    block: CrossAttnDownBlock2D, recorded: Collection[Module]
) -> list[Module]:
    modules, layer = [block.resnets[0]], block.attentions[0]
    if isinstance(layer, Transformer2DModel):
        first = layer.transformer_blocks[0]
        modules.append(layer.proj_in)
        if not first.only_cross_attention:
            modules += [one for one in (first.attn1, first.attn2.to_q) if one not in recorded]
    return modules
