"""The state of one request during denoising, and its creation."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aae_batch.errors import RequestError, RowError
from aae_batch.methods import DEFAULT, METHODS, Method
from aae_batch.request import Request, Result
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.model import family
from aae_batch.sampling.model.family import Network
from aae_batch.sampling.noise_search import Search
from aae_batch.sampling.objectives import Objective
from aae_batch.sampling.objectives.attend_and_excite import attend_and_excite
from aae_batch.sampling.resolve import as_read, resolve
from aae_batch.sampling.solver import LinearSolver
from aae_batch.sampling.steering import GuidanceSchedule, Progress, velocity_factor
from aae_batch.sampling.texts import Conditioning, condition
from aae_batch.sampling.trace import AttentionTrace
from aae_batch.sampling.words import Subject


@dataclass(eq=False)
class Sample:
    """The state of one request during denoising.

    Attributes:
        latents: [channels, height, width].
        text: the texts that condition the denoising.
        scheduler: one per sample, because multistep solvers remember earlier steps.
        solver: takes the scheduler's steps if they are linear.
        objective: the guidance objective; without guidance, the one used for the recorded loss.
        search: the search for start noise, if the method has one.
        step: index of the current denoising step.
        progress: progress of the guidance within that step.
        memory: what the objective keeps between forwards.
        velocity: [channels, height, width], added to the prediction of the current step.
        give_up_below: see `Batch.add`.
        guided, denoised: as in `Result`.
    """

    request: Request
    config: GuidanceConfig
    method: Method
    objective: Objective
    subjects: tuple[Subject, ...]
    text: Conditioning
    latents: Tensor
    scheduler: object
    timesteps: Tensor
    step_arguments: dict[str, object]
    trace: AttentionTrace
    solver: LinearSolver | None
    schedule: GuidanceSchedule
    started: float
    search: Search | None = None
    step: int = 0
    num_refinements: int = 0
    progress: Progress = field(default_factory=Progress)
    memory: dict[str, Any] = field(default_factory=dict)
    velocity: Tensor | None = None
    give_up_below: float | None = None
    guided: int = 0
    denoised: int = 0

    @property
    def timestep(self) -> Tensor:
        return self.timesteps[self.step]

    @property
    def guided_now(self) -> bool:
        """True if the current step uses the guidance objective."""
        return self.method.is_guided and self.schedule.guides(self.step)

    @property
    def ready(self) -> bool:
        """True if the sample can be denoised now, without another guided forward."""
        return self.progress.done or not (self.guided_now or self.searching)

    @property
    def searching(self) -> bool:
        """True while the search for start noise continues."""
        return self.search is not None and not self.search.done

    @property
    def finished(self) -> bool:
        return self.step == len(self.timesteps)

    def scaled(self, latents: Tensor) -> Tensor:
        """Scale `latents` as the network expects at this step: the identity for DDIM, PNDM and flow
        matching."""
        return family.scaled(self.scheduler, latents, self.timestep)

    @property
    def input_scale(self) -> Tensor:
        """The factor by which `scaled` multiplies latents at this step: a number on the host, in their
        dtype."""
        return self.scaled(torch.ones((), dtype=self.latents.dtype))

    @property
    def needs_affinity(self) -> bool:
        return "affinity" in self.method.needs

    def advance(self, loss: float, reached: float, slope: Tensor) -> Tensor | None:
        """Process a guided forward, and return how far to move the latents down `slope`, a number on the
        host; None for not at all. During the noise search, move the noise.

        The update applies to the latents as the network sees them, so that schedulers that scale
        their latents (Euler and related, by `1 / sqrt(sigma^2 + 1)`) guide as far as those that do not.

        Args:
            loss, reached: the objective's two values.
            slope: gradient of the loss with respect to the latents as the network sees them.
        """
        self.guided += 1
        if self.search is not None and not self.search.done:
            sigma = family.noise_scale(self.scheduler)
            self.search.advance(reached, slope * self.input_scale * sigma)
            self.num_refinements += 1
            self.latents = self.search.noise * sigma
            return None
        before = self.progress.refinements
        most = self.schedule.steering.max_refinement_steps
        self.progress.advance(reached, self.schedule.target(self.step), most)
        self.num_refinements += self.progress.refinements - before
        moves = not self.progress.done or self.schedule.updates(self.step)
        if not moves or loss == 0:
            return None
        size = self.schedule.step_size(self.step)
        if self.progress.done and self.schedule.steering.update == "velocity":
            sigma = float(self.scheduler.sigmas[self.step])  # type: ignore[attr-defined]
            self.velocity = size * velocity_factor(sigma) * slope
            return None
        return size / self.input_scale

    def steps_to(self, predicted: Tensor) -> list[tuple[float, Tensor]]:
        """Return the latents after a step of the scheduler with the network's prediction, as a sum of
        coefficients times tensors."""
        if self.velocity is not None:
            predicted, self.velocity = predicted + self.velocity, None
        if self.solver is not None:
            return self.solver.terms(self.step, self.latents, predicted)
        made = self.scheduler.step(  # type: ignore[attr-defined]
            predicted[None], self.timestep, self.latents[None], **self.step_arguments
        )
        return [(1.0, made.prev_sample[0])]

    def take_step(self, latents: Tensor) -> None:
        """Go on to the next step, with its latents."""
        self.latents = latents
        self.step += 1
        self.denoised += len(self.text.conditions) + (self.text.negative is not None)
        self.progress = Progress()

    @property
    def hopeless(self) -> bool:
        """True if, in the first step after those that Attend-and-Excite guides, a subject was attended
        to less than `give_up_below`."""
        first = self.config.steering(DEFAULT).max_iter_to_alter
        if self.give_up_below is None or self.step != first + 1 or self.method.texts == "conjuncts":
            return False
        return self.trace.worst(first) < self.give_up_below

    def result(self, **made: Any) -> Result:
        return Result(
            self.request,
            **made,
            seconds=time.monotonic() - self.started,
            guided=self.guided,
            denoised=self.denoised,
            method=self.config.method,
        )

    def fail(self, error: RowError) -> Result:
        return self.result(error=error)


def admit(
    model: Network, request: Request, config: GuidanceConfig, give_up_below: float | None = None
) -> Sample:
    """Check a request, encode its prompt and draw its noise.

    Args:
        config: the run's settings, some of which the request may override.
        give_up_below: see `Batch.add`.

    Raises:
        RowError: the request cannot be sampled.
    """
    given, request = request, as_read(request)
    config, subjects = resolve(request, config, model.streams, model.facts, model.sizes)
    scheduler = model.scheduler(config.scheduler)
    shape = model.latent_shape(config.height, config.width)
    try:
        model.set_timesteps(scheduler, config.num_inference_steps, shape)
    except ValueError as error:  # of schedulers that cannot take so many
        raise RequestError(
            request.name, f"num_inference_steps is {config.num_inference_steps}: {error}"
        ) from error
    generator = torch.Generator("cpu").manual_seed(request.seed)
    noise = model.draw_noise(shape, generator)
    method, steps = METHODS[config.method], len(scheduler.timesteps)
    search = None
    if method.start is not None:
        search = Search(method.start, noise, lambda: model.draw_noise(shape, generator))
    return Sample(
        request=given,
        config=config,
        method=method,
        objective=method.load_objective() or attend_and_excite,
        subjects=subjects,
        text=condition(model, request.prompt, config, subjects),
        latents=noise * family.noise_scale(scheduler),
        scheduler=scheduler,
        timesteps=scheduler.timesteps,
        solver=LinearSolver(scheduler, generator, config.eta)
        if LinearSolver.fits(scheduler, noise.dtype)
        else None,
        step_arguments=family.step_arguments(scheduler, generator, config.eta),
        trace=AttentionTrace(subjects, steps, config.map_steps(steps)),
        schedule=GuidanceSchedule(config.steering(), steps),
        started=time.monotonic(),
        search=search,
        give_up_below=give_up_below,
    )
