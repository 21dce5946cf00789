"""The settings a person supplies, checked as they come in."""

from __future__ import annotations

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


def _thresholds(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.strip().lower() == "none":
        return {}
    try:
        pairs = [part.split(":") for part in value.split(",")]
        return {int(step): float(share) for step, share in pairs}
    except ValueError:
        raise SettingsError(
            f"--thresholds {value!r} is not a list of step:threshold; write e.g. '0:0.05,10:0.5'."
        ) from None


def _scale_range(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        first, last = (float(part) for part in value.split(":"))
    except ValueError:
        raise SettingsError(
            f"--scale-range {value!r} is not a range; write e.g. '1:0.5'."
        ) from None
    return first, last


def _attn_res(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        height, width = (int(part) for part in value.lower().split("x"))
    except ValueError:
        raise SettingsError(f"--attn-res {value!r} is not a size; write e.g. '16x16'.") from None
    return height, width


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
    thresholds: Annotated[dict[int, float], BeforeValidator(_thresholds)] = Field(
        {0: 0.05, 10: 0.5, 20: 0.8},
        description="Refine at these steps until every subject's attention reaches the threshold, e.g. "
        "'0:0.05,10:0.5,20:0.8'; 'none' for no refinement.",
    )
    max_refinement_steps: int = Field(20, ge=1, description="Refinements at one step, at most.")
    scale_factor: float = Field(
        20.0, ge=0, description="Length of a latent update at the first step."
    )
    scale_range: Annotated[tuple[float, float], BeforeValidator(_scale_range)] = Field(
        (1.0, 0.5),
        description="The update's length falls over all steps as the root of this range, e.g. '1:0.5'.",
    )
    attn_res: Annotated[tuple[int, int] | None, BeforeValidator(_attn_res)] = Field(
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
