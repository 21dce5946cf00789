"""The embedded model's parts, untrained: an ordinary Stable Diffusion pipeline, only small."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from aae_batch.shapes.world import COLOURS, SHAPES, SIZE

LATENT_SIZE = SIZE // 8
LATENT_CHANNELS = 8
MAX_TOKENS = 16
TEXT_WIDTH = 128

WORDS = ("a", "and", *COLOURS, *SHAPES)
"""All that captions of the world are made of."""

_END = "</w>"  # CLIP's mark of a token that ends a word


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with a vocabulary of its own: each word of the world is one token.

    Every merge ends a word: it joins a letter to the rest of the word behind it. In any word only its
    last two pieces can be such a pair, so the order of the merges plays no part, and no word's merges
    can break another word, as `(r, e)` of "red" would break "green".
    """
    alphabet = byte_alphabet()
    endings = [letter + _END for letter in alphabet]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for start in range(len(word) - 2, -1, -1):
            merge = (word[start], word[start + 1 :] + _END)
            if merge not in merges:
                merges.append(merge)
    tokens = [*alphabet, *endings, *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=MAX_TOKENS,
    )


def text_encoder(vocabulary: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=vocabulary.bos_token_id,
            eos_token_id=vocabulary.eos_token_id,
            pad_token_id=vocabulary.pad_token_id,
        )
    )


def vae() -> AutoencoderKL:
    """8x down, as Stable Diffusion's."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIZE,
        scaling_factor=1.0,  # the latents are normalised inside the quantisation convolutions
    )


def unet() -> UNet2DConditionModel:
    """Cross-attention at half the latents' resolution (8 x 8) and in the middle (4 x 4)."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=2,  # diffusers' name for the number of heads
        cross_attention_dim=TEXT_WIDTH,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """All of it, with weights drawn from `seed`."""
    torch.manual_seed(seed)
    words = tokenizer()
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(words),
        tokenizer=words,
        unet=unet(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def byte_alphabet() -> list[str]:
    """The printable stand-ins for the 256 bytes that byte-level BPE works on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
