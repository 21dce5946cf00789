"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor

from aae_batch.errors import ModelError, SettingsError
from aae_batch.sampling import families
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.model.attention_layers import (
    cross_attention_layers,
    self_attention_layers,
    values_from,
)
from aae_batch.sampling.model.family import TEXT, Bag, Network, chosen, named_scheduler
from aae_batch.sampling.model.recorder import Layer
from aae_batch.sampling.model.shared_prefix import SharedPrefix, prefix_of

SCHEDULER_CLASSES = [*(known.name for known in KarrasDiffusionSchedulers), "LCMScheduler"]
SCHEDULER_CLASSES.remove("DPMSolverSDEScheduler")  # its noise is not that of the row's seed


class StableDiffusion(Network):
    """A UNet that predicts epsilon or v, with cross-attention to CLIP's tokens."""

    facts = families.STABLE_DIFFUSION

    def __init__(self, pipe) -> None:
        super().__init__(pipe)
        self._level = self.facts.level
        self._prefix = SharedPrefix()

    @property
    def network(self) -> UNet2DConditionModel:
        return self.pipe.unet

    unet = network

    @property
    def channels(self) -> int:
        return self.unet.config.in_channels

    @property
    def native_size(self) -> tuple[int, int]:
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def trims_text(self, config: GuidanceConfig) -> bool:
        """Stable Diffusion 2.x, which has OpenCLIP's text encoder of width 1024, is compared with
        its words only, as upstream."""
        of_version_2 = self.unet.config.cross_attention_dim == 1024
        return super().trims_text(config) or (config.normalize_eot is None and of_version_2)

    def check(self, pipe) -> None:
        super().check(pipe)
        if hasattr(pipe, "text_encoder_2") and self.facts is families.STABLE_DIFFUSION:
            raise ModelError(
                f"A {type(pipe).__name__} with a second text encoder cannot be guided as "
                f"{self.facts.name}; load a text-to-image model of it."
            )
        config = pipe.unet.config
        if config.in_channels != pipe.vae.config.latent_channels:
            raise ModelError(
                f"The UNet takes {config.in_channels} channels and the latents have "
                f"{pipe.vae.config.latent_channels}: this looks like an inpainting or depth model; "
                "load the text-to-image one."
            )
        prediction = pipe.scheduler.config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"The scheduler's prediction_type is {prediction!r}; only 'epsilon' and 'v_prediction' "
                "models can be guided."
            )
        if config.get("time_cond_proj_dim") is not None:
            raise ModelError(
                "This UNet takes guidance_scale as an input, as distilled LCM models do, which is not "
                "implemented; load the base model, with an LCM LoRA (--lora) if it must be fast."
            )

    def scheduler(self, name: str | None):
        own = self.pipe.scheduler
        if name is None and type(own).__name__ not in SCHEDULER_CLASSES:
            name = type(own).__name__  # refused by its name
        return named_scheduler(own, name, SCHEDULER_CLASSES)

    @property
    def sizes(self) -> families.Sizes:
        factor = self.pipe.vae_scale_factor
        return families.Sizes.of(self.facts, factor, self.unet.config, self._level)

    def map_size(self, latents: Tensor) -> tuple[int, int]:
        height, width = latents.shape[-2:]
        for _ in range(self._level):  # each level halves, rounding up
            height, width = (height + 1) // 2, (width + 1) // 2
        return height, width

    def blank(self) -> Bag:
        tokens = self.pipe.tokenizer.model_max_length
        return {TEXT: self._zeros(tokens, self.unet.config.cross_attention_dim)}

    def _embed(self, texts: list[str]) -> Bag:
        embeddings, _ = self.pipe.encode_prompt(texts, self.device, 1, False)
        return {TEXT: embeddings}

    def _forward(self, latents: Tensor, timesteps: Tensor, text: Bag) -> Tensor:
        return self.unet(latents, timesteps, encoder_hidden_states=text[TEXT]).sample

    @contextmanager
    def recording_maps(self, config: GuidanceConfig | None = None) -> Iterator[None]:
        with super().recording_maps(config):
            recorded = [layer.module for layer in self._require_recorder().layers]
            with self._prefix.hooked(prefix_of(self.unet, recorded)):
                yield

    def _sharing(self, sample_of: Sequence[int]) -> AbstractContextManager[None]:
        return self._prefix.among(sample_of, self.device)

    def _repeated(self, latents: Tensor, timesteps: Tensor, text: Bag, times: int) -> Tensor:
        samples = len(latents)
        sample_of = torch.arange(samples, device=latents.device).repeat(times)
        with self._prefix.of(samples, sample_of):
            return self._forward(latents[sample_of], timesteps[sample_of], text)

    def _values_from(self, values: Tensor):
        return values_from(self.unet, values)

    def _layers(self, config: GuidanceConfig) -> list[Layer]:
        self._level = self._find_level(config.attn_res)
        cross = cross_attention_layers(self.unet, self._level)
        plain = self_attention_layers(self.unet, self._level)
        pairs = chosen(
            list(zip(cross, plain, strict=True)),
            config.attn_layers,
            "cross-attention layers at that resolution, numbers",
        )
        return [Layer(one) for one, _ in pairs] + [Layer(one, keys=None) for _, one in pairs]

    def _find_level(self, attn_res: tuple[int, int] | None) -> int:
        height, width = self.native_size
        levels = len(self.unet.config.block_out_channels)
        possible = {
            (height >> level, width >> level): level
            for level in range(levels)
            if cross_attention_layers(self.unet, level)
        }
        wanted = attn_res or (height >> self.facts.level, width >> self.facts.level)
        if wanted not in possible:
            have = ", ".join(f"{h}x{w}" for h, w in possible)
            raise SettingsError(
                f"attn_res is {wanted[0]}x{wanted[1]}, but this model has cross-attention at "
                f"{have or 'no resolution'}; choose one of these."
            )
        return possible[wanted]
