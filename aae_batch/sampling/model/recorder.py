"""Record a network's attention maps as it runs, and end the forward after the last map needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from aae_batch.errors import ModelError
from aae_batch.sampling.objectives.maps import on_device, sent

ALL, NONE = slice(None), slice(0)

_WIDTHS = 8
"""Fused attention takes values of a multiple of this width."""


_SAME_ATTENTION = (AttnProcessor, SlicedAttnProcessor, XFormersAttnProcessor)
"""Processors that compute what `AttnProcessor2_0` does, without `scaled_dot_product_attention`."""


class Complete(Exception):
    """Raised inside a network's forward once the last map is recorded; the rest need not be
    computed."""


@dataclass(frozen=True)
class Layer:
    """An attention layer to record.

    Attributes:
        module: has a `processor`, as diffusers' attention layers do.
        queries: the image's queries, if the layer has others too.
        keys: the text's keys, if the layer has others too. None records affinity: how strongly the
            image's positions attend to each other.
        with_affinity: records affinity too, between the positions of `queries`, as shares of what
            they attend to each other.
    """

    module: Any
    queries: slice = field(default_factory=lambda: ALL)
    keys: slice | None = field(default_factory=lambda: ALL)
    with_affinity: bool = False


class AttentionRecorder:
    """Records the attention of some layers while a network runs, as the mean over all their heads.

    Every attention processor of diffusers ends in `F.scaled_dot_product_attention`, which receives
    queries and keys after norms and rotary embeddings. The recorder intercepts that call inside
    each layer's own processor, and only in a recorded forward: otherwise attention runs unchanged,
    fused if it was fused. Processors that compute the same without that call, such as those of
    attention slicing, are replaced in a recorded forward. After one, `close` restores the original
    processors; it must follow the backward, in which gradient checkpointing runs layers again.

    Cross-attention maps equal those of `AttentionStore.aggregate_attention` in diffusers'
    `StableDiffusionAttendAndExcitePipeline`.

    Args:
        compiled: the network is compiled, or a part of it.

    Raises:
        ModelError: a processor has weights of its own.
    """

    def __init__(self, layers: Sequence[Layer], compiled: bool = False) -> None:
        for layer in layers:
            processor = layer.module.processor
            if isinstance(processor, torch.nn.Module):
                raise ModelError(
                    f"The attention of this pipeline has been replaced by {type(processor).__name__}, "
                    "which cannot be guided; unload it, e.g. by unload_ip_adapter() for an IP-Adapter, "
                    "or by unet.set_default_attn_processor() for Custom Diffusion."
                )
        self.layers = layers
        self._as_written = _uncompiled if compiled else nullcontext
        self._originals = [layer.module.processor for layer in layers]
        self._watched = [_watched(self, layer) for layer in layers]
        self._recording = self._stop_early = False
        self._rows = self._affinity_rows = ALL
        self._maps, self._affinity = _Mean(), _Mean()
        self._columns = _Columns()
        self._texts = sum(layer.keys is not None for layer in layers)

    @property
    def maps(self) -> Tensor:
        """Maps of the last recorded forward, [rows, queries, text keys], float32 or better. If
        all keys are text, rows sum to 1 over them, and all are recorded."""
        return self._columns.whole(self._maps.value())

    @property
    def affinity(self) -> Tensor:
        """Affinity of the last recorded forward, [rows, queries, keys], over the image's
        positions; rows sum to 1 over keys."""
        return self._affinity.value()

    @contextmanager
    def recording(
        self,
        rows: slice = ALL,
        affinity_rows: slice = NONE,
        stop_early: bool = False,
        columns: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """Record the forward run inside the block.

        Args:
            rows: batch rows whose maps to record, e.g. the conditional half.
            affinity_rows: batch rows whose affinity to record.
            stop_early: end the forward, and with it the block, at the last map.
            columns: which of the text's keys to record, all if None; others cost less and have maps
                of 0. A layer whose keys are all text records all.

        Raises:
            ModelError: a layer's attention cannot be intercepted.
        """
        self._rows, self._affinity_rows = rows, affinity_rows
        self.begin(columns)
        try:
            with self._watching(stop_early), self._as_written():
                yield
        except Complete:
            pass
        if self._maps.layers != self._texts:
            names = {type(original).__name__ for original in self._originals}
            raise ModelError(
                "The attention of this pipeline cannot be read, because its processors "
                f"({', '.join(sorted(names))}) do not call scaled_dot_product_attention once; call "
                "set_default_attn_processor() on its network."
            )

    def is_of(self, layers: Sequence[Layer]) -> bool:
        """True if it records these layers, with the processors that they have now."""
        processors = [layer.module.processor for layer in layers]
        return list(self.layers) == list(layers) and all(
            own is now for own, now in zip(self._originals, processors, strict=True)
        )

    @property
    def records_whole(self) -> bool:
        """True if each layer's keys are all text, or all of the image's positions."""
        return all(layer.keys in (ALL, None) and not layer.with_affinity for layer in self.layers)

    @contextmanager
    def recording_whole(self, affinity: bool) -> Iterator[None]:
        """Let forwards inside the block be recorded, all their rows. Each calls `begin` and `take`, and may be
        compiled: nothing here changes from one to the next."""
        self._rows, self._affinity_rows = ALL, ALL if affinity else NONE
        with self._watching(stop_early=False):
            yield

    def begin(self, columns: Sequence[int] | None = None) -> None:
        """Begin a forward."""
        self._maps, self._affinity = _Mean(), _Mean()
        self._columns = _Columns(columns)

    def take(self, affinity: bool) -> tuple[Tensor, Tensor | None]:
        """Return the maps of a forward, and its affinity if asked for, and forget them."""
        taken = self.maps, self.affinity if affinity else None
        self.begin()
        return taken

    @contextmanager
    def _watching(self, stop_early: bool) -> Iterator[None]:
        self._recording, self._stop_early = True, stop_early
        for layer, watched in zip(self.layers, self._watched, strict=True):
            layer.module.processor = watched
        try:
            yield
        finally:
            self._recording = False

    def close(self) -> None:
        """Restore the network's original attention processors, until the next `recording`."""
        for layer, original in zip(self.layers, self._originals, strict=True):
            layer.module.processor = original

    def _wants(self, layer: Layer) -> bool:
        """True if `layer` is to be recorded in this forward.

        With gradients enabled and outside `recording`, it is a layer that gradient checkpointing
        runs again in the backward, where it must compute the same as the first time.
        """
        if not (self._recording or torch.is_grad_enabled()):
            return False
        return layer.keys is not None or self._affinity_rows != NONE

    def _read(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        """Replace a `scaled_dot_product_attention` over [batch, heads, places, width]."""
        if layer.keys == ALL:  # the whole softmax is needed, so compute it once, for the layer too
            seen = _probabilities(query, key, **how)
            self._add(self._maps, seen[self._rows])
            return seen.to(value.dtype) @ value
        if layer.keys is None:
            rows = self._affinity_rows
            self._add(self._affinity, _probabilities(query[rows], key[rows], **_of(how, rows)))
        else:
            if layer.with_affinity and self._affinity_rows != NONE:
                rows, image = self._affinity_rows, layer.queries
                some = query[rows, :, image], key[rows]
                whole = _probabilities(*some, **_of(how, rows, image))[..., image]
                self._add(self._affinity, whole / whole.sum(dim=-1, keepdim=True))
            rows, queries = self._rows, layer.queries
            how_some = _of(how, rows, queries)
            seen = self._columns.of(query[rows, :, queries], key[rows], layer.keys, **how_some)
            self._add(self._maps, seen)
        return F.scaled_dot_product_attention(query, key, value, **how)

    def _add(self, mean: _Mean, probabilities: Tensor) -> None:
        if not self._recording:
            return
        mean.add(probabilities)
        if self._stop_early and self._maps.layers == self._texts:
            raise Complete


def _uncompiled() -> AbstractContextManager[Any]:
    """Run compiled modules as they were written inside the block, because an intercepted forward would
    be compiled anew each time."""
    return torch.compiler.set_stance("force_eager")


def is_compiled(network: torch.nn.Module) -> bool:
    """True if a network, or a part of it, is compiled. Does not import the compiler."""
    return any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        for module in network.modules()
    )


