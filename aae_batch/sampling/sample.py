"""The state of one request on its way through the denoising steps, and how it comes about."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aae_batch.errors import RequestError, RowError
from aae_batch.request import Request, Result
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.model.unet import StableDiffusion, step_arguments
from aae_batch.sampling.resolve import resolve
from aae_batch.sampling.steering import GuidanceSchedule, Progress
from aae_batch.sampling.texts import Conditioning, condition
from aae_batch.sampling.trace import AttentionTrace
from aae_batch.sampling.words import Subject


@dataclass(eq=False)
class Sample:
    """One request on its way through the denoising steps.

    Attributes:
        latents: [channels, height, width].
        text: what it is denoised under.
        scheduler: its own, since multistep solvers remember earlier steps.
        step: the denoising step it stands at.
        progress: how far the guidance of that step has come.
    """

    request: Request
    config: GuidanceConfig
    subjects: tuple[Subject, ...]
    text: Conditioning
    latents: Tensor
    scheduler: object
    timesteps: Tensor
    step_arguments: dict[str, object]
    trace: AttentionTrace
    schedule: GuidanceSchedule
    started: float
    step: int = 0
    num_refinements: int = 0
    progress: Progress = field(default_factory=Progress)

    @property
    def timestep(self) -> Tensor:
        return self.timesteps[self.step]

    @property
    def guided_now(self) -> bool:
        """Does its step use the guidance objective?"""
        return self.config.method == "attend-and-excite" and self.schedule.guides(self.step)

    @property
    def ready(self) -> bool:
        """Can it be denoised, or does it need another guided forward first?"""
        return self.progress.done or not self.guided_now

    @property
    def finished(self) -> bool:
        return self.step == len(self.timesteps)

    def scaled(self, latents: Tensor) -> Tensor:
        """`latents` as the UNet takes them at this step (the identity for DDIM and PNDM)."""
        return self.scheduler.scale_model_input(latents, self.timestep)  # type: ignore[attr-defined]

    @property
    def input_scale(self) -> Tensor:
        """The factor that `scaled` multiplies latents by at this step; it stays on their device."""
        return self.scaled(self.latents.new_ones(()))

    def fail(self, error: RowError) -> Result:
        return Result(self.request, error=error, seconds=time.monotonic() - self.started)


def admit(model: StableDiffusion, request: Request, config: GuidanceConfig) -> Sample:
    """Check a request, encode its prompt and draw its noise.

    Args:
        config: the run's settings; the request may override some.

    Raises:
        RowError: the request cannot be sampled.
    """
    config, subjects = resolve(request, config, model.tokenizer, model.pipe.vae_scale_factor)
    scheduler = model.scheduler(config.scheduler)
    try:
        scheduler.set_timesteps(config.num_inference_steps, device=model.device)
    except ValueError:  # which schedulers raise for more steps than they were trained with
        raise RequestError(
            request.name,
            f"num_inference_steps is {config.num_inference_steps}, and the scheduler takes up to "
            f"{scheduler.config.num_train_timesteps}",
        ) from None
    generator = torch.Generator("cpu").manual_seed(request.seed)
    noise = model.draw_noise(model.latent_shape(config.height, config.width), generator)
    steps = len(scheduler.timesteps)
    return Sample(
        request=request,
        config=config,
        subjects=subjects,
        text=condition(model, request.prompt, config, subjects),
        latents=noise * scheduler.init_noise_sigma,
        scheduler=scheduler,
        timesteps=scheduler.timesteps,
        step_arguments=step_arguments(scheduler, generator, config.eta),
        trace=AttentionTrace(subjects, steps),
        schedule=GuidanceSchedule(config, steps),
        started=time.monotonic(),
    )
