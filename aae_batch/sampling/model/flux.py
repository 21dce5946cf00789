"""FLUX.1 (dev and schnell), and Chroma, which was made from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aae_batch.sampling import families
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.model.family import TEXT, Bag
from aae_batch.sampling.model.flow import FlowTransformer, linear_sigmas


class Flux(FlowTransformer):
    """The sequence is [T5, image], with rotary positions; CLIP's text is pooled. The network takes
    latents packed: four cells are one token's channels."""

    facts = families.FLUX
    checkpoints = True

    @property
    def channels(self) -> int:
        return self.network.config.in_channels // 4

    @property
    def native_size(self) -> tuple[int, int]:
        return self.pipe.default_sample_size, self.pipe.default_sample_size

    @property
    def image_and_text(self) -> tuple[slice, slice]:
        return slice(self.text_length, None), slice(self.text_length)

    def default_layers(self, count: int) -> Sequence[int]:
        """All blocks in which image and text have weights of their own."""
        return range(count)

    def set_timesteps(self, scheduler, steps: int, shape: Sequence[int]) -> None:
        own = scheduler.config.get("use_flow_sigmas", False)
        sigmas = {"num_inference_steps": steps} if own else {"sigmas": linear_sigmas(steps)}
        scheduler.set_timesteps(mu=self._mu(scheduler, shape), **sigmas)

    def _shifts(self, scheduler) -> bool:
        """Always told the size, as by the pipeline."""
        return True

    def blank(self) -> Bag:
        config = self.network.config
        return {
            TEXT: self._zeros(self.text_length, config.joint_attention_dim),
            "pooled_projections": self._zeros(config.pooled_projection_dim),
            **({"guidance": self._zeros()} if config.guidance_embeds else {}),
        }

    def _embed(self, texts: list[str]) -> Bag:
        words, pooled, _ = self.pipe.encode_prompt(
            texts, None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {TEXT: words, "pooled_projections": pooled}

    def _extras(self, config: GuidanceConfig) -> Bag:
        if not self.network.config.guidance_embeds:
            return {}
        scale = torch.tensor(config.guidance_scale, dtype=torch.float32, device=self.device)
        return {"guidance": scale}

    def _forward(self, latents: Tensor, timesteps: Tensor, text: Bag) -> Tensor:
        height, width = latents.shape[-2:]
        rows, columns = torch.meshgrid(
            torch.arange(height // 2), torch.arange(width // 2), indexing="ij"
        )
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
        words = text[TEXT].shape[1]
        packed = self.network(
            hidden_states=_packed(latents),
            timestep=timesteps.to(latents.dtype) / 1000,
            img_ids=places.to(latents),
            txt_ids=latents.new_zeros(words, 3),
            **text,
        ).sample
        return _unpacked(packed, height, width)


class Chroma(Flux):
    """FLUX without CLIP and without embedded guidance. Its mask leaves padding out but for the
    first token; the pipeline adds it to the scores as a number, as is done here."""

    facts = families.CHROMA

    def blank(self) -> Bag:
        width = self.network.config.joint_attention_dim
        return {
            TEXT: self._zeros(self.text_length, width),
            "attention_mask": self._zeros(self.text_length),
        }

    def _embed(self, texts: list[str]) -> Bag:
        words, _, mask, *_ = self.pipe.encode_prompt(
            texts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {TEXT: words, "attention_mask": mask}

    def _extras(self, config: GuidanceConfig) -> Bag:
        return {}

    def _forward(self, latents: Tensor, timesteps: Tensor, text: Bag) -> Tensor:
        mask = text["attention_mask"]
        tokens = latents.shape[-2] * latents.shape[-1] // 4
        everywhere = torch.cat([mask, mask.new_ones(len(mask), tokens)], dim=1)
        return super()._forward(latents, timesteps, {**text, "attention_mask": everywhere})


def _packed(latents: Tensor) -> Tensor:
    """[batch, channels, height, width] to [batch, tokens, 4 * channels]."""
    parts = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # b c h 2 w 2
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpacked(packed: Tensor, height: int, width: int) -> Tensor:
    parts = packed.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
