"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952)."""

from __future__ import annotations

import torch
from torch import Tensor

from aae_batch.sampling import families
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.model.family import TEXT, Bag
from aae_batch.sampling.model.unet import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """Two CLIP encoders, side by side in width, with one set of positions. The network also takes
    the pooled text, and the image's size as a condition."""

    facts = families.SDXL

    def encode_negative(self, config: GuidanceConfig) -> Bag:
        """Without a negative prompt this is zeros, if the model was trained so."""
        text = self.encode(config.negative_prompt or "", config)
        if config.negative_prompt is None and self.pipe.config.force_zeros_for_empty_prompt:
            zeros = {name: torch.zeros_like(text[name]) for name in (TEXT, "text_embeds")}
            return {**text, **zeros}
        return text

    def blank(self) -> Bag:
        times = 6 * self.unet.config.addition_time_embed_dim
        pooled = self.unet.add_embedding.linear_1.in_features - times
        return {**super().blank(), "text_embeds": self._zeros(pooled), "time_ids": self._zeros(6)}

    def _embed(self, texts: list[str]) -> Bag:
        words, _, pooled, _ = self.pipe.encode_prompt(
            texts, device=self.device, do_classifier_free_guidance=False
        )
        return {TEXT: words, "text_embeds": pooled}

    def _extras(self, config: GuidanceConfig) -> Bag:
        """Original size, crop and target size, as the pipeline's defaults: the image as it is."""
        factor = self.pipe.vae_scale_factor
        _, height, width = self.latent_shape(config.height, config.width)
        size = (height * factor, width * factor)
        sizes = (*size, 0, 0, *size)
        return {"time_ids": torch.tensor(sizes, dtype=self.dtype, device=self.device)}

    def _forward(self, latents: Tensor, timesteps: Tensor, text: Bag) -> Tensor:
        conditions = {name: text[name] for name in ("text_embeds", "time_ids")}
        return self.unet(
            latents,
            timesteps,
            encoder_hidden_states=text[TEXT],
            added_cond_kwargs=conditions,
        ).sample
