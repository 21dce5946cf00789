"""The attention layers of a Stable Diffusion UNet, and values of another text than the keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from aae_batch.errors import ModelError


@contextmanager
def values_from(unet: UNet2DConditionModel, text: Tensor) -> Iterator[None]:
    """In every forward run inside, cross-attention makes its values of `text`, and its keys of the
    forward's own `encoder_hidden_states` as ever.

    Only what the layers' `to_v` is given changes, so whichever processor is at work stays there.

    Args:
        text: [batch, tokens, width].

    Raises:
        ModelError: keys and values are made by one fused projection.
    """
    layers = cross_attention_layers(unet)
    if any(layer.fused_projections for layer in layers):
        raise ModelError(
            "The UNet makes keys and values of cross-attention in one fused projection, and "
            "structure-diffusion needs two; call unfuse_qkv_projections() on the pipeline."
        )
    hooks = [layer.to_v.register_forward_pre_hook(lambda *_: (text,)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def cross_attention_layers(unet: UNet2DConditionModel, level: int | None = None) -> list[Attention]:
    """The cross-attention layers at `level`, or at all, in the order in which a forward runs them. Level 0 has
    the resolution of the latents, each further level half of it."""
    return _layers(unet, "attn2", level)


def self_attention_layers(unet: UNet2DConditionModel, level: int) -> list[Attention]:
    """The self-attention layers at `level`, likewise. Each runs before the cross-attention of its block."""
    return _layers(unet, "attn1", level)


def _layers(unet: UNet2DConditionModel, name: str, level: int | None) -> list[Attention]:
    down, up = list(unet.down_blocks), list(unet.up_blocks)
    lowest = len(down) - 1
    blocks = [*enumerate(down), (lowest, unet.mid_block)]
    blocks += [(lowest - i, block) for i, block in enumerate(up)]
    return [
        module
        for at, block in blocks
        if block is not None and level in (None, at)
        for path, module in block.named_modules()
        if path.endswith(name) and isinstance(module, Attention)
    ]
