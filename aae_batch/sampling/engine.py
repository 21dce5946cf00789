"""Request -> Result by continuous batching.

An `Engine` holds a model, a `Batch` the samples in flight, a `Sample` the state of one request. One
`Batch.step` takes every sample as far as one guided forward and one denoising forward can: samples
stand at different steps, some refine while others denoise, and none waits for another.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor

from aae_batch.errors import NonFiniteError, RowError, SettingsError
from aae_batch.request import Request, Result
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.model.loading import default_guidance, load_pipeline
from aae_batch.sampling.model.unet import StableDiffusion
from aae_batch.sampling.objectives import (
    attend_and_excite_loss,
    excitation,
    normalize_over_words,
    pool_subjects,
    smooth,
)
from aae_batch.sampling.resolve import check_settings
from aae_batch.sampling.sample import Sample, admit
from aae_batch.sampling.steering import Progress
from aae_batch.sampling.texts import Text, over_prompt
from aae_batch.sampling.trace import describe

logger = logging.getLogger("aae_batch.sampling.engine")


class Engine:
    """Guided sampling of many requests on one device.

    Args:
        model: the diffusion model.
        slots: how many samples are in flight at once; memory grows with it.
        defaults: the settings that `generate` uses when it is given none.
    """

    def __init__(
        self, model: StableDiffusion, slots: int = 8, defaults: GuidanceConfig | None = None
    ) -> None:
        if slots < 1:
            raise SettingsError(f"slots is {slots}; it must be at least 1.")
        self.model = model
        self.slots = slots
        self.defaults = defaults or GuidanceConfig()

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        slots: int = 8,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        s3_endpoint: str | None = None,
    ) -> Engine:
        """Load a model by hub id, folder, URL, or as `"shapes"`; see `aae_batch.sampling.model.loading.load_pipeline`.

        Raises:
            ModelError: there is no such model, or it cannot be guided.
        """
        pipe = load_pipeline(
            model, revision=revision, device=device, dtype=dtype, s3_endpoint=s3_endpoint
        )
        return cls(StableDiffusion(pipe), slots, default_guidance(model, s3_endpoint))

    @classmethod
    def from_pipeline(cls, pipe, slots: int = 8, defaults: GuidanceConfig | None = None) -> Engine:
        """Guide a diffusers `StableDiffusionPipeline` that is already loaded, where it is.

        Raises:
            ModelError: the pipeline cannot be guided.
        """
        return cls(StableDiffusion(pipe), slots, defaults)

    def generate(
        self, requests: Iterable[Request], config: GuidanceConfig | None = None
    ) -> Iterator[Result]:
        """Sample every request; results come as they finish, each with its request.

        Requests are taken one by one as slots become free, so the iterable may be endless. A bad
        request becomes a result with an error.

        Raises:
            SettingsError: `config` does not fit the model, or has words that it does not know.
        """
        with self.open(config) as batch:
            yield from batch.run(requests)

    @contextmanager
    def open(self, config: GuidanceConfig | None = None) -> Iterator[Batch]:
        """An empty batch, for callers that feed it themselves; afterwards the model is as it was.

        Raises:
            SettingsError: `config` does not fit the model, or has words that it does not know.
        """
        config = config or self.defaults
        self.model.scheduler(config.scheduler)
        check_settings(self.model.tokenizer, config)
        with self.model.recording_maps(config.attn_res):
            yield Batch(self.model, config, self.slots)


class _DoesNotFit(Exception):
    """A forward needs more memory than there is. No sample has moved."""

    def __init__(self, cause: torch.OutOfMemoryError) -> None:
        self.cause = cause


@contextmanager
def _fitting() -> Iterator[None]:
    """Around what a forward needs memory for, and nothing that changes a sample."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _DoesNotFit(error) from None


