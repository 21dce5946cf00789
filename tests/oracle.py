"""Attend-and-Excite as its paper writes it: one picture, one step after the other, nothing shared.

Algorithm 1 of Chefer et al. (SIGGRAPH 2023, arXiv 2301.13826), with what the paper leaves to the authors'
code: the factor 100 before the softmax over words, the blur, the falling step size, and one update more
after a refinement has reached its threshold. It knows nothing of `aae_batch`, so that the engine is not
compared with itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Maps:
    """Processors that do what diffusers' `AttnProcessor` does, and keep the cross-attention maps of
    `size`."""

    def __init__(self, unet, size: tuple[int, int]) -> None:
        self.size = size
        self.seen: list[Tensor] = []
        self.unet, self.originals = unet, unet.attn_processors
        unet.set_attn_processor(self)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(project(source))
            for project, source in (
                (attn.to_q, hidden_states),
                (attn.to_k, context),
                (attn.to_v, context),
            )
        )
        probabilities = (query @ key.transpose(1, 2) * attn.scale).softmax(dim=-1)
        height, width = self.size
        if encoder_hidden_states is not None and hidden_states.shape[1] == height * width:
            self.seen.append(probabilities.reshape(-1, height, width, probabilities.shape[-1]))
        return attn.to_out[0](attn.batch_to_head_dim(probabilities @ value))

    def close(self) -> None:
        self.unet.set_attn_processor(self.originals)


def blur(map: Tensor) -> Tensor:
    """[height, width] under upstream's 3 x 3 bell, rounded to float32 as it is there; borders reflect."""
    offsets = torch.tensor([-1.0, 0.0, 1.0])
    bell = 1 / (0.5 * math.sqrt(2 * math.pi)) * torch.exp(-(offsets**2))
    kernel = torch.outer(bell, bell)
    kernel = (kernel / kernel.sum()).to(map)
    wide = torch.cat([map[:, 1:2], map, map[:, -2:-1]], dim=1)
    wide = torch.cat([wide[1:2], wide, wide[-2:-1]])
    height, width = map.shape
    return sum(
        kernel[y, x] * wide[y : y + height, x : x + width] for y in range(3) for x in range(3)
    )


def attend_and_excite(
    pipe,
    prompt: str,
    subjects: Sequence[Sequence[int]],
    *,
    seed: int,
    steps: int,
    size: tuple[int, int],
    map_size: tuple[int, int],
    thresholds: dict[int, float],
    guided_steps: int,
    guidance_scale: float,
    scale_factor: float,
    scale_range: tuple[float, float],
    most_refinements: int,
    words: slice,
    pooling: str,
    negative_prompt: str = "",
    scheduler=None,
) -> tuple[Tensor, int]:
    """The final latents [channels, height, width], and how many refinements were made.

    Args:
        subjects: positions of each subject's tokens.
        size: of the latents.
        words: the positions that compete in the softmax over words.
        pooling: "sum" or "max" over a subject's tokens.
    """
    scheduler = (
        type(pipe.scheduler).from_config(pipe.scheduler.config) if scheduler is None else scheduler
    )
    scheduler.set_timesteps(steps)
    positive, negative = pipe.encode_prompt(prompt, "cpu", 1, True, negative_prompt=negative_prompt)
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, pipe.unet.config.in_channels, *size)
    latents = torch.randn(shape, generator=generator, dtype=pipe.unet.dtype)
    latents = latents * scheduler.init_noise_sigma
    timesteps = scheduler.timesteps
    maps = Maps(pipe.unet, map_size)

    def look(latents: Tensor, t: Tensor) -> tuple[float, Tensor]:
        """The loss, and its gradient where the UNet sees the latents."""
        seen = scheduler.scale_model_input(latents, t).detach().requires_grad_(True)
        maps.seen.clear()
        with torch.enable_grad():
            pipe.unet(seen, t, encoder_hidden_states=positive)
            mean = torch.cat(maps.seen).mean(dim=0)  # over layers and heads
            shares = (100 * mean[:, :, words]).softmax(dim=-1)
            shortfalls = []
            for tokens in subjects:
                of_tokens = shares[:, :, [token - words.start for token in tokens]]
                of_subject = (
                    of_tokens.sum(dim=-1) if pooling == "sum" else of_tokens.max(dim=-1).values
                )
                shortfalls.append(1 - blur(of_subject).max())
            loss = torch.stack(shortfalls).max().clamp_min(0)
            (gradient,) = torch.autograd.grad(loss, seen)
        return float(loss), gradient

    refinements = 0
    with torch.no_grad():
        for i, t in enumerate(timesteps):
            share = i / max(len(timesteps) - 1, 1)
            scale = scale_range[0] + (scale_range[1] - scale_range[0]) * share
            step_size = scale_factor * math.sqrt(scale)
            unit = scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t).item()

            def update(latents: Tensor, gradient: Tensor) -> Tensor:
                return latents - step_size / unit * gradient  # noqa: B023 - called in this turn

            if i < guided_steps or i in thresholds:
                loss, gradient = look(latents, t)
                target = 1 - thresholds[i] if i in thresholds else math.inf
                made = 0
                while loss > target and made < most_refinements:
                    made += 1
                    # upstream looks anew before each update; that is the loss the loop asks for next
                    loss, gradient = look(latents, t)
                    latents = update(latents, gradient)
                refinements += made
                if made:
                    loss, gradient = look(latents, t)
                if i < guided_steps and loss:
                    latents = update(latents, gradient)

            seen = scheduler.scale_model_input(latents, t)
            noise = pipe.unet(seen, t, encoder_hidden_states=positive).sample
            if guidance_scale > 1:
                without = pipe.unet(seen, t, encoder_hidden_states=negative).sample
                noise = without + guidance_scale * (noise - without)
            latents = scheduler.step(noise, t, latents).prev_sample
    maps.close()
    return latents[0], refinements