class _Mean:
    """Running mean over the heads of all layers, each [batch, heads, queries, keys]."""

    def __init__(self) -> None:
        self.layers = self.heads = 0
        self._sum: Tensor | None = None

    def add(self, probabilities: Tensor) -> None:
        total = probabilities.sum(dim=1)
        self._sum = total if self._sum is None else self._sum + total
        self.layers += 1
        self.heads += probabilities.shape[1]

    def value(self) -> Tensor:
        if self._sum is None:
            raise RuntimeError("nothing was recorded: run the network inside recording() first")
        return self._sum / self.heads


class _Columns:
    """Some columns of a softmax without forming the rest: attention over one-hot values.

    Args:
        chosen: which of the text's keys; all if None.
    """

    def __init__(self, chosen: Sequence[int] | None = None) -> None:
        self._chosen = chosen
        self._keys = 0
        self._one_hot: Tensor | None = None

    def of(self, query: Tensor, key: Tensor, keys: slice, **how: Any) -> Tensor:
        """Return the chosen ones of the columns `keys`, [batch, heads, queries, chosen]. All layers
        have the same keys."""
        query, key = _precise(query, key)
        if how.get("attn_mask") is not None and how["attn_mask"].dtype != torch.bool:
            how["attn_mask"] = how["attn_mask"].to(query.dtype)
        places = range(key.shape[2])[keys]
        if self._one_hot is None:
            self._keys = len(places)
            some = places if self._chosen is None else [places[one] for one in self._chosen]
            width = -(-len(some) // _WIDTHS) * _WIDTHS
            one_hot = torch.zeros(key.shape[2], width, dtype=key.dtype)
            one_hot[list(some), range(len(some))] = 1
            self._one_hot = sent(one_hot, key.device)
        values = self._one_hot.expand(*key.shape[:2], *self._one_hot.shape)
        seen = F.scaled_dot_product_attention(query, key, values, **how)
        return seen[..., : self._keys if self._chosen is None else len(self._chosen)]

    def whole(self, maps: Tensor) -> Tensor:
        """Put the columns in their places among all of the text's, and 0 in the others."""
        if self._chosen is None or self._one_hot is None:
            return maps
        index = on_device(self._chosen, maps.device)
        zeros = maps.new_zeros(*maps.shape[:-1], self._keys)
        return zeros.index_copy(-1, index, maps)


def _watched(recorder: AttentionRecorder, layer: Layer) -> Callable[..., Any]:
    """Return a layer's own processor, with its call of `scaled_dot_product_attention` intercepted if
    needed."""
    original = layer.module.processor
    readable = AttnProcessor2_0() if type(original) in _SAME_ATTENTION else original

    class Watched:
        # Layers inspect the signature for the arguments that their processor takes.
        @wraps(type(original).__call__)
        def __call__(self, *arguments: Any, **named: Any) -> Any:
            if not recorder._wants(layer):
                return original(*arguments, **named)
            with _Watch(recorder, layer):
                return readable(*arguments, **named)

    return Watched()


class _Watch(TorchFunctionMode):
    def __init__(self, recorder: AttentionRecorder, layer: Layer) -> None:
        super().__init__()
        self._recorder, self._layer = recorder, layer

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None):
        named = named or {}
        if function is F.scaled_dot_product_attention:
            return self._recorder._read(self._layer, *arguments, **named)
        return function(*arguments, **named)


