"""Estimates the cost of a manifest: FLOPs, bytes, and GPU hours at a given throughput.

FLOPs of each kind of model pass are counted once, by running the sampling code on the meta device, and
multiplied by the number of passes per image. Bytes are estimates from the constants below.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aae_batch.errors import SettingsError
from aae_batch.manifest.validate import Work
from aae_batch.methods import METHODS
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.steering import GuidanceSchedule

if TYPE_CHECKING:
    from torch import Tensor

    from aae_batch.sampling.model.family import Network

REFINEMENTS = 20.0
"""Assumed mean number of refinements of a guided image, if no other value is given."""

PNG_BYTES_PER_PIXEL = 1.7
"""Approximate size of photo-like images at PNG level 1; images with flat areas are far smaller."""

ROW_BYTES = 400
FIGURES_PER_STEP = 6
MAP_BYTES = 600
"""Approximate table sizes: bytes of a metadata row, float32 figures per subject and step, and bytes of a
subject's last map with its labels."""

WORDS = range(32)
"""Assumed tokens of a prompt's words: with joint attention, recording costs by their number."""

_PLACES = ((2,), (5,))
"""Token positions of the two subjects with which the objective is counted; its FLOPs are negligible."""


@dataclass(frozen=True)
class Quote:
    """The cost of a set of images.

    Attributes:
        gpu_hours: None without `tflops`.
        refinements: assumed mean number of refinements of an image whose method refines.
        tflops: measured sustained TFLOP/s of the GPU.
    """

    images: int
    flops: float
    gpu_hours: float | None
    image_bytes: float
    table_bytes: float
    refinements: float
    tflops: float | None

    def __str__(self) -> str:
        lines = [
            f"{self.images} images, {in_thousands(self.flops / self.images, 'FLOP')} each on average "
            f"with {self.refinements:g} refinements of a guided one, "
            f"{in_thousands(self.flops, 'FLOP')} in all",
            f"bytes, an estimate: images {in_thousands(self.image_bytes, 'B')} as PNG "
            f"({PNG_BYTES_PER_PIXEL} bytes a pixel), tables {in_thousands(self.table_bytes, 'B')}",
        ]
        if self.gpu_hours is not None:
            time = in_time(self.gpu_hours)
            lines.insert(1, f"GPU time at a sustained {self.tflops:g} TFLOP/s: {time}")
        return "\n".join(lines)


@dataclass(frozen=True)
class SamplingPasses:
    """FLOPs of the network's passes for one image.

    Attributes:
        attend: a guided forward, which stops at the last attention map, and Attend-and-Excite's objective.
        attend_backward: the backward from that loss to the latents.
        denoise: a forward with classifier-free guidance (batch of two).
        shared: what the second row saves, because it begins like the first.
        map_bytes: height x width of a subject's attention map.
    """

    attend: int
    attend_backward: int
    denoise: int
    shared: int
    map_bytes: int

    def denoising(self, rows: int, shares: bool) -> float:
        """Return the FLOPs of a step with so many rows of one sample.

        Args:
            shares: classifier-free guidance, whose two rows are in one forward. Those of further
                conjuncts are in others, and share nothing.
        """
        return rows * (self.denoise + self.shared) / 2 - shares * self.shared


@dataclass(frozen=True)
class PictureCosts:
    """FLOPs of one image: passes of the network, encoding of one prompt and VAE decoding; and its pixels."""

    sampling: SamplingPasses
    encode: int
    decode: int
    pixels: int


@dataclass(frozen=True)
class ModelCosts:
    """The cost of a model's passes, and the number of steps.

    Attributes:
        pictures: (height, width) in pixels, None for the model's default -> costs.
        steps: `num_inference_steps` -> number of scheduler steps.
    """

    pictures: Mapping[tuple[int | None, int | None], PictureCosts]
    steps: Mapping[int, int]


