"""User-supplied sampling settings, validated on construction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt, field_validator

from aae_batch.errors import SettingsError
from aae_batch.manifest.row import MOST_PIXELS, MOST_STEPS
from aae_batch.methods import DEFAULT, METHODS, Steering, Update
from aae_batch.settings import Settings

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
}
"""Short names of schedulers; diffusers' other class names are accepted as they are."""


def _text(option: str, kind: str, example: str, parse: Callable[[str], Any]) -> BeforeValidator:
    """Return a validator that also accepts the value as command-line text."""

    def read(value: Any) -> Any:
        try:
            return parse(value) if isinstance(value, str) else value
        except ValueError:
            raise SettingsError(
                f"{option} {value!r} is not a {kind}; write e.g. {example!r}."
            ) from None

    return BeforeValidator(read)


def _thresholds(text: str) -> dict[int, float]:
    if text.strip().lower() == "none":
        return {}
    pairs = [part.split(":") for part in text.split(",")]
    return {int(step): float(share) for step, share in pairs}


def _scale_range(text: str) -> tuple[float, float]:
    first, last = text.split(":")
    return float(first), float(last)


_MOST_LAYERS = 10_000
"""More than any network has: a range is spelled out."""


def _numbers(text: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        begin, end = int(first), int(last if dash else first)
        if not begin <= end <= _MOST_LAYERS:
            raise ValueError(f"{part} counts backwards or too far")
        numbers += range(begin, end + 1)
    return tuple(numbers)


def _attn_res(text: str) -> tuple[int, int]:
    height, width = text.lower().split("x")
    return int(height), int(width)


def _maps_kept(text: str) -> str:
    kind, colon, steps = text.strip().lower().partition(":")
    if kind == "every" and int(steps) >= 1:
        return f"every:{int(steps)}"
    if (kind, colon) != ("last", ""):
        raise ValueError(text)
    return kind


_THRESHOLDS = _text("--thresholds", "list of step:threshold", "0:0.05,10:0.5", _thresholds)
_SCALE_RANGE = _text("--scale-range", "range", "1:0.5", _scale_range)
_LAYERS = _text("--attn-layers", "list of numbers", "4-11,15", _numbers)
_ATTN_RES = _text("--attn-res", "size", "16x16", _attn_res)
_MAPS_KEPT = _text("--attention-maps", "choice of steps: last or every:N", "every:10", _maps_kept)


class SteeringSettings(Settings):
    """When an objective moves the latents, and how far: overrides for `aae_batch.methods.Steering`.
    None keeps the existing value.

    Raises:
        SettingsError: a value is out of range.
    """

    group = "Steering"

    max_iter_to_alter: int | None = Field(
        None,
        ge=0,
        description="Guide the steps before this one. Default: the method's own, 25 of 50, as a part "
        "of --num-inference-steps.",
    )
    thresholds: Annotated[dict[int, float] | None, _THRESHOLDS] = Field(
        None,
        description="Refine at these steps until every subject's attention, or the method's own "
        "measure, reaches the threshold, e.g. '0:0.05,10:0.5,20:0.8'; 'none' for no refinement. "
        "Default: the method's own.",
    )
    max_refinement_steps: int | None = Field(
        None, ge=1, description="Maximum refinements at one step. Default: the method's own."
    )
    scale_factor: float | None = Field(
        None,
        ge=0,
        description="Length of a latent update at the first step. Default: the method's own.",
    )
    scale_range: Annotated[tuple[NonNegativeFloat, NonNegativeFloat] | None, _SCALE_RANGE] = Field(
        None,
        description="The update's length decays over all steps with the square root of this range, e.g. "
        "'1:0.5'. "
        "Default: the method's own.",
    )

    update: Update | None = Field(
        None,
        description="What a guided step changes: latents, or velocity for flow-matching models. "
        "Default: latents.",
    )

    @field_validator("thresholds")
    @classmethod
    def _shares(cls, thresholds: dict[int, float] | None) -> dict[int, float] | None:
        for step, threshold in (thresholds or {}).items():
            if step < 0 or not 0 <= threshold <= 1:
                raise ValueError(f"{step}: {threshold} is not a step from 0 and a share in [0, 1]")
        return None if thresholds is None else dict(sorted(thresholds.items()))

    def over(self, steering: Steering) -> Steering:
        """Return `steering` with the values given here."""
        own = {field.name: getattr(self, field.name) for field in fields(Steering)}
        return replace(
            steering, **{name: value for name, value in own.items() if value is not None}
        )


class GuidanceConfig(SteeringSettings):
    """How to sample. Names follow diffusers' `StableDiffusionAttendAndExcitePipeline`.

    Steering values given here apply to every method that a row may name; all others keep the
    method's own value.

    Raises:
        SettingsError: a value is unknown or out of range.
    """

    group = "Sampling"

    method: str = Field(
        DEFAULT,
        description="Guidance method: attend-and-excite, stable-diffusion for no guidance, or another of "
        f"{', '.join(METHODS)}; see docs/methods.md.",
    )
    num_inference_steps: int = Field(50, ge=1, le=MOST_STEPS, description="Denoising steps.")
    guidance_scale: float = Field(
        7.5,
        ge=0,
        description="Classifier-free guidance; 1 or less switches it off. For FLUX the scale that its "
        "network takes instead.",
    )
    true_cfg_scale: float = Field(
        1.0,
        ge=0,
        description="Classifier-free guidance for FLUX, beside its own; 1 or less switches it off.",
    )
    guidance_rescale: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Rescale classifier-free guidance by this share towards the deviation of the "
        "prompt's own prediction (arXiv 2305.08891), against overexposure.",
    )
    negative_prompt: str | None = Field(
        None, description="What the image should not show. Default: nothing."
    )
    height: int | None = Field(
        None,
        gt=0,
        le=MOST_PIXELS,
        description="Pixels, a multiple of 8, or of 16 for Stable Diffusion 3 and FLUX.",
    )
    width: int | None = Field(None, gt=0, le=MOST_PIXELS, description="Pixels, as height.")
    max_sequence_length: int | None = Field(
        None,
        gt=0,
        le=512,
        description="T5's tokens of a prompt, for Stable Diffusion 3 and FLUX. Default: as in their "
        "pipelines.",
    )
    scheduler: str | None = Field(
        None, description=f"{', '.join(SCHEDULERS)}, or a class name of diffusers."
    )
    eta: float = Field(0.0, ge=0, le=1, description="Noise added by DDIM.")
    attn_res: Annotated[tuple[PositiveInt, PositiveInt] | None, _ATTN_RES] = Field(
        None,
        description="Height x width of the guided attention maps, e.g. 16x16, for a UNet. Default: the "
        "model's own, or a quarter of its latents (half for Stable Diffusion XL).",
    )
    attn_layers: Annotated[tuple[int, ...] | None, _LAYERS] = Field(
        None,
        description="Which of the network's blocks guidance reads, or which layers at --attn-res, by "
        "number, e.g. 4-11,15. Default: the family's; see docs/models.md.",
    )
    subject_pooling: Literal["sum", "max"] = Field(
        "sum",
        description="How to combine the maps of a subject's tokens: sum, or max for the strongest alone.",
    )
    normalize_eot: bool | None = Field(
        None,
        description="Compare a subject with the words up to the end token only. Default: not for "
        "Stable Diffusion 1.x.",
    )
    attention_maps: Annotated[str, _MAPS_KEPT] = Field(
        "last",
        description="Which of a subject's attention maps to keep: last, the last step's, or every:N, also "
        "those of steps 0, N, 2N and so on. Default: last.",
    )
    by_method: dict[str, SteeringSettings] = Field(
        {},
        description="Steering per method, for models that need values other than those of the method's "
        "paper.",
        json_schema_extra={"option": False},
    )

    @field_validator("attn_layers")
    @classmethod
    def _numbered(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and (not layers or min(layers) < 0):
            raise ValueError("name at least one, by numbers from 0, e.g. 4-11,15")
        return None if layers is None else tuple(sorted(set(layers)))

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in METHODS:
            raise ValueError(f"unknown method; use {', '.join(METHODS)}")
        return method

    def steering(self, method: str | None = None) -> Steering:
        """Return a method's steering: values given here override the model's, which override its
        paper's. Steps that are given count the run's own; the paper's are scaled to them.

        Args:
            method: defaults to the configured method.
        """
        name = method or self.method
        of_model = self.by_method.get(name, SteeringSettings())
        own = METHODS[name].steering.for_steps(self.num_inference_steps)
        return self.over(of_model.over(own))

    def map_steps(self, steps: int) -> list[int]:
        """Return the steps, of `steps`, whose attention maps are kept. The last one's always is."""
        _, _, every = self.attention_maps.partition(":")
        return sorted({*(range(0, steps, int(every)) if every else ()), steps - 1})

    def updated(self, **values) -> GuidanceConfig:
        """Return a validated copy with some values changed."""
        return GuidanceConfig(**{**self.model_dump(), **values})
