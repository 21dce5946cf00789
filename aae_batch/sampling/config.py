"""The settings a person supplies, checked as they come in."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

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


class GuidanceConfig(Settings):
    """How to sample. Names and defaults are those of diffusers' `StableDiffusionAttendAndExcitePipeline`
    and of the paper (Chefer et al. 2023, arXiv 2301.13826, section 4).

    Raises:
        SettingsError: a value is unknown or out of range.
    """

    method: Method = Field(
        "attend-and-excite",
        description="'attend-and-excite', 'stable-diffusion' for no guidance, or another way to "
        "compose: 'composable-diffusion' or 'structure-diffusion'.",
    )
    num_inference_steps: int = Field(50, ge=1, description="Denoising steps.")
    guidance_scale: float = Field(
        7.5, ge=0, description="Classifier-free guidance; 1 or less switches it off."
    )
    negative_prompt: str | None = Field(None, description="What to move away from.")
    height: int | None = Field(None, gt=0, description="Pixels; default: the model's own.")
    width: int | None = Field(None, gt=0, description="Pixels; default: the model's own.")
    scheduler: str | None = Field(
        None,
        description=f"Scheduler: {', '.join(SCHEDULERS)}, or a class name of diffusers; "
        "default: the model's own.",
    )
    eta: float = Field(0.0, ge=0, le=1, description="Noise added by DDIM (eta of its paper).")
    max_iter_to_alter: int = Field(
        25, ge=0, description="Guide the steps before this one; later ones are left alone."
    )
    thresholds: dict[int, float] = Field(
        {0: 0.05, 10: 0.5, 20: 0.8},
        description="At these steps, refine until every subject's attention reaches the threshold.",
    )
    max_refinement_steps: int = Field(20, ge=1, description="Refinements at one step, at most.")
    scale_factor: float = Field(
        20.0, ge=0, description="Length of a latent update at the first step."
    )
    scale_range: tuple[float, float] = Field(
        (1.0, 0.5),
        description="The update's length falls over all steps as the root of this range.",
    )
    attn_res: tuple[int, int] | None = Field(
        None,
        description="Height and width of the attention maps at the model's own size; "
        "default: a quarter of the latents' (16 x 16 for 512 pixels).",
    )
    subject_pooling: Literal["sum", "max"] = Field(
        "sum",
        description="How the maps of a subject's tokens become one: their sum, which is the subject's "
        "share of attention, or their max, the strongest token at each place.",
    )
    normalize_eot: bool | None = Field(
        None,
        description="Compare a subject's attention with the words up to the end token only; "
        "default: for Stable Diffusion 2.x, as the official code does.",
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