def quote_for(
    work: Counter[Work],
    model: str,
    config: GuidanceConfig,
    *,
    refinements: float = REFINEMENTS,
    tflops: float | None = None,
    revision: str | None = None,
    s3_endpoint: str | None = None,
) -> Quote:
    """Return the cost of a set of images, loading only the configuration of the model.

    Args:
        work: number of images of each kind.
        refinements, tflops: see `Quote`.

    Raises:
        ModelError: the model does not exist, or one of its configuration files is missing.
    """
    from aae_batch.sampling.model.skeleton import load_skeleton

    pipe = load_skeleton(model, revision=revision, s3_endpoint=s3_endpoint)
    return quote(work, costs_of(pipe, work, config), config, refinements, tflops)


def quote(
    work: Counter[Work],
    costs: ModelCosts,
    config: GuidanceConfig,
    refinements: float = REFINEMENTS,
    tflops: float | None = None,
) -> Quote:
    """Return the cost of a set of images, given the costs of the model's passes."""
    flops = image_bytes = table_bytes = 0.0
    for kind, count in work.items():
        cost, steps = costs.pictures[kind.height, kind.width], costs.steps[kind.num_inference_steps]
        flops += count * _picture_flops(kind, steps, cost, config, refinements)
        image_bytes += count * cost.pixels * PNG_BYTES_PER_PIXEL
        per_subject = FIGURES_PER_STEP * 4 * steps + MAP_BYTES
        if config.attention_maps != "last":
            per_subject += len(config.map_steps(steps)) * cost.sampling.map_bytes
        table_bytes += count * (ROW_BYTES + kind.subjects * per_subject)
    hours = None if tflops is None else flops / (tflops * 1e12) / 3600
    return Quote(work.total(), flops, hours, image_bytes, table_bytes, refinements, tflops)


def _picture_flops(
    kind: Work, steps: int, cost: PictureCosts, config: GuidanceConfig, refinements: float
) -> float:
    """Return the FLOPs of one image, with one round if its method searches for the start noise.

    Args:
        steps: number of scheduler steps.
    """
    passes = cost.sampling
    rows = kind.conjuncts + (kind.classifier_free or kind.conjuncts > 1)
    flops = steps * passes.denoising(rows, kind.classifier_free) + rows * cost.encode + cost.decode
    method = METHODS[kind.method]
    if method.is_guided:
        schedule = GuidanceSchedule(
            config.updated(num_inference_steps=kind.num_inference_steps).steering(kind.method),
            steps,
        )
        guided = float(sum(schedule.guides(step) for step in range(steps)))
        guided += refinements if schedule.steering.thresholds else 0
        guided += method.start.steps if method.start else 0
        flops += guided * (passes.attend + passes.attend_backward)
    return flops


# --- counting ------------------------------------------------------------------------------------


def costs_of(pipe, work: Counter[Work], config: GuidanceConfig) -> ModelCosts:
    """Count the passes at every image size in `work`, and the scheduler steps, with a pipeline on the meta
    device.

    Raises:
        SettingsError: the scheduler does not fit Stable Diffusion, or does not support the number of steps.
    """
    import torch

    from aae_batch.sampling.model.family import network_of

    model = network_of(pipe)
    encode = 0
    for name, encoder in vars(pipe).items():
        if name.startswith("text_encoder"):
            own = getattr(encoder.config, "max_position_embeddings", None)
            tokens = own or config.max_sequence_length or model.max_sequence_length
            prompt = torch.zeros((1, int(tokens or 0)), dtype=torch.long, device="meta")
            encode += count_flops(lambda encoder=encoder, prompt=prompt: encoder(prompt))  # type: ignore[misc]
    pictures = {}
    for size in {(kind.height, kind.width) for kind in work}:
        shape = model.latent_shape(*size)
        latents = torch.empty(1, *shape, device="meta")
        pictures[size] = PictureCosts(
            count_sampling(model, latents, config),
            encode=encode,
            decode=count_flops(lambda latents=latents: pipe.vae.decode(latents)),  # type: ignore[misc]
            pixels=shape[1] * shape[2] * pipe.vae_scale_factor**2,
        )
    scheduler = model.scheduler(config.scheduler)
    steps = {n: _steps(model, scheduler, n) for n in {kind.num_inference_steps for kind in work}}
    return ModelCosts(pictures, steps)


