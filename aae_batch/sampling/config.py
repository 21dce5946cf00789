"""The settings a person supplies, checked as they come in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from aae_batch.errors import SettingsError
from aae_batch.request import Method
from aae_batch.settings import Settings

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
}
"""Short names of schedulers; any other of diffusers' class names is taken as it is."""


def _text(option: str, kind: str, example: str, parse: Callable[[str], Any]) -> BeforeValidator:
    """Also takes the value as a person writes it on the command line."""

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


def _attn_res(text: str) -> tuple[int, int]:
    height, width = text.lower().split("x")
    return int(height), int(width)


_THRESHOLDS = _text("--thresholds", "list of step:threshold", "0:0.05,10:0.5", _thresholds)
_SCALE_RANGE = _text("--scale-range", "range", "1:0.5", _scale_range)
_ATTN_RES = _text("--attn-res", "size", "16x16", _attn_res)


class GuidanceConfig(Settings):
    """How to sample. Names and defaults are those of diffusers' `StableDiffusionAttendAndExcitePipeline`
    and of the paper (Chefer et al. 2023, arXiv 2301.13826, section 4).

    Raises:
        SettingsError: a value is unknown or out of range.
    """

    method: Method = Field(
        "attend-and-excite",
        description="attend-and-excite; stable-diffusion for no guidance; or, to compare with, "
        "composable-diffusion (each part of 'a cat and a dog' by itself, scores added; a forward more "
        "for each) or structure-diffusion (values of noun phrases in cross-attention).",
    )
    num_inference_steps: int = Field(50, ge=1, description="Denoising steps.")
    guidance_scale: float = Field(
        7.5, ge=0, description="Classifier-free guidance; 1 or less switches it off."
    )
    negative_prompt: str | None = Field(
        None, description="What to move away from. Default: nothing."
    )
    height: int | None = Field(None, gt=0, description="Pixels, a multiple of 8.")
    width: int | None = Field(None, gt=0, description="Pixels, a multiple of 8.")
    scheduler: str | None = Field(
        None, description=f"{', '.join(SCHEDULERS)}, or a class name of diffusers."
    )
    eta: float = Field(0.0, ge=0, le=1, description="Noise added by DDIM.")
    max_iter_to_alter: int = Field(25, ge=0, description="Guide the steps before this one.")
    thresholds: Annotated[dict[int, float], _THRESHOLDS] = Field(
        {0: 0.05, 10: 0.5, 20: 0.8},
        description="Refine at these steps until every subject's attention reaches the threshold, e.g. "
        "'0:0.05,10:0.5,20:0.8'; 'none' for no refinement.",
    )
    max_refinement_steps: int = Field(20, ge=1, description="Refinements at one step, at most.")
    scale_factor: float = Field(
        20.0, ge=0, description="Length of a latent update at the first step."
    )
    scale_range: Annotated[tuple[float, float], _SCALE_RANGE] = Field(
        (1.0, 0.5),
        description="The update's length falls over all steps as the root of this range, e.g. '1:0.5'.",
    )
    attn_res: Annotated[tuple[int, int] | None, _ATTN_RES] = Field(
        None,
        description="Height x width of the guided attention maps, e.g. 16x16. Default: the model's "
        "own, or a quarter of its latents.",
    )
    subject_pooling: Literal["sum", "max"] = Field(
        "sum",
        description="How the maps of a subject's tokens become one: sum, or max for the strongest alone.",
    )
    normalize_eot: bool | None = Field(
        None,
        description="Compare a subject with the words up to the end token only. Default: only for "
        "Stable Diffusion 2.x.",
    )

    @field_validator("thresholds")
    @classmethod
    def _shares(cls, thresholds: dict[int, float]) -> dict[int, float]:
        for step, threshold in thresholds.items():
            if step < 0 or not 0 <= threshold <= 1:
                raise ValueError(f"{step}: {threshold} is not a step from 0 and a share in [0, 1]")
        return dict(sorted(thresholds.items()))

    def updated(self, **values) -> GuidanceConfig:
        """A copy with some values changed, checked like the original."""
        return GuidanceConfig(**{**self.model_dump(), **values})
