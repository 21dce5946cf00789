"""Reads cross-attention maps out of a UNet, stops its forward once they are known, and gives
cross-attention values of another text than its keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from aae_batch.errors import ModelError


class MapsComplete(Exception):
    """Raised inside a UNet's forward when the last map is recorded; the rest need not be computed."""


class CrossAttentionRecorder:
    """Records the cross-attention maps of one resolution level of a Stable Diffusion UNet.

    Level 0 has the resolution of the latents, each further level half of it. Only the
    cross-attention layers of `level` get a processor of ours, and only while `recording` do they
    form the attention probabilities; at all other times, and in all other layers, attention stays
    as it was, fused where it was fused. `close` puts the original processors back.

    The maps are what `AttentionStore.aggregate_attention` of diffusers'
    `StableDiffusionAttendAndExcitePipeline` returns: the mean over the heads of all those layers.
    """

    def __init__(self, unet: UNet2DConditionModel, level: int) -> None:
        self.layers = cross_attention_layers(unet, level)
        self._originals = [layer.processor for layer in self.layers]
        self._active = False
        self._keep = slice(None)
        self._stop_early = False
        self._sum: Tensor | None = None
        self._layers_seen = 0
        self._heads_seen = 0
        for layer in self.layers:
            layer.processor = _RecordingProcessor(self, layer.processor)

    @property
    def maps(self) -> Tensor:
        """The maps of the last recorded forward: `[batch, queries, tokens]`, rows sum to 1 over tokens."""
        if self._sum is None:
            raise RuntimeError("nothing was recorded: run the UNet inside recording() first")
        return self._sum / self._heads_seen

    @contextmanager
    def recording(self, keep: slice = slice(None), stop_early: bool = False) -> Iterator[None]:
        """Record the forward run inside.

        Args:
            keep: the rows of the batch whose maps are wanted, e.g. the conditional half.
            stop_early: end the forward at the last map; the block then ends there too.
        """
        self._active, self._keep, self._stop_early = True, keep, stop_early
        self._sum, self._layers_seen, self._heads_seen = None, 0, 0
        try:
            yield
        except MapsComplete:
            pass
        finally:
            self._active = False

    def close(self) -> None:
        """Leave the UNet with the attention processors it came with."""
        for layer, original in zip(self.layers, self._originals, strict=True):
            layer.processor = original

    def _add(self, probabilities: Tensor, heads: int) -> None:
        """Take in one layer's probabilities, `[batch * heads, queries, tokens]`."""
        by_head = probabilities.unflatten(0, (-1, heads))[self._keep]
        total = by_head.sum(dim=1)
        self._sum = total if self._sum is None else self._sum + total
        self._layers_seen += 1
        self._heads_seen += heads
        if self._stop_early and self._layers_seen == len(self.layers):
            raise MapsComplete


class _RecordingProcessor:
    """An attention processor that shows its probabilities to a recorder while that one records.

    The formation of the probabilities is `Attention.get_attention_scores` of diffusers, in float32 at
    least: guidance takes their softmax once more, a hundredfold. Otherwise the original processor does
    the work.
    """

    def __init__(self, recorder: CrossAttentionRecorder, original) -> None:
        self.recorder = recorder
        self.original = original

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        if not self.recorder._active:
            return self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs
            )
        precise = torch.promote_types(hidden_states.dtype, torch.float32)
        query = attn.head_to_batch_dim(attn.to_q(hidden_states)).to(precise)
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states)).to(precise)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(
                attention_mask, key.shape[1], len(hidden_states)
            ).to(precise)
        probabilities = attn.get_attention_scores(query, key, attention_mask)
        self.recorder._add(probabilities, attn.heads)

        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        attended = attn.batch_to_head_dim(torch.bmm(probabilities.to(value.dtype), value))
        return attn.to_out[1](attn.to_out[0](attended))


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
    """The cross-attention layers at `level`, or at all, in the order in which a forward runs them."""
    down, up = list(unet.down_blocks), list(unet.up_blocks)
    lowest = len(down) - 1
    blocks = [*enumerate(down), (lowest, unet.mid_block)]
    blocks += [(lowest - i, block) for i, block in enumerate(up)]
    return [
        module
        for at, block in blocks
        if block is not None and level in (None, at)
        for name, module in block.named_modules()
        if name.endswith("attn2") and isinstance(module, Attention)
    ]
