"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from aae_batch.errors import ModelError
from aae_batch.sampling import families
from aae_batch.sampling.model.family import TEXT, Bag
from aae_batch.sampling.model.flow import FlowTransformer


class StableDiffusion3(FlowTransformer):
    """The sequence is [image, CLIP, T5]: a word stands in it twice. The image-only attention of
    3.5-medium's dual blocks is not read."""

    facts = families.SD3
    checkpoints = True
    max_shift = 1.16

    def check(self, pipe) -> None:
        super().check(pipe)
        encoder, tokenizer = (
            getattr(pipe, f"{part}_3", None) for part in ("text_encoder", "tokenizer")
        )
        if encoder is not None and tokenizer is None:
            raise ModelError(
                "This pipeline has text_encoder_3 and no tokenizer_3; load the whole model, or both "
                "as None to do without T5."
            )

    @property
    def channels(self) -> int:
        return self.network.config.in_channels

    @property
    def native_size(self) -> tuple[int, int]:
        size = self.network.config.sample_size
        return size, size

    @property
    def text_length(self) -> int:
        """CLIP's tokens and T5's, which are zeros where there is no T5."""
        return self.pipe.tokenizer.model_max_length + super().text_length

    @property
    def image_and_text(self) -> tuple[slice, slice]:
        return slice(None, -self.text_length), slice(-self.text_length, None)

    def default_layers(self, count: int) -> Sequence[int]:
        """The middle third."""
        return range(count // 3, count - count // 3)

    def set_timesteps(self, scheduler, steps: int, shape: Sequence[int]) -> None:
        mu = {"mu": self._mu(scheduler, shape)} if self._shifts(scheduler) else {}
        scheduler.set_timesteps(steps, **mu)

    def blank(self) -> Bag:
        config = self.network.config
        return {
            TEXT: self._zeros(self.text_length, config.joint_attention_dim),
            "pooled_projections": self._zeros(config.pooled_projection_dim),
        }

    def _embed(self, texts: list[str]) -> Bag:
        words, _, pooled, _ = self.pipe.encode_prompt(
            texts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {TEXT: words, "pooled_projections": pooled}

    def _forward(self, latents: Tensor, timesteps: Tensor, text: Bag) -> Tensor:
        return self.network(hidden_states=latents, timestep=timesteps, **text).sample