def _precise(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Cast to float32 at least: guidance takes another softmax of the result, scaled by 100."""
    kind = torch.promote_types(query.dtype, torch.float32)
    return query.to(kind), key.to(kind)


def _probabilities(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the softmax inside `scaled_dot_product_attention`, [batch, heads, queries, keys]."""
    query, key = _precise(query, key)
    if enable_gqa:  # several heads of queries share one of keys
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    batch = query.shape[:2]
    scores = torch.baddbmm(
        query.new_empty(()) if attn_mask is None else _flat_mask(attn_mask, query, key),
        query.flatten(0, 1),
        key.flatten(0, 1).mT,
        beta=0 if attn_mask is None else 1,
        alpha=query.shape[-1] ** -0.5 if scale is None else scale,
    )
    return scores.softmax(dim=-1).view(*batch, *scores.shape[1:])


def _flat_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return a mask as an addend to the scores, [batch * heads, queries, keys]."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    shape = (*query.shape[:3], key.shape[2])
    return mask.to(query.dtype).expand(shape).flatten(0, 1)


def _of(how: dict[str, Any], rows: slice, queries: slice = ALL) -> dict[str, Any]:
    """Return the attention arguments for some rows and queries."""
    mask = how.get("attn_mask")
    if mask is None:
        return how
    if mask.dim() == 4:
        mask = mask[rows] if mask.shape[0] > 1 else mask
        mask = mask[:, :, queries] if mask.shape[2] > 1 else mask
    return how | {"attn_mask": mask}
