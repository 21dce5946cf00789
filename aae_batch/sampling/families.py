"""The families of models that can be guided: what is known about each without loading it.

This module does not import torch, because prompts are checked without it. The networks behind the
names are in `aae_batch.sampling.model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aae_batch.errors import SettingsError
from aae_batch.sampling.words import Stream, Tokenizer, embeddings_of

if TYPE_CHECKING:
    from aae_batch.sampling.config import GuidanceConfig


@dataclass(frozen=True)
class Sizes:
    """What height and width of an image may be, in pixels.

    Attributes:
        multiple: both are a multiple of this.
        least: the smallest; maps have two cells a side or more, which smoothing needs.
        most: the largest that the network has positions for; None without a limit.
    """

    multiple: int
    least: int
    most: int | None = None

    @classmethod
    def of(cls, family: Family, factor: int, config: Mapping[str, Any], level: int) -> Sizes:
        """Return those of a model.

        Args:
            factor: pixels per latent cell.
            config: its network's configuration.
            level: how often a UNet has halved the latents' side where guidance reads; halves round
                up.
        """
        multiple, positions = factor * family.patch, config.get("pos_embed_max_size")
        least = max(4 * multiple, (multiple << level) + multiple)
        return cls(multiple, least, positions and positions * multiple)

    def why_not(self, name: str, pixels: int) -> str | None:
        """Return what is wrong with a height or width, else None."""
        least, most = self.least, self.most
        if pixels % self.multiple == 0 and least <= pixels <= (most or pixels):
            return None
        upper = f" and at most {most}" if most else ""
        return f"{name} is {pixels}; it must be a multiple of {self.multiple}, and at least {least}{upper}"


@dataclass(frozen=True)
class Reader:
    """A tokenizer whose tokens the network attends to, under diffusers' names.

    Attributes:
        folder: the tokenizer's subfolder.
        encoder: the text encoder's; without one the network sees zeros.
        name: what reports call it.
        is_bounded: `max_sequence_length` is its number of positions, not the tokenizer's own.
    """

    folder: str
    encoder: str
    name: str
    is_bounded: bool = False


CLIP = Reader("tokenizer", "text_encoder", "CLIP")
_ONE = ("vae", "scheduler", "tokenizer", "text_encoder")
_TWO = (*_ONE, "tokenizer_2", "text_encoder_2")


@dataclass(frozen=True)
class Family:
    """Facts about a family of models.

    Attributes:
        name: what messages and docs call it.
        network: `"module:class"` of its implementation.
        examples: well-known models of it, by their hub ids.
        parts: the components that it cannot do without, under diffusers' names.
        readers: the text that its network attends to, in this order.
        patch: latent cells per side of one of the network's tokens; 1 for a UNet.
        level: how often a UNet has halved the latents' side where guidance reads by default.
        max_sequence_length: default of that setting, as in its pipeline; None without a bounded
            reader.
        defaults: other settings whose default is that of its pipeline.
        is_guidance_embedded: `guidance_scale` is an input of the network, and classifier-free
            guidance has `true_cfg_scale`.
        trims_text: compares a subject with the words up to the end token, not with the padding.
        is_flow: trained by flow matching: it predicts velocities.
        has_cross_attention: values of cross-attention may come from another text than keys.
        has_textual_inversion: its pipeline writes out the vectors of embeddings in a prompt.
    """

    name: str
    network: str
    examples: tuple[str, ...]
    parts: tuple[str, ...]
    readers: tuple[Reader, ...] = (CLIP,)
    patch: int = 1
    level: int = 0
    max_sequence_length: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    is_guidance_embedded: bool = False
    trims_text: bool = True
    is_flow: bool = False
    has_cross_attention: bool = False
    has_textual_inversion: bool = True

    def classifier_free(self, config: GuidanceConfig) -> float:
        """Return the scale of classifier-free guidance; 1 or less is none."""
        return config.true_cfg_scale if self.is_guidance_embedded else config.guidance_scale

    def rows(self, config: GuidanceConfig) -> int:
        """Return how many rows of a denoising forward a prompt takes: two with classifier-free
        guidance."""
        return 2 if self.classifier_free(config) > 1 else 1

    def sequence_length(self, wanted: int | None) -> int | None:
        """Return the number of positions of a bounded reader; None if the family has no such reader.

        Raises:
            SettingsError: a number is wanted of a family that has none.
        """
        if wanted is not None and self.max_sequence_length is None:
            raise SettingsError(
                f"max_sequence_length is {wanted}, but {self.name} reads prompts of a fixed length; "
                "leave it out."
            )
        return wanted or self.max_sequence_length

    def streams(
        self, tokenizers: Mapping[str, Tokenizer], max_sequence_length: int | None
    ) -> tuple[Stream, ...]:
        """Return how the network reads prompts.

        Args:
            tokenizers: by their folders; readers without one are left out.
            max_sequence_length: None for the family's own.

        Raises:
            SettingsError: see `sequence_length`.
        """
        bounded = self.sequence_length(max_sequence_length)
        streams: list[Stream] = []
        offset = 0
        for reader in self.readers:
            tokenizer = tokenizers.get(reader.folder)
            if tokenizer is None:
                continue
            length = tokenizer.model_max_length
            if reader.is_bounded:
                length = bounded or length
            embeddings = embeddings_of(tokenizer) if self.has_textual_inversion else {}
            streams.append(Stream(tokenizer, length, offset, reader.name, embeddings))
            offset += length
        return tuple(streams)


STABLE_DIFFUSION = Family(
    "Stable Diffusion 1 and 2",
    "aae_batch.sampling.model.unet:StableDiffusion",
    (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "CompVis/stable-diffusion-v1-4",
    ),
    ("unet", *_ONE),
    level=2,  # maps of 16 x 16 for latents of 64 x 64, as in the paper
    trims_text=False,
    has_cross_attention=True,
)
SIZES = Sizes.of(STABLE_DIFFUSION, 8, {}, STABLE_DIFFUSION.level)
"""Those of Stable Diffusion 1 and 2."""

SDXL = Family(
    "Stable Diffusion XL",
    "aae_batch.sampling.model.sdxl:StableDiffusionXL",
    (
        "stabilityai/stable-diffusion-xl-base-1.0",
        "stabilityai/sdxl-turbo",
    ),
    ("unet", *_TWO),
    level=1,  # ten layers at 64 x 64, against sixty at 32 x 32 (see docs/models.md)
    defaults={"guidance_scale": 5.0},
    has_cross_attention=True,
)
SD3 = Family(
    "Stable Diffusion 3",
    "aae_batch.sampling.model.sd3:StableDiffusion3",
    (
        "stabilityai/stable-diffusion-3.5-medium",
        "stabilityai/stable-diffusion-3.5-large",
    ),
    ("transformer", *_TWO),
    readers=(CLIP, Reader("tokenizer_3", "text_encoder_3", "T5", is_bounded=True)),
    patch=2,
    is_flow=True,
    max_sequence_length=256,
    defaults={"guidance_scale": 7.0, "num_inference_steps": 28},
    has_textual_inversion=False,
)
FLUX = Family(
    "FLUX.1",
    "aae_batch.sampling.model.flux:Flux",
    (
        "black-forest-labs/FLUX.1-dev",
        "black-forest-labs/FLUX.1-schnell",
    ),
    ("transformer", *_TWO),
    readers=(Reader("tokenizer_2", "text_encoder_2", "T5", is_bounded=True),),
    patch=2,
    is_flow=True,
    max_sequence_length=512,
    defaults={"guidance_scale": 3.5, "num_inference_steps": 28},
    is_guidance_embedded=True,
)
CHROMA = Family(
    "Chroma",
    "aae_batch.sampling.model.flux:Chroma",
    ("lodestones/Chroma1-HD",),
    ("transformer", *_ONE),
    readers=(Reader("tokenizer", "text_encoder", "T5", is_bounded=True),),
    patch=2,
    is_flow=True,
    max_sequence_length=512,
    defaults={"guidance_scale": 5.0, "num_inference_steps": 35},
)

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionAttendAndExcitePipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": FLUX,
    "ChromaPipeline": CHROMA,
}
"""Families by the class of a pipeline, `_class_name` in its `model_index.json`."""


def family_of(kind: type) -> Family | None:
    """Return the family of a pipeline's class: its own, or that of the class that it was made from. A
    class of diffusers made from another does something else than text-to-image."""
    for one in kind.__mro__:
        if one.__name__ in FAMILIES:
            return FAMILIES[one.__name__]
        if one.__module__.startswith("diffusers."):
            return None
    return None


def why_not_guidable(pipeline: str) -> str:
    """Return one sentence's end about a pipeline class that is in no family."""
    names = ", ".join(dict.fromkeys(family.name for family in FAMILIES.values()))
    return f"a {pipeline}, which cannot be guided; use a text-to-image model of {names}"