def _steps(model: Network, scheduler, num_inference_steps: int) -> int:
    """Return the number of scheduler steps: PNDM and second-order schedulers take more than requested."""
    try:
        model.set_timesteps(scheduler, num_inference_steps, model.latent_shape(None, None))
    except ValueError as error:
        raise SettingsError(
            f"num_inference_steps is {num_inference_steps}, which {type(scheduler).__name__} cannot "
            f"take; use fewer. ({error})"
        ) from None
    return len(scheduler.timesteps)


def count_sampling(
    model: Network, latents: Tensor, config: GuidanceConfig | None = None
) -> SamplingPasses:
    """Count the FLOPs of the network's passes for one image.

    Args:
        model: a model whose network is on the meta device.
        latents: [1, channels, height, width], on the meta device.
    """
    import torch

    from aae_batch.sampling.objectives import Seen
    from aae_batch.sampling.objectives.attend_and_excite import attend_and_excite
    from aae_batch.sampling.objectives.maps import normalize_over_words
    from aae_batch.sampling.words import Subject

    timesteps = torch.empty(1, device="meta")
    map_bytes = 0

    def rows(count: int) -> dict[str, Tensor]:
        return {name: torch.stack([one] * count) for name, one in model.blank().items()}

    def loss(moving: Tensor) -> Tensor:
        nonlocal map_bytes
        maps, _ = model.attend(moving, timesteps, rows(1), columns=words)
        map_bytes = maps.shape[1] * maps.shape[2]
        prompt = torch.ones(1, maps.shape[-1], dtype=torch.bool, device="meta")
        shares = normalize_over_words(maps, prompt)
        named = [Subject("", place, ("",), place, ()) for place in _PLACES]
        seen = Seen(maps, shares, prompt, [named], "sum", [0], [{}])
        return attend_and_excite(seen)[0].sum()

    with model.recording_maps(config):
        words = words_of(model)
        forward, backward = count_guided(loss, latents)
        two, times = (torch.cat([tensor, tensor]) for tensor in (latents, timesteps))

        def denoise(sample_of: Sequence[int]) -> int:
            given = two, times, rows(2)
            record = slice(1, None)
            return count_flops(
                lambda: model.denoise(*given, record=record, columns=words, sample_of=sample_of)
            )

        of_one = denoise([0, 0])
        shared = denoise([0, 1]) - of_one
    return SamplingPasses(forward, backward, of_one, shared, map_bytes)


def words_of(model: Network) -> Sequence[int]:
    """Return the tokens whose maps a prompt of `WORDS` needs."""
    from aae_batch.sampling.model.family import TEXT

    return WORDS[: len(model.blank()[TEXT])]


def count_guided(loss: Callable[[Tensor], Tensor], latents: Tensor) -> tuple[int, int]:
    """Return the FLOPs of a guided forward, and of the backward from its loss to the latents."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    moving = latents.clone().requires_grad_(True)
    with FlopCounterMode(display=False) as forward:
        value = loss(moving)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(value, moving)
    return forward.get_total_flops(), backward.get_total_flops()


def count_flops(run: Callable[[], object]) -> int:
    """Return the FLOPs of calling `run` without gradients."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


# --- units ---------------------------------------------------------------------------------------


def in_thousands(value: float, unit: str) -> str:
    """Format a value with an SI prefix and three significant digits: `4.58e11` FLOP is 458 GFLOP."""
    *prefixes, last = ("", "k", "M", "G", "T", "P", "E")
    for prefix in prefixes:
        if value < 999.5:
            return f"{_number(value, 3)} {prefix}{unit}"
        value /= 1000
    return f"{_number(value, 3)} {last}{unit}"


def in_time(hours: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if hours < 2 / 60:
        return f"{_number(hours * 3600, 2)} s"
    return f"{_number(hours * 60, 2)} min" if hours < 2 else f"{_number(hours, 2)} h"


def _number(value: float, digits: int) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.{digits}g}"
