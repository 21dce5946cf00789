"""What a manifest will cost: FLOPs, hours on some GPUs, bytes.

Every kind of pass is counted once on the meta device, by running the code that sampling runs, and
multiplied by how often a picture needs it. Hours and bytes are estimates, and say on what they rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aae_batch.errors import SettingsError
from aae_batch.manifest.validate import Work
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.steering import GuidanceSchedule

if TYPE_CHECKING:
    from torch import Tensor

GPUS = {
    "T4": 65,
    "L4": 121,
    "A10G": 70,
    "RTX 4090": 165,
    "A100": 312,
    "H100 SXM": 989,
    "H200": 989,
}
"""Peak TFLOP/s of dense half-precision matrix products with float32 sums, as commonly quoted of their
makers (bfloat16; float16 on T4, which has no other). Where the quote is with sparsity, half of it."""

PNG_BYTES_PER_PIXEL = 1.7
"""About what photo-like pictures take at PNG's level 1; flat ones take far less."""

ROW_BYTES = 400
FIGURES_PER_STEP = 6
MAP_BYTES = 600
"""Of the tables, about: a row of the metadata; a subject's figures, float32 for each step; its last
map, with what names it."""

_PLACES = ((2,), (5,))
"""Two subjects of one token: what the objective is counted with. It is next to nothing."""


@dataclass(frozen=True)
class SamplingPasses:
    """FLOPs of the UNet's passes for one picture.

    Attributes:
        attend: a guided forward, which ends at the last map, with the objective.
        attend_backward: from the loss to the latents.
        denoise: a forward with classifier-free guidance: two rows.
    """

    attend: int
    attend_backward: int
    denoise: int


@dataclass(frozen=True)
class Assumptions:
    """What cannot be known beforehand.

    Attributes:
        refinements: of a guided picture, on average; none where the settings have no thresholds.
        utilisation: the share of a GPU's peak that is had.
    """

    refinements: float = 20.0
    utilisation: float = 0.4


@dataclass(frozen=True)
class Quote:
    """The price of some pictures."""

    images: int
    flops: float
    gpu_hours: dict[str, float]
    image_bytes: float
    table_bytes: float
    refinements: float
    utilisation: float

    def __str__(self) -> str:
        each = self.flops / self.images
        lines = [
            f"{self.images} images, {in_thousands(each, 'FLOP')} each on average with "
            f"{self.refinements:g} refinements of a guided one, {in_thousands(self.flops, 'FLOP')} in "
            "all",
            f"GPU time at {self.utilisation:.0%} of the peak of half precision: "
            + ", ".join(f"{name} {in_time(hours)}" for name, hours in self.gpu_hours.items()),
            f"bytes, an estimate: images {in_thousands(self.image_bytes, 'B')} as PNG "
            f"({PNG_BYTES_PER_PIXEL} bytes a pixel), tables {in_thousands(self.table_bytes, 'B')}",
        ]
        return "\n".join(lines)


def quote_for(
    work: Counter[Work],
    model: str,
    config: GuidanceConfig,
    assumed: Assumptions = Assumptions(),
    revision: str | None = None,
    s3_endpoint: str | None = None,
) -> Quote:
    """The price of some pictures with a model, of which only the configuration is needed.

    Args:
        work: how many pictures of each kind.

    Raises:
        ModelError: there is no such model, or a configuration of it is missing.
    """
    from aae_batch.sampling.model.skeleton import load_skeleton

    pipe = load_skeleton(model, revision=revision, s3_endpoint=s3_endpoint)
    return quote(work, costs_of(pipe, work, config), config, assumed)


def quote(
    work: Counter[Work], costs: ModelCosts, config: GuidanceConfig, assumed: Assumptions
) -> Quote:
    """The price of some pictures, by what the passes of their model cost."""
    flops = image_bytes = table_bytes = 0.0
    for kind, count in work.items():
        cost, steps = costs.pictures[kind.height, kind.width], costs.steps[kind.num_inference_steps]
        flops += count * picture_flops(kind, steps, cost, config, assumed.refinements)
        image_bytes += count * cost.pixels * PNG_BYTES_PER_PIXEL
        per_subject = FIGURES_PER_STEP * 4 * steps + MAP_BYTES
        table_bytes += count * (ROW_BYTES + kind.subjects * per_subject)
    return Quote(
        images=work.total(),
        flops=flops,
        gpu_hours={
            name: flops / (peak * 1e12 * assumed.utilisation) / 3600 for name, peak in GPUS.items()
        },
        image_bytes=image_bytes,
        table_bytes=table_bytes,
        refinements=assumed.refinements if config.thresholds else 0,
        utilisation=assumed.utilisation,
    )


@dataclass(frozen=True)
class PictureCosts:
    """FLOPs of all passes for one picture of one size.

    Attributes:
        encode: of one prompt.
        decode: from latents to the picture.
        pixels: of the picture.
    """

    sampling: SamplingPasses
    encode: int
    decode: int
    pixels: int


@dataclass(frozen=True)
class ModelCosts:
    """What a model's passes cost, and how many there are.

    Attributes:
        pictures: by height and width, None where the model decides.
        steps: the scheduler's, by `num_inference_steps`.
    """

    pictures: Mapping[tuple[int | None, int | None], PictureCosts]
    steps: Mapping[int, int]


