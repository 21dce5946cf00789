"""Find the attention layers of a Stable Diffusion UNet, and take values from another text than
keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from aae_batch.errors import ModelError


@contextmanager
def values_from(unet: UNet2DConditionModel, text: Tensor) -> Iterator[None]:
    """Inside the block, cross-attention computes its values from `text`.

    Keys still come from each forward's own `encoder_hidden_states`. Only the input of the layers'
    `to_v` changes, so any attention processor keeps working.

    Args:
        text: [batch, tokens, width].

    Raises:
        ModelError: one fused projection computes both keys and values.
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
    """Return the cross-attention layers at `level` (None: at all levels), in forward order.

    Level 0 has the resolution of the latents; each further level halves it.
    """
    return _layers(unet, "attn2", level)


def self_attention_layers(unet: UNet2DConditionModel, level: int) -> list[Attention]:
    """Return the self-attention layers at `level`, in forward order. Each runs before its block's
    cross-attention."""
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
