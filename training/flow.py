"""The embedded model's sibling: Stable Diffusion 3 in miniature, and how it is trained.

It has what that family has: two CLIP encoders side by side, T5 behind them, joint attention in
which image and text are one sequence, and flow matching.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from aae_batch.sampling.model.recorder import AttentionRecorder, Layer
from training import networks
from training.examples import Batch
from training.networks import LATENT_CHANNELS, LATENT_SIZE, MAX_TOKENS, WORDS

CLIP_WIDTH = 64
WIDTH = 128
BLOCKS = 7
GROUNDED_BLOCKS = range(1, 5)
"""Blocks whose maps are grounded, and read by guidance."""

_SPACE = "\u2581"  # T5's mark of a token that begins a word


def t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer with a vocabulary of its own: each word of the world is one token."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(_SPACE + word, -1.0) for word in WORDS]
    pieces += [(letter, -10.0) for letter in (_SPACE, *letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)


def clip(vocabulary) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=CLIP_WIDTH,
            intermediate_size=4 * CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=CLIP_WIDTH,
            bos_token_id=vocabulary.bos_token_id,
            eos_token_id=vocabulary.eos_token_id,
            pad_token_id=vocabulary.pad_token_id,
        )
    )


def t5(vocabulary: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(vocabulary),
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def transformer() -> SD3Transformer2DModel:
    """Patches of 2 x 2: an image is 8 x 8 tokens."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=BLOCKS,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=2 * LATENT_SIZE,
        qk_norm="rms_norm",
    )


def pipeline(vae: AutoencoderKL | None = None, seed: int = 0) -> StableDiffusion3Pipeline:
    """All of it, with weights drawn from `seed`."""
    torch.manual_seed(seed)
    words, pieces = networks.tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae or networks.vae(),
        text_encoder=clip(words),
        tokenizer=words,
        text_encoder_2=clip(words),
        tokenizer_2=words,
        text_encoder_3=t5(pieces),
        tokenizer_3=pieces,
    )


class FlowLoss(nn.Module):
    """The squared error of the predicted velocity along the straight path from image to noise
    (rectified flow, Esser et al. 2024, arXiv 2403.03206), and a grounding loss on the joint
    attention of `GROUNDED_BLOCKS`, as `training.train.DenoisingLoss` has one on cross-attention.

    A caption stands in the sequence twice, in CLIP's tokens and in T5's; the grounding asks for
    half of the attention to text at each.
    """

    def __init__(self, pipe: StableDiffusion3Pipeline, grounding_weight: float) -> None:
        super().__init__()
        self.transformer = pipe.transformer
        self.encoders = nn.ModuleList([pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3])
        self.tokenizers = [pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3]
        self.grounding_weight = grounding_weight
        image = (LATENT_SIZE // 2) ** 2
        self.recorder = AttentionRecorder(
            [
                Layer(self.transformer.transformer_blocks[i].attn, slice(image), slice(image, None))
                for i in GROUNDED_BLOCKS
            ]
        )

    def encode(self, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return text [batch, CLIP and T5 tokens, width] and pooled text [batch, width], as the
        pipeline's `encode_prompt` makes them, but with gradients."""
        ids = [
            tokenizer(
                captions,
                padding="max_length",
                max_length=MAX_TOKENS,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(device)
            for tokenizer in self.tokenizers
        ]
        first, second = (
            encoder(tokens, output_hidden_states=True)
            for encoder, tokens in zip(self.encoders[:2], ids[:2], strict=True)
        )
        of_t5 = self.encoders[2](ids[2])[0]
        of_clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        return torch.cat([of_clip, of_t5], dim=-2), pooled

    def forward(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        text, pooled = self.encode(batch.captions, device)
        latents = batch.latents.to(device)
        noise = torch.randn_like(latents)
        sigmas = torch.randn(len(latents), device=device).sigmoid()
        share = sigmas[:, None, None, None]
        noisy = (1 - share) * latents + share * noise
        with self.recorder.recording():
            predicted = self.transformer(
                hidden_states=noisy,
                timestep=1000 * sigmas,
                encoder_hidden_states=text,
                pooled_projections=pooled,
            ).sample
        velocity = F.mse_loss(predicted.float(), noise - latents)

        looked = self.recorder.maps
        looked = (looked / looked.sum(dim=-1, keepdim=True)).clamp_min(1e-6).log()
        at_clip = batch.grounding.to(device)
        # T5 has no start token: its positions are one less, and its last, padding, stands for the rest
        at_t5 = at_clip.roll(-1, dims=-1)
        target = torch.cat([at_clip, at_t5], dim=-1) / 2
        off = -(target * looked).sum(dim=-1).mean(dim=-1)
        grounding = off[batch.grounded.to(device)].mean()
        return {
            "loss": velocity + self.grounding_weight * grounding,
            "velocity": velocity.detach(),
            "grounding": grounding.detach(),
        }
