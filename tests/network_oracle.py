"""Networks of other families than Stable Diffusion 1 and 2 for `oracle.py`, called as their pipelines in
diffusers call them, and their attention as a dense softmax. Like `oracle.py` this knows nothing of `aae_batch`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.oracle import UNet
from tests.pipelines import T5_LENGTH


class Dense(TorchFunctionMode):
    """Inside the block, keeps the whole softmax of the attention of some layers, of a single picture: each
    [heads, queries, keys]."""

    def __init__(self, layers: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self._awaited = False
        self._hooks = [layer.register_forward_pre_hook(self._await) for layer in layers]

    def _await(self, *_: Any) -> None:
        self._awaited = True

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function is F.scaled_dot_product_attention and self._awaited:
            self._awaited = False
            query, key, *_ = (*arguments, named.get("query"), named.get("key"))
            scores = query[0] @ key[0].transpose(1, 2) / math.sqrt(query.shape[-1])
            if (mask := named.get("attn_mask")) is not None:
                assert mask.is_floating_point()  # a number that is added to the scores
                scores = scores + mask[0]
            self.seen.append(scores.softmax(dim=-1))
        return function(*arguments, **named)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()


class StableDiffusionXL(UNet):
    """`StableDiffusionXLPipeline` at its default sizes and crop.

    Args:
        size: of the maps, half the latents'.
        zeros: guidance goes away from nothing, instead of from an empty prompt.
    """

    def __init__(self, pipe, size: tuple[int, int], zeros: bool = False) -> None:
        super().__init__(pipe, size)
        self.zeros = zeros

    @torch.no_grad()
    def texts(self, prompt: str, negative_prompt: str) -> tuple[Any, Any]:
        words, without, pooled, pooled_without = self.pipe.encode_prompt(
            prompt,
            device="cpu",
            do_classifier_free_guidance=True,
            negative_prompt=None if self.zeros else negative_prompt,
        )
        return (words, pooled), (without, pooled_without)

    def predict(self, latents: Tensor, t: Tensor, text: Any) -> Tensor:
        words, pooled = text
        size = [8 * side for side in latents.shape[-2:]]
        conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[*size, 0, 0, *size]])}
        return self.pipe.unet(
            latents, t, encoder_hidden_states=words, added_cond_kwargs=conditions
        ).sample


class _Joint:
    """Image and text are one sequence, and an image's token is four cells of the latents.

    Args:
        blocks: whose attention guidance reads.
        length: T5's number of tokens.
    """

    def __init__(self, pipe, blocks: Sequence[int], length: int = T5_LENGTH) -> None:
        self.pipe, self.scheduler = pipe, pipe.scheduler
        self.network, self.dtype = pipe.transformer, pipe.transformer.dtype
        self.blocks, self.length = blocks, length

    def look(self, latents: Tensor, t: Tensor, text: Any) -> tuple[Tensor, Tensor, Tensor]:
        height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
        layers = [self.network.transformer_blocks[number].attn for number in self.blocks]
        with Dense(layers) as dense:
            predicted = self.predict(latents, t, text)
        assert len(dense.seen) == len(layers)
        whole = torch.cat(dense.seen)
        image, words = self.where(height * width)
        cross = whole[:, image, words].mean(dim=0)
        among = whole[:, image, image]
        own = (among / among.sum(dim=-1, keepdim=True)).mean(dim=0)
        return predicted, cross.unflatten(0, (height, width)), own

    def where(self, places: int) -> tuple[slice, slice]:
        """The image's and the text's part of the sequence."""
        raise NotImplementedError

    def predict(self, latents: Tensor, t: Tensor, text: Any) -> Tensor:
        raise NotImplementedError

    def close(self) -> None:
        pass


class StableDiffusion3(_Joint):
    """`StableDiffusion3Pipeline`: the image, then the text."""

    @property
    def channels(self) -> int:
        return self.network.config.in_channels

    def set_timesteps(self, scheduler, steps: int, size: tuple[int, int]) -> None:
        scheduler.set_timesteps(steps)

    @torch.no_grad()
    def texts(self, prompt: str, negative_prompt: str) -> tuple[Any, Any]:
        words, without, pooled, pooled_without = self.pipe.encode_prompt(
            prompt, None, None, negative_prompt=negative_prompt, max_sequence_length=self.length
        )
        return (words, pooled), (without, pooled_without)

    def predict(self, latents: Tensor, t: Tensor, text: Any) -> Tensor:
        words, pooled = text
        return self.network(
            hidden_states=latents,
            timestep=t.expand(1),
            encoder_hidden_states=words,
            pooled_projections=pooled,
        ).sample

    def where(self, places: int) -> tuple[slice, slice]:
        return slice(places), slice(places, None)


class Flux(_Joint):
    """`FluxPipeline`: the text, then the image, which is packed.

    Attributes:
        guidance: the scale that the network itself takes; None if it takes none.
    """

    guidance: float | None = None

    @property
    def channels(self) -> int:
        return self.network.config.in_channels // 4

    def set_timesteps(self, scheduler, steps: int, size: tuple[int, int]) -> None:
        tokens = size[0] * size[1] // 4
        mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)

    @torch.no_grad()
    def texts(self, prompt: str, negative_prompt: str) -> tuple[Any, Any]:
        positive, negative = (
            self.pipe.encode_prompt(text, None, max_sequence_length=self.length)
            for text in (prompt, negative_prompt)
        )
        return positive, negative

    def predict(self, latents: Tensor, t: Tensor, text: Any) -> Tensor:
        words, pooled, text_places = text
        guidance = None if self.guidance is None else torch.full([1], self.guidance)
        return self._packed(
            latents,
            t,
            encoder_hidden_states=words,
            txt_ids=text_places,
            pooled_projections=pooled,
            guidance=guidance,
        )

    def _packed(self, latents: Tensor, t: Tensor, **text: Any) -> Tensor:
        _, channels, height, width = latents.shape
        packed = self.pipe._pack_latents(latents, 1, channels, height, width)
        places = self.pipe._prepare_latent_image_ids(
            1, height // 2, width // 2, "cpu", latents.dtype
        )
        predicted = self.network(
            hidden_states=packed, timestep=t.expand(1).to(latents) / 1000, img_ids=places, **text
        ).sample
        return self.pipe._unpack_latents(predicted, 8 * height, 8 * width, 8)

    def where(self, places: int) -> tuple[slice, slice]:
        return slice(self.length, None), slice(self.length)


class Chroma(Flux):
    """`ChromaPipeline`: its mask of the padding is a number that diffusers adds to the scores."""

    @torch.no_grad()
    def texts(self, prompt: str, negative_prompt: str) -> tuple[Any, Any]:
        encoded = self.pipe.encode_prompt(
            prompt, negative_prompt, max_sequence_length=self.length, device="cpu"
        )
        return encoded[:3], encoded[3:]

    def predict(self, latents: Tensor, t: Tensor, text: Any) -> Tensor:
        words, text_places, mask = text
        tokens = latents.shape[-2] * latents.shape[-1] // 4
        everywhere = torch.cat([mask, torch.ones(1, tokens, dtype=torch.bool)], dim=1)
        return self._packed(
            latents,
            t,
            encoder_hidden_states=words,
            txt_ids=text_places,
            attention_mask=everywhere,
        )
