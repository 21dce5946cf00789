"""FLOPs per image: this engine and diffusers' Attend-and-Excite pipeline, on the SD 1.4 architecture.

Each kind of pass is counted once on the meta device, by running the code that sampling runs, and
multiplied by how often each of the two makes it. Counted are the UNet's passes and the objective;
the text encoder and the VAE are the same for both and left out.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
    pipeline_stable_diffusion_attend_and_excite as upstream,
)
from torch import Tensor

from aae_batch.manifest.price import count_flops, count_guided, count_sampling
from aae_batch.sampling.model.unet import StableDiffusion

STEPS, GUIDED_STEPS = 50, 25
SUBJECTS = [2, 5]
REFINEMENTS = {0: 0, 10: 1, 30: 2, 60: 3}
"""Refinements of an image, and the number of steps that make them (at most 20 each)."""


@dataclass(frozen=True)
class Passes:
    """FLOPs of one pass of each kind, for one image."""

    attend: int
    """Our guided forward, which ends at the last map, with the objective."""
    attend_backward: int
    denoise: int
    """Our forward with classifier-free guidance: two rows."""
    composed: int
    """The same of composable-diffusion with two conjuncts: three rows."""
    structured: int
    """The same of structure-diffusion: two rows, with values of another text."""
    upstream_forward: int
    """Diffusers' guided forward, with the objective."""
    upstream_backward: int
    upstream_denoise: int


def sd14_unet(device: str = "meta") -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1.4, without its weights."""
    with torch.device(device):
        return UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        )


def count_passes() -> Passes:
    unet = sd14_unet()
    latents = torch.empty(1, 4, 64, 64, device="meta")
    timesteps = torch.empty(1, device="meta")
    text = torch.empty(1, 77, 768, device="meta")
    pipe = guidable(unet)
    own = count_sampling(pipe, latents, tokens=77, width=768)
    further = _further(pipe, latents, timesteps, text)
    forward, backward, upstream_denoise = _upstream(unet, latents, timesteps, text)
    return Passes(
        own.attend,
        own.attend_backward,
        own.denoise,
        *further,
        forward,
        backward,
        upstream_denoise,
    )


def ours(passes: Passes, refinements: int) -> int:
    """FLOPs of one image: every guided step and every refinement is one forward and one backward."""
    guided = GUIDED_STEPS + refinements
    return guided * (passes.attend + passes.attend_backward) + STEPS * passes.denoise


def theirs(passes: Passes, refinements: int) -> int:
    """FLOPs of one image: a guided forward at all steps, and where a step refines one before and one
    after it."""
    forwards = STEPS + refinements + REFINEMENTS[refinements]
    backwards = GUIDED_STEPS + refinements
    return (
        forwards * passes.upstream_forward
        + backwards * passes.upstream_backward
        + STEPS * passes.upstream_denoise
    )


def guidable(unet: UNet2DConditionModel) -> SimpleNamespace:
    return SimpleNamespace(
        unet=unet,
        vae=SimpleNamespace(config=SimpleNamespace(latent_channels=4)),
        tokenizer=object(),
        text_encoder=object(),
        scheduler=DDIMScheduler(),
        vae_scale_factor=8,
    )


def _further(
    pipe: SimpleNamespace, latents: Tensor, timesteps: Tensor, text: Tensor
) -> tuple[int, int]:
    """A forward of composable-diffusion with two conjuncts, and one of structure-diffusion."""
    model = StableDiffusion(pipe)

    def denoise(rows: int, values: Tensor | None = None) -> int:
        several = [torch.cat([tensor] * rows) for tensor in (latents, timesteps, text)]
        return count_flops(
            lambda: model.denoise(several[0], several[1], several[2], values, slice(1, None))
        )

    with model.recording_maps(None):
        return denoise(3), denoise(2, torch.cat([text] * 2))


def _upstream(
    unet: UNet2DConditionModel, latents: Tensor, timesteps: Tensor, text: Tensor
) -> tuple[int, int, int]:
    store = upstream.AttentionStore((16, 16))
    processors = {
        name: upstream.AttendExciteAttnProcessor(store, name.split("_")[0])
        for name in unet.attn_processors
    }
    store.num_att_layers = len(processors)
    unet.set_attn_processor(processors)

    def loss(moving: Tensor) -> Tensor:
        store.reset()
        unet(moving, timesteps, encoder_hidden_states=text)
        maps = store.aggregate_attention(("up", "down", "mid"))
        words = (maps[:, :, 1:-1] * 100).softmax(dim=-1)
        smoothing = upstream.GaussianSmoothing().to("meta")
        padded = [F.pad(words[None, None, :, :, i - 1], (1,) * 4, mode="reflect") for i in SUBJECTS]
        return (1 - torch.stack([smoothing(image).max() for image in padded])).max()

    forward, backward = count_guided(loss, latents)
    double = [torch.cat([tensor, tensor]) for tensor in (latents, timesteps, text)]
    denoise = count_flops(lambda: unet(double[0], double[1], encoder_hidden_states=double[2]))
    return forward, backward, denoise


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks.flops",
        description="FLOPs per image of this engine and of diffusers' pipeline, on SD 1.4 at 512 px.",
    ).parse_args()
    passes = count_passes()
    plain = passes.upstream_denoise / 2
    print(f"one UNet forward: {plain / 1e12:.3f} TFLOP; in units of it:")
    print(
        f"  our guided forward    {passes.attend / plain:.3f}   backward {passes.attend_backward / plain:.3f}"
    )
    print(
        f"  diffusers' forward    {passes.upstream_forward / plain:.3f}"
        f"   backward {passes.upstream_backward / plain:.3f}"
    )
    print()
    print("| refinements | this engine, TFLOP | diffusers, TFLOP | ratio |")
    print("|---|---|---|---|")
    for refinements in REFINEMENTS:
        mine, other = ours(passes, refinements), theirs(passes, refinements)
        print(f"| {refinements} | {mine / 1e12:.1f} | {other / 1e12:.1f} | {mine / other:.3f} |")
    print()
    print("| method | this engine, TFLOP | times stable-diffusion |")
    print("|---|---|---|")
    for method, denoise in (
        ("stable-diffusion", passes.denoise),
        ("composable-diffusion, two conjuncts", passes.composed),
        ("structure-diffusion", passes.structured),
    ):
        print(f"| {method} | {STEPS * denoise / 1e12:.1f} | {denoise / passes.denoise:.3f} |")


if __name__ == "__main__":
    main()
