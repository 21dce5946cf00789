"""Whole pipelines of known architectures with random weights: as fast as the real ones, and nothing to download."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from training import networks

TEXT_POSITIONS = 77


def stable_diffusion(
    device: str = "cpu", *, narrow: bool = False, vae: AutoencoderKL | None = None
) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5, at 512 pixels. The tokenizer is the embedded model's.

    Args:
        narrow: a network of the same structure that takes seconds on a processor, at 128 pixels.
        vae: instead of its own.
    """
    torch.manual_seed(0)
    words, scheduler = _tokenizer(), networks.scheduler()
    with torch.device(device):
        pipe = StableDiffusionPipeline(
            vae=vae or _vae(narrow, 0.18215),
            text_encoder=_text_encoder(words, 64 if narrow else 768, 12, "quick_gelu", narrow),
            tokenizer=words,
            unet=UNet2DConditionModel(
                sample_size=16 if narrow else 64,
                block_out_channels=(32, 32, 64, 64) if narrow else (320, 640, 1280, 1280),
                layers_per_block=2,
                cross_attention_dim=64 if narrow else 768,
                attention_head_dim=8,
            ),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _ready(pipe, device)


def stable_diffusion_xl(device: str = "cpu", *, narrow: bool = False) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL base 1.0, at 1024 pixels; otherwise as `stable_diffusion`."""
    torch.manual_seed(0)
    words = _tokenizer()
    scheduler = EulerDiscreteScheduler(  # its numbers stay on the host
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    first, second = (32, 64) if narrow else (768, 1280)
    with torch.device(device):
        pipe = StableDiffusionXLPipeline(
            vae=_vae(narrow, 0.13025),
            text_encoder=_text_encoder(words, first, 12, "quick_gelu", narrow),
            text_encoder_2=_text_encoder(words, second, 32, "gelu", narrow, second),
            tokenizer=words,
            tokenizer_2=words,
            unet=UNet2DConditionModel(
                sample_size=32 if narrow else 128,
                block_out_channels=(32, 64, 64) if narrow else (320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 1, 2) if narrow else (1, 2, 10),
                attention_head_dim=(2, 4, 4) if narrow else (5, 10, 20),
                cross_attention_dim=first + second,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=6 * 256 + second,
            ),
            scheduler=scheduler,
        )
    return _ready(pipe, device)


def _tokenizer():
    words = networks.tokenizer()
    words.model_max_length = TEXT_POSITIONS
    return words


def _text_encoder(words, width: int, layers: int, act: str, narrow: bool, projection: int = 0):
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2 if narrow else layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=TEXT_POSITIONS,
        hidden_act=act,
        projection_dim=projection or width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _vae(narrow: bool, scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4 if narrow else (128, 256, 512, 512),
        layers_per_block=1 if narrow else 2,
        latent_channels=4,
        scaling_factor=scaling_factor,
    )


def _ready(pipe, device: str):
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(device).eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