def picture_flops(
    kind: Work, steps: int, cost: PictureCosts, config: GuidanceConfig, refinements: float
) -> float:
    """FLOPs of one picture. Only attend-and-excite has guided passes, and only composable-diffusion
    more rows than the prompt and the negative prompt.

    Args:
        steps: the scheduler's.
    """
    passes = cost.sampling
    rows = kind.conjuncts + (kind.classifier_free or kind.conjuncts > 1)
    flops = steps * passes.denoise * rows / 2 + rows * cost.encode + cost.decode
    if kind.method == "attend-and-excite":
        schedule = GuidanceSchedule(config, steps)
        guided = float(sum(schedule.guides(step) for step in range(steps)))
        if config.thresholds:
            guided += refinements
        flops += guided * (passes.attend + passes.attend_backward)
    return flops


# --- counting ------------------------------------------------------------------------------------


def costs_of(pipe, work: Counter[Work], config: GuidanceConfig) -> ModelCosts:
    """What the passes cost at every size that occurs, and how many steps there are, on a pipeline of
    the meta device.

    Raises:
        SettingsError: the scheduler does not fit Stable Diffusion, or cannot take so many steps.
    """
    import torch

    from aae_batch.sampling.model.unet import StableDiffusion

    model = StableDiffusion(pipe)
    text = pipe.text_encoder.config
    tokens, width = text.max_position_embeddings, pipe.unet.config.cross_attention_dim
    prompt = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    encode = count_flops(lambda: pipe.text_encoder(prompt))
    pictures = {}
    for size in {(kind.height, kind.width) for kind in work}:
        shape = model.latent_shape(*size)
        latents = torch.empty(1, *shape, device="meta")
        pictures[size] = PictureCosts(
            count_sampling(pipe, latents, tokens, width, config.attn_res),
            encode=encode,
            decode=count_flops(lambda latents=latents: pipe.vae.decode(latents)),  # type: ignore[misc]
            pixels=shape[1] * shape[2] * pipe.vae_scale_factor**2,
        )
    scheduler = model.scheduler(config.scheduler)
    steps = {n: _steps(scheduler, n) for n in {kind.num_inference_steps for kind in work}}
    return ModelCosts(pictures, steps)


def _steps(scheduler, num_inference_steps: int) -> int:
    """How many a scheduler takes; PNDM and those that look twice take more than they are asked for."""
    try:
        scheduler.set_timesteps(num_inference_steps)
    except ValueError as error:
        raise SettingsError(
            f"num_inference_steps is {num_inference_steps}, which {type(scheduler).__name__} cannot "
            f"take; use fewer. ({error})"
        ) from None
    return len(scheduler.timesteps)


def count_sampling(
    pipe, latents: Tensor, tokens: int, width: int, attn_res: tuple[int, int] | None = None
) -> SamplingPasses:
    """Count the passes for one picture.

    Args:
        pipe: with a UNet on the meta device.
        latents: [1, channels, height, width], on the meta device.
        tokens, width: of the text encoder's output.
    """
    import torch

    from aae_batch.sampling.model.unet import StableDiffusion
    from aae_batch.sampling.objectives import (
        attend_and_excite_loss,
        excitation,
        normalize_over_words,
        pool_subjects,
        smooth,
    )

    model = StableDiffusion(pipe)
    timesteps = torch.empty(1, device="meta")
    text = torch.empty(1, tokens, width, device="meta")

    def loss(moving: Tensor) -> Tensor:
        maps = model.attend(moving, timesteps, text)
        words = normalize_over_words(maps, torch.empty(1, device="meta"))
        subjects = pool_subjects(words, [_PLACES], "sum")
        return attend_and_excite_loss(
            excitation(smooth(subjects)), torch.empty(1, device="meta")
        ).sum()

    with model.recording_maps(attn_res):
        forward, backward = count_guided(loss, latents)
        two = [torch.cat([tensor, tensor]) for tensor in (latents, timesteps, text)]
        denoise = count_flops(lambda: model.denoise(two[0], two[1], two[2], record=slice(1, None)))
    return SamplingPasses(forward, backward, denoise)


def count_guided(loss: Callable[[Tensor], Tensor], latents: Tensor) -> tuple[int, int]:
    """FLOPs of a guided forward, and of its backward to the latents."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    moving = latents.clone().requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        value = loss(moving)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(value, moving)
    return forward, counter.get_total_flops()


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of what `run` does, without gradients."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


# --- units ---------------------------------------------------------------------------------------


def in_thousands(value: float, unit: str) -> str:
    """With the prefix that leaves up to three digits before the point: `4.58e11` FLOP is 458 GFLOP."""
    prefixes = iter(_PREFIXES)
    prefix = next(prefixes)
    while value >= 999.5 and prefix != _PREFIXES[-1]:
        value, prefix = value / 1000, next(prefixes)
    return f"{_number(value, 3)} {prefix}{unit}"


def in_time(hours: float) -> str:
    """In seconds, minutes or hours."""
    if hours < 2 / 60:
        return f"{_number(hours * 3600, 2)} s"
    return f"{_number(hours * 60, 2)} min" if hours < 2 else f"{_number(hours, 2)} h"


_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def _number(value: float, digits: int) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.{digits}g}"
