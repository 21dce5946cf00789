"""Small pipelines of every family, with random weights: large enough that attention differs from place
to place and from word to word."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from training import flow
from training.networks import text_encoder, tokenizer

WIDTH = flow.WIDTH
T5_LENGTH = 12


def _vae(channels: int, **config) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=128,
        **config,
    )


def _sharpen(network, *endings: str, by: float = 3.0) -> None:
    """Make attention differ more than random weights let it."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(endings):
                parameter *= by


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    words = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32, 32),
        transformer_layers_per_block=(1, 1, 2),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        cross_attention_dim=2 * flow.CLIP_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + flow.CLIP_WIDTH,
    )
    _sharpen(unet, "attn2.to_q.weight", "attn2.to_k.weight")
    return StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=flow.clip(words),
        text_encoder_2=flow.clip(words),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    )


def stable_diffusion_3(
    dual: tuple[int, ...] = (), with_t5: bool = True
) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    words, pieces = tokenizer(), flow.t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * flow.CLIP_WIDTH,
        pos_embed_max_size=24,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if dual else None,
    )
    _sharpen(transformer, "attn.to_q.weight", "attn.add_k_proj.weight", by=6)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        vae=_vae(4, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=flow.clip(words),
        tokenizer=words,
        text_encoder_2=flow.clip(words),
        tokenizer_2=words,
        text_encoder_3=flow.t5(pieces) if with_t5 else None,
        tokenizer_3=pieces if with_t5 else None,
    )


def stable_diffusion_35_medium() -> StableDiffusion3Pipeline:
    return stable_diffusion_3(dual=(0, 1, 2))


def flux(guidance_embeds: bool = True) -> FluxPipeline:
    torch.manual_seed(0)
    words, pieces = tokenizer(), flow.t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=128,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance_embeds,
    )
    _sharpen(transformer, "attn.norm_q.weight", "attn.norm_added_k.weight", by=2)
    pipe = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds
        ),
        vae=_vae(4, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=text_encoder(words),
        tokenizer=words,
        text_encoder_2=flow.t5(pieces),
        tokenizer_2=pieces,
    )
    pipe.default_sample_size = 16  # a constant of the class, for images of 1024 pixels
    return pipe


def flux_schnell() -> FluxPipeline:
    return flux(guidance_embeds=False)


def chroma() -> ChromaPipeline:
    torch.manual_seed(0)
    pieces = flow.t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    _sharpen(transformer, "attn.norm_q.weight", "attn.norm_added_k.weight", by=2)
    pipe = ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(4, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=flow.t5(pieces),
        tokenizer=pieces,
    )
    pipe.default_sample_size = 16
    return pipe


PIPELINES: dict[str, Callable] = {
    "SDXL": stable_diffusion_xl,
    "SD3": stable_diffusion_3,
    "SD3.5-medium": stable_diffusion_35_medium,
    "FLUX-dev": flux,
    "FLUX-schnell": flux_schnell,
    "Chroma": chroma,
}
