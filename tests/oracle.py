"""Guided sampling as the papers write it: one picture, one step after the other, nothing shared.

Algorithm 1 of Attend-and-Excite (Chefer et al., SIGGRAPH 2023, arXiv 2301.13826) for any loss of attention
maps, with what the paper leaves to the authors' code: the factor 100 before the softmax over words, the blur,
the falling step size, and one update more after a refinement has reached its threshold. It knows nothing of
`aae_batch`, so that the engine is not compared with itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Cross-attention [height, width, tokens], self-attention [places, places], the step -> the loss, and what it
has reached of its threshold. Both maps are the mean over heads and layers."""


class Network(Protocol):
    """A network with its text encoders and its scheduler, as a pipeline of diffusers calls them."""

    scheduler: Any
    dtype: torch.dtype
    channels: int
    """Of the latents."""

    def set_timesteps(self, scheduler, steps: int, size: tuple[int, int]) -> None:
        """Of latents of this size."""

    def texts(self, prompt: str, negative_prompt: str) -> tuple[Any, Any]:
        """The prompt and what guidance goes away from, encoded."""

    def predict(self, latents: Tensor, t: Tensor, text: Any) -> Tensor:
        """The prediction for [1, channels, height, width]."""

    def look(self, latents: Tensor, t: Tensor, text: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and what `Loss` takes: cross-attention and self-attention."""

    def close(self) -> None:
        """Leave the pipeline as it was."""


class Maps:
    """Processors that do what diffusers' `AttnProcessor` does, and keep the attention of the layers whose maps
    have `size`."""

    def __init__(self, unet, size: tuple[int, int]) -> None:
        self.size = size
        self.cross: list[Tensor] = []
        self.own: list[Tensor] = []
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
        if hidden_states.shape[1] == math.prod(self.size):
            (self.own if encoder_hidden_states is None else self.cross).append(probabilities)
        return attn.to_out[0](attn.batch_to_head_dim(probabilities @ value))

    def clear(self) -> None:
        self.cross.clear()
        self.own.clear()

    def mean(self) -> tuple[Tensor, Tensor]:
        """Over layers and heads: [height, width, tokens] and [places, places]."""
        cross, own = (torch.cat(layers).mean(dim=0) for layers in (self.cross, self.own))
        return cross.unflatten(0, self.size), own

    def close(self) -> None:
        self.unet.set_attn_processor(self.originals)


def blur(map: Tensor, sigma: float = 0.5) -> Tensor:
    """[height, width] under upstream's 3 x 3 bell, rounded to float32 as it is there; borders reflect.

    The bell is exp(-(x / 2 sigma)^2), which is wider than a Gaussian of `sigma`.
    """
    offsets = torch.tensor([-1.0, 0.0, 1.0])
    bell = 1 / (sigma * math.sqrt(2 * math.pi)) * torch.exp(-((offsets / (2 * sigma)) ** 2))
    kernel = torch.outer(bell, bell)
    kernel = (kernel / kernel.sum()).to(map)
    wide = torch.cat([map[:, 1:2], map, map[:, -2:-1]], dim=1)
    wide = torch.cat([wide[1:2], wide, wide[-2:-1]])
    height, width = map.shape
    return sum(
        kernel[y, x] * wide[y : y + height, x : x + width] for y in range(3) for x in range(3)
    )


def compete(cross: Tensor, words: slice | list[int]) -> Tensor:
    """The softmax over words at each place, [height, width, tokens]; 0 at the positions outside `words`."""
    shares = torch.zeros_like(cross)
    shares[:, :, words] = (100 * cross[:, :, words]).softmax(dim=-1)
    return shares


def pool(maps: Tensor, tokens: Sequence[int], pooling: str) -> Tensor:
    """[height, width]: the maps of some tokens as one, by "sum" or "max"."""
    some = maps[:, :, list(tokens)]
    return some.sum(dim=-1) if pooling == "sum" else some.max(dim=-1).values


def attend_and_excite(
    cross: Tensor,
    affinity: Tensor,
    step: int,
    subjects: Sequence[Sequence[int]],
    words: slice | list[int],
    pooling: str,
) -> tuple[Tensor, Tensor]:
    """The loss of the paper's section 3, and the attention of the most neglected subject.

    Args:
        subjects: positions of each subject's tokens.
        words: the positions that compete in the softmax over words.
        pooling: "sum" or "max" over a subject's tokens.
    """
    shares = compete(cross, words)
    peaks = [blur(pool(shares, tokens, pooling)).max() for tokens in subjects]
    neglected = torch.stack(peaks).min()
    return 1 - neglected, neglected


@dataclass(frozen=True)
class Search:
    """InitNO's search for the start noise (Guo et al., CVPR 2024, arXiv 2404.04650, section 3).

    Attributes:
        rounds: each begins with other noise.
        steps: noises tried in a round.
        learning_rate: of Adam.
        target: what a noise must have reached to be taken.
        most_divergence: KL(N(mean, variance), N(0, 1)), the mean over elements.
    """

    rounds: int
    steps: int
    learning_rate: float
    target: float
    most_divergence: float

    def run(self, noise: Tensor, draw: Callable[[], Tensor], look) -> tuple[Tensor, int]:
        """The noise that is taken, and how many were tried.

        Args:
            noise: of the first round.
            draw: draws that of another round.
            look: noise -> the loss, what it has reached, and its gradient in the noise.
        """
        found: list[tuple[float, Tensor]] = []
        for turn in range(self.rounds):
            drawn = noise if turn == 0 else draw()
            mean, log_variance = torch.zeros_like(drawn), torch.zeros_like(drawn)
            adam = torch.optim.Adam([mean, log_variance], lr=self.learning_rate, eps=1e-3)
            for _ in range(self.steps):
                tried = mean + (log_variance / 2).exp() * drawn
                _, reached, gradient = look(tried)
                found.append((reached, tried))
                if reached > self.target:
                    return tried, len(found)
                mean.grad = gradient
                log_variance.grad = gradient * (log_variance / 2).exp() * drawn / 2
                adam.step()
                divergence = (mean**2 + log_variance.exp() - log_variance - 1).mean() / 2
                if divergence > self.most_divergence:
                    back = (self.most_divergence / divergence) ** 0.5
                    mean *= back
                    log_variance *= back
        _, best = max(found, key=lambda pair: pair[0])
        return best, len(found)


class UNet:
    """Stable Diffusion 1 and 2.

    Args:
        size: of the maps.
    """

    def __init__(self, pipe, size: tuple[int, int]) -> None:
        self.pipe, self.scheduler = pipe, pipe.scheduler
        self.dtype, self.channels = pipe.unet.dtype, pipe.unet.config.in_channels
        self.maps = Maps(pipe.unet, size)

    def set_timesteps(self, scheduler, steps: int, size: tuple[int, int]) -> None:
        scheduler.set_timesteps(steps)

    def texts(self, prompt: str, negative_prompt: str) -> tuple[Any, Any]:
        return self.pipe.encode_prompt(prompt, "cpu", 1, True, negative_prompt=negative_prompt)

    def predict(self, latents: Tensor, t: Tensor, text: Any) -> Tensor:
        return self.pipe.unet(latents, t, encoder_hidden_states=text).sample

    def look(self, latents: Tensor, t: Tensor, text: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.maps.clear()
        predicted = self.predict(latents, t, text)
        return predicted, *self.maps.mean()

    def close(self) -> None:
        self.maps.close()


def nurse(
    pipe, prompt: str, loss: Loss, *, map_size: tuple[int, int], **how: Any
) -> tuple[Tensor, int]:
    """`guide` with Stable Diffusion 1 or 2."""
    return guide(UNet(pipe, map_size), prompt, loss, **how)


def guide(
    network: Network,
    prompt: str,
    loss: Loss,
    *,
    seed: int,
    steps: int,
    size: tuple[int, int],
    thresholds: dict[int, float],
    guided_steps: int,
    guidance_scale: float,
    scale_factor: float,
    scale_range: tuple[float, float],
    most_refinements: int,
    negative_prompt: str = "",
    scheduler=None,
    search: Search | None = None,
) -> tuple[Tensor, int]:
    """The final latents [channels, height, width], and how many refinements were made and noises tried.

    Args:
        size: of the latents.
        thresholds: step -> what `loss` must have reached.
    """
    scheduler = (
        type(network.scheduler).from_config(network.scheduler.config)
        if scheduler is None
        else scheduler
    )
    network.set_timesteps(scheduler, steps, size)
    positive, negative = network.texts(prompt, negative_prompt)
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, network.channels, *size)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=network.dtype)

    timesteps = scheduler.timesteps
    # Flow matching has latents that the network sees as they are, and noise of the first step's size.
    scaled = getattr(scheduler, "scale_model_input", lambda latents, t: latents)
    sigma = getattr(scheduler, "init_noise_sigma", 1.0)

    def unit(t: Tensor) -> float:
        """How much of a change of the latents the network sees."""
        return scaled(torch.ones(1, dtype=torch.float64), t).item()

    def look(latents: Tensor, i: int) -> tuple[float, float, Tensor]:
        """The loss, what it has reached, and its gradient where the network sees the latents."""
        t = timesteps[i]
        seen = scaled(latents, t).detach().requires_grad_(True)
        with torch.enable_grad():
            _, *maps = network.look(seen, t, positive)
            value, reached = loss(*maps, i)
            (gradient,) = torch.autograd.grad(value, seen)
        return value.item(), reached.item(), gradient

    refinements = 0
    with torch.no_grad():
        noise = draw()
        if search is not None:

            def look_at_noise(noise: Tensor) -> tuple[float, float, Tensor]:
                value, reached, gradient = look(noise * sigma, 0)
                return value, reached, gradient * unit(timesteps[0]) * sigma

            noise, refinements = search.run(noise, draw, look_at_noise)
        latents = noise * sigma

        for i, t in enumerate(timesteps):
            share = i / max(len(timesteps) - 1, 1)
            scale = scale_range[0] + (scale_range[1] - scale_range[0]) * share
            step_size = scale_factor * math.sqrt(scale) / unit(t)

            if guided := i < guided_steps or i in thresholds:
                value, reached, gradient = look(latents, i)
                target = thresholds.get(i, -math.inf)
                made, on_target = 0, reached >= target
                while made < most_refinements and not on_target:
                    # Upstream asks what was reached before the update, so one update more is made.
                    on_target = reached >= target
                    latents = latents - step_size * gradient
                    value, reached, gradient = look(latents, i)
                    made += 1
                refinements += made
                if i < guided_steps and value:
                    latents = latents - step_size * gradient

            seen = scaled(latents, t)
            noise, *maps = network.look(seen, t, positive)
            if not guided:
                loss(*maps, i)  # A loss may remember the maps of the step before.
            if guidance_scale > 1:
                without = network.predict(seen, t, negative)
                noise = without + guidance_scale * (noise - without)
            latents = scheduler.step(noise, t, latents).prev_sample
    network.close()
    return latents[0], refinements