class Batch:
    """The samples in flight, all under one configuration (rows may override parts of it).

    Attributes:
        slots: how many samples share a forward at most. It is halved where memory does not suffice.
        seconds: spent so far in each phase: excite, denoise, decode.
    """

    def __init__(self, model: StableDiffusion, config: GuidanceConfig, slots: int) -> None:
        self.model = model
        self.config = config
        self.slots = slots
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._samples: list[Sample] = []

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def free(self) -> int:
        """How many more requests can be added."""
        return max(0, self.slots - len(self._samples))

    def add(self, request: Request) -> None:
        """Give `request` a slot: check it, encode its prompt, draw its noise.

        Raises:
            RowError: the request cannot be sampled.
        """
        self._samples.append(admit(self.model, request, self.config))

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Sample every request; a bad one becomes a result with an error."""
        incoming = iter(requests)
        exhausted = False
        while not exhausted or len(self):
            while self.free and not exhausted:
                request = next(incoming, None)
                if request is None:
                    exhausted = True
                    break
                try:
                    self.add(request)
                except RowError as error:
                    yield Result(request, error=error)
            yield from self.step()

    @torch.no_grad()
    def step(self) -> list[Result]:
        """Advance every sample, and return those that are through, or that failed."""
        results: list[Result] = []
        with self._timed("excite"):
            for group in self._groups():
                waiting = [sample for sample in group if not sample.ready]
                results += self._in_memory(self._excite, waiting)
        with self._timed("denoise"):
            for group in self._groups():
                ready = [sample for sample in group if sample.ready]
                results += self._in_memory(self._denoise, ready)
        with self._timed("decode"):
            for sample in [sample for sample in self._samples if sample.finished]:
                results.append(self._finish(sample))
        return results

    def _in_memory(
        self, forward: Callable[[list[Sample]], list[Result]], samples: list[Sample]
    ) -> list[Result]:
        """`forward` over the samples, `slots` at a time; where they do not fit, with half the slots."""
        results = []
        while samples:
            now, later = samples[: self.slots], samples[self.slots :]
            try:
                results += forward(now)
            except _DoesNotFit as error:
                if len(now) == 1:
                    raise error.cause from None
                self.slots = len(now) // 2
                logger.warning(
                    "out of memory with %d slots, going on with %d", len(now), self.slots
                )
                self.model.release_memory()
            else:
                samples = later
        return results

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    # --- the two forwards ---

    def _excite(self, samples: list[Sample]) -> list[Result]:
        """One guided forward and backward: each sample moves down the gradient of its own loss.

        It moves where the UNet sees it, so that a scheduler which scales its latents (Euler and its kin, by
        `1 / sqrt(sigma^2 + 1)`) guides as far as one that does not.
        """
        if not samples:
            return []
        with torch.enable_grad(), _fitting():
            latents = torch.stack([sample.latents for sample in samples]).requires_grad_(True)
            scaled = torch.stack(
                [sample.scaled(one) for sample, one in zip(samples, latents, strict=True)]
            )
            maps = self.model.attend(
                scaled,
                torch.stack([sample.timestep for sample in samples]),
                torch.stack([sample.text.conditions[0].keys for sample in samples]),
            )
            loss = self._observe(samples, maps)
            (gradient,) = torch.autograd.grad(loss.sum(), scaled)

        for sample, value, slope in zip(samples, loss.tolist(), gradient, strict=True):
            step_size = self._advance(sample, value)
            if step_size:
                sample.latents = sample.latents - step_size / sample.input_scale * slope
        return self._drop_non_finite(samples, "the guided latent update")

    def _advance(self, sample: Sample, loss: float) -> float:
        """Tell the sample's step of its loss; returns the length of the update to make, or 0."""
        before = sample.progress.refinements
        target = sample.schedule.target(sample.step)
        sample.progress.advance(loss, target, sample.config.max_refinement_steps)
        sample.num_refinements += sample.progress.refinements - before
        moves = not sample.progress.done or sample.schedule.updates(sample.step)
        return sample.schedule.step_size(sample.step) if moves and loss != 0 else 0.0

    def _denoise(self, samples: list[Sample]) -> list[Result]:
        """One forward over all texts of the samples, and one scheduler step each."""
        if not samples:
            return []
        unseen = [
            i for i, sample in enumerate(samples) if sample.subjects and not sample.guided_now
        ]
        rows: list[tuple[Sample, Text]] = []
        rows += [(sample, sample.text.negative) for sample in samples if sample.text.negative]
        negatives = len(rows)
        rows += [(sample, text) for sample in samples for text in sample.text.conditions]
        with _fitting():
            predicted, maps = self._predict(rows, record_from=negatives if unseen else len(rows))
        counts = [len(sample.text.conditions) for sample in samples]
        if maps is not None:
            by_sample = maps.split(counts)
            self._observe([samples[i] for i in unseen], torch.cat([by_sample[i] for i in unseen]))
        unconditional = iter(predicted[:negatives])
        for sample, conditional in zip(samples, predicted[negatives:].split(counts), strict=True):
            without = next(unconditional) if sample.text.negative else None
            noise = sample.text.combine(without, conditional)
            sample.latents = sample.scheduler.step(  # type: ignore[attr-defined]
                noise[None], sample.timestep, sample.latents[None], **sample.step_arguments
            ).prev_sample[0]
            sample.step += 1
            sample.progress = Progress()
        return self._drop_non_finite(samples, "denoising")

    def _predict(
        self, rows: list[tuple[Sample, Text]], record_from: int
    ) -> tuple[Tensor, Tensor | None]:
        """The prediction of every row, and the maps from row `record_from` on, if there are any.

        A prompt of many conjuncts has many rows: no forward takes more than other methods need.
        """
        predicted, maps = [], []
        for start in range(0, len(rows), 2 * self.slots):
            some = rows[start : start + 2 * self.slots]
            first = max(0, record_from - start)
            found, seen = self.model.denoise(
                torch.stack([sample.scaled(sample.latents) for sample, _ in some]),
                torch.stack([sample.timestep for sample, _ in some]),
                torch.stack([text.keys for _, text in some]),
                _values([text for _, text in some]),
                record=slice(first, None) if first < len(some) else None,
            )
            predicted.append(found)
            if seen is not None:
                maps.append(seen)
        return torch.cat(predicted), torch.cat(maps) if maps else None

    def _finish(self, sample: Sample) -> Result:
        self._samples.remove(sample)
        image = self.model.decode(sample.latents)
        if image is None:
            reason = "the decoder made NaN or infinite pixels; try dtype float32 or another seed"
            return sample.fail(NonFiniteError(sample.request.name, reason))
        last_threshold = next(reversed(sample.config.thresholds.values()), None)
        return Result(
            sample.request,
            image=image,
            latents=sample.latents.cpu(),
            attention=sample.trace.record(sample.num_refinements, last_threshold),
            seconds=time.monotonic() - sample.started,
        )

    # --- helpers ---

    def _observe(self, samples: list[Sample], maps: Tensor) -> Tensor:
        """The loss of every sample, [batch], from the maps of its conditions, [conditions of all
        samples, height, width, tokens].

        Notes the figures of every subject in the samples' traces on the way.
        """
        texts = [sample.text for sample in samples]
        ends = [condition.words_end for text in texts for condition in text.conditions]
        token_indices = [[s.token_indices for s in sample.subjects] for sample in samples]
        counts = torch.tensor([len(sample.subjects) for sample in samples], device=maps.device)
        pooling = self.config.subject_pooling
        words = normalize_over_words(maps, torch.tensor(ends, device=maps.device))
        by_subject = pool_subjects(over_prompt(words, texts), token_indices, pooling)
        excitations = excitation(smooth(by_subject))
        loss = attend_and_excite_loss(excitations, counts)
        with torch.no_grad():
            figures = describe(by_subject, excitations).cpu()
            raw = pool_subjects(over_prompt(maps.detach(), texts), token_indices, pooling)
            for i, (sample, value) in enumerate(zip(samples, loss.tolist(), strict=True)):
                n = len(sample.subjects)
                sample.trace.observe(sample.step, figures[i, :n].float().numpy(), value, raw[i, :n])
        return loss

    def _groups(self) -> list[list[Sample]]:
        """The samples by the size of their latents: only equal sizes share a forward."""

        def size(sample: Sample) -> tuple[int, ...]:
            return tuple(sample.latents.shape)

        unfinished = [sample for sample in self._samples if not sample.finished]
        return [list(group) for _, group in groupby(sorted(unfinished, key=size), key=size)]

    def _drop_non_finite(self, samples: list[Sample], during: str) -> list[Result]:
        finite = (
            torch.stack([sample.latents for sample in samples]).isfinite().flatten(1).all(dim=1)
        )
        failed = []
        for sample, good in zip(samples, finite.tolist(), strict=True):
            if not good:
                self._samples.remove(sample)
                reason = (
                    f"the latents became NaN or infinite in {during} at step {sample.step}; try "
                    "dtype float32, another seed, or a smaller scale_factor or guidance_scale"
                )
                failed.append(sample.fail(NonFiniteError(sample.request.name, reason)))
        return failed


def _values(texts: list[Text]) -> Tensor | None:
    """What cross-attention makes its values of, where for any of the texts that is not its keys."""
    if all(text.values is text.keys for text in texts):
        return None
    return torch.stack([text.values for text in texts])
