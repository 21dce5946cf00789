"""Continuous batching: `Request` in, `Result` out.

An `Engine` holds a model, a `Batch` the samples in flight, a `Sample` the state of one request.
Each `Batch.step` advances every sample by at most one guided forward and one denoising forward:
samples are at different steps, some refine while others denoise, and none waits for another.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import groupby, islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from aae_batch.errors import GivenUpError, NonFiniteError, RowError, SettingsError, shown
from aae_batch.methods import DEFAULT
from aae_batch.request import Request, Result
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.memory import AtOnce, Made, measured_slots
from aae_batch.sampling.model.compiled import BRIEF
from aae_batch.sampling.model.family import (
    TEXT,
    TEXTS_AT_ONCE,
    TILED_ABOVE,
    WINDOW,
    Bag,
    Network,
    network_of,
)
from aae_batch.sampling.model.loading import default_guidance, load_pipeline
from aae_batch.sampling.model.recorder import NONE
from aae_batch.sampling.objectives import Seen
from aae_batch.sampling.objectives.maps import normalize_over_words, pool, sent
from aae_batch.sampling.resolve import check_settings
from aae_batch.sampling.sample import Sample, admit
from aae_batch.sampling.solver import combined
from aae_batch.sampling.texts import Text, as_mask, columns, combine, over_prompt, texts_of
from aae_batch.sampling.trace import describe

Slots = int | Literal["auto"]

IMAGES_AT_ONCE = 16
"""Images that are decoded together, if they have no more pixels together than one that is not tiled."""


class Engine:
    """Guided sampling of many requests on one device.

    Args:
        model: the diffusion model.
        slots: the number of samples in flight; memory use grows with it. `"auto"` measures how many
            fit.
        defaults: the settings of `generate` if it is given none.
        compile: compile each of the model's passes when it has run for `BRIEF` seconds. That takes minutes, which a
            GPU makes up for in some thousand images. It stays so for this `model`.
    """

    def __init__(
        self,
        model: Network,
        slots: Slots = 8,
        defaults: GuidanceConfig | None = None,
        *,
        compile: bool = False,
    ) -> None:
        if slots != "auto" and slots < 1:
            raise SettingsError(f"slots is {slots}; it must be at least 1.")
        self.model = model
        self.slots = slots
        self.defaults = defaults or GuidanceConfig()
        self._measured: tuple[GuidanceConfig, int] | None = None
        if compile:
            model.compile(BRIEF)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        slots: Slots = 8,
        *,
        revision: str | None = None,
        variant: str | None = None,
        lora: Sequence[str] = (),
        device: str = "auto",
        dtype: str = "auto",
        s3_endpoint: str | None = None,
        compile: bool = False,
    ) -> Engine:
        """Load a model by hub id, folder, URL, or as `"shapes"`.

        See `aae_batch.sampling.model.loading.load_pipeline`.

        Raises:
            ModelError: the model does not exist or cannot be guided.
        """
        pipe = load_pipeline(
            model,
            revision=revision,
            variant=variant,
            lora=lora,
            device=device,
            dtype=dtype,
            s3_endpoint=s3_endpoint,
        )
        defaults = default_guidance(model, s3_endpoint, revision)
        return cls(network_of(pipe), slots, defaults, compile=compile)

    @classmethod
    def from_pipeline(
        cls,
        pipe,
        slots: Slots = 8,
        defaults: GuidanceConfig | None = None,
        *,
        compile: bool = False,
    ) -> Engine:
        """Use a diffusers pipeline that is already loaded, on its current device.

        Raises:
            ModelError: the pipeline cannot be guided.
        """
        return cls(network_of(pipe), slots, defaults, compile=compile)

    def generate(
        self, requests: Iterable[Request] | Request, config: GuidanceConfig | None = None
    ) -> Iterator[Result]:
        """Sample every request, and yield each result as soon as it finishes.

        Requests are taken one by one as slots become free, so the iterable may be endless. A bad
        request becomes a result with an error.

        Raises:
            SettingsError: something in `requests` is not a `Request` (of a list, this is said before
                anything runs), `config` does not fit the model, or has words that the model does not
                know.
        """
        return self._generate(_requests(requests), config)

    def _generate(
        self, requests: Iterable[Request], config: GuidanceConfig | None
    ) -> Iterator[Result]:
        with self.open(config) as batch:
            yield from batch.run(requests)

    @contextmanager
    def open(self, config: GuidanceConfig | None = None) -> Iterator[Batch]:
        """Open an empty batch for callers that feed it themselves; the model is restored
        afterwards.

        Raises:
            ModelError: the pipeline is sampling already, or its attention cannot be read.
            SettingsError: `config` does not fit the model, or has words that the model does not
                know.
        """
        config = config or self.defaults
        self.model.scheduler(config.scheduler)
        check_settings(self.model.streams, config)
        with self.model.recording_maps(config):
            yield Batch(self.model, config, self._slots_for(config))

    def _slots_for(self, config: GuidanceConfig) -> int:
        """Return the number of slots; `"auto"` is measured once for the same settings."""
        if self.slots != "auto":
            return self.slots
        if self._measured is None or self._measured[0] != config:
            with self.model.as_written():
                self._measured = config, measured_slots(self.model, self.model.facts.rows(config))
        return self._measured[1]


class Batch:
    """The samples in flight, all under one configuration (rows may override parts of it).

    Attributes:
        samples: the samples in flight.
        seconds: time spent so far in each phase: excite, denoise, decode; compile, which is part of
            the first two.
    """

    def __init__(self, model: Network, config: GuidanceConfig, slots: int) -> None:
        self.model = model
        self.config = config
        self._slots = AtOnce(slots, "slots")
        # With one slot nothing shares a forward, so that the order of rows changes no bit.
        self._shares = slots > 1 and model.batches_texts_and_images
        self._images = AtOnce(IMAGES_AT_ONCE if self._shares else 1, "images to decode")
        self._rows = model.facts.rows(config)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._compiling_before = model.compiling_seconds
        self.samples: list[Sample] = []

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def slots(self) -> int:
        """The largest number of samples in a forward. It is halved when memory runs out."""
        return self._slots.most

    @property
    def free(self) -> int:
        """The number of requests that can be added."""
        return max(0, self.slots - len(self.samples))

    @torch.inference_mode(False)
    def add(self, request: Request, give_up_below: float | None = None) -> None:
        """Give `request` a slot: check it, encode its prompt, draw its noise.

        Args:
            give_up_below: in the first step after those that Attend-and-Excite guides, the request
                fails with a `GivenUpError` if its worst subject's largest attention is less.

        Raises:
            RowError: the request cannot be sampled.
        """
        self.samples.append(admit(self.model, request, self.config, give_up_below))

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Sample every request; a bad one becomes a result with an error."""
        incoming = self.expecting(requests)
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

    def expecting(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Yield the requests, and tell the model of their texts ahead. No more requests are taken than fill
        the free slots, unless they are there already, or text encoders leave the device in between."""
        ahead = self.model.evicts_text_encoders or isinstance(requests, Collection)
        incoming = iter(requests)
        while window := list(islice(incoming, WINDOW if ahead and self.seconds else self._fill)):
            while window:
                expected = self.expect(window)
                yield from window[:expected]
                window = window[expected:]

    @property
    def _fill(self) -> int:
        """The number of requests that the first step waits for."""
        return max(1, self.free)

    @torch.inference_mode(False)
    def expect(self, requests: Iterable[Request]) -> int:
        """Tell the model what texts will be encoded next: those of requests that will be added, in
        this order, until they have as many texts as are encoded in one go. Before the first step, those of
        no more requests than fill the slots.

        Returns:
            The number of these requests. When they are added, call this again with those after them.
        """
        if not (self._shares or self.model.evicts_text_encoders):
            return sum(1 for _ in requests)
        most = WINDOW if self.model.evicts_text_encoders else TEXTS_AT_ONCE
        texts: dict[str, None] = {}
        seen: set[str] = set()
        count = 0
        for request in requests if self.seconds else islice(requests, self._fill):
            count += 1
            alike = repr(replace(request, seed=0, id=None))  # seeds have their prompt's texts
            if alike not in seen:
                seen.add(alike)
                with suppress(RowError):  # `add` will say so
                    texts.update(dict.fromkeys(texts_of(self.model, request, self.config)))
            if len(texts) >= most:
                break
        self.model.expect(texts, together=self._shares)
        return count

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self) -> list[Result]:
        """Advance every sample, and return the results of those that finished or failed."""
        results: list[Result] = []
        with self._timed("excite"):
            for group in self._groups():
                results += self.excite([sample for sample in group if not sample.ready])
        with self._timed("denoise"):
            for group in self._groups():
                results += self.denoise([sample for sample in group if sample.ready])
        compiling = self.model.compiling_seconds - self._compiling_before
        if compiling:
            self.seconds["compile"] = compiling
        with self._timed("decode"):
            for group in _by_size(sample for sample in self.samples if sample.finished):
                results += self._finish(group)
        return results

    def excite(self, samples: list[Sample]) -> list[Result]:
        """Move each sample once down the gradient of its own objective."""
        failed = []
        for some, (losses, gradient) in self._fitting(self._guide, _by_objective(samples)):
            moves = []
            for sample, (loss, reached), slope in zip(some, losses, gradient, strict=True):
                size = sample.advance(loss, reached, slope)
                if size is not None:
                    moves.append((sample, size, slope))
            _move(moves)
            failed += self._drop_non_finite(some, "the guided latent update")
        return failed

    def denoise(self, samples: list[Sample]) -> list[Result]:
        """Take one scheduler step with each sample."""
        failed = []
        samples = sorted(_by_objective(samples), key=_is_watched)
        for some, noises in self._fitting(self._predict, samples):
            steps = [one.steps_to(noise) for one, noise in zip(some, noises, strict=True)]
            for sample, latents in zip(some, combined(steps), strict=True):
                sample.take_step(latents)
            failed += self._drop_non_finite(some, "denoising")
        for sample in [sample for sample in self.samples if sample.hopeless]:
            self.samples.remove(sample)
            reason = f"a subject is attended to less than {sample.give_up_below:g} after the guided steps"
            failed.append(sample.fail(GivenUpError(sample.request.name, reason)))
        return failed

    # --- the two forwards, which do not change latents ---

    def _fitting(
        self, forward: Callable[[list[Sample]], Made], samples: list[Sample]
    ) -> Iterator[tuple[list[Sample], Made]]:
        """Apply `forward` to `slots` samples at a time; after running out of memory, try again
        with half the slots."""
        start = time.perf_counter()
        for some, made in self._slots.fitting(forward, samples, self.model.release_memory):
            yield some, made  # its receiver waits for the device
            now = time.perf_counter()
            self.model.ran(now - start)
            start = now

    def _guide(self, samples: list[Sample]) -> tuple[list[list[float]], Tensor]:
        """Return each sample's loss and `reached` value, and the loss's gradient with respect to
        the latents as the network sees them, [batch, channels, height, width]."""
        latents, timesteps, keys = _inputs([(one, one.text.conditions[0]) for one in samples])
        latents.requires_grad_(True)
        with torch.enable_grad():
            # A view, because torch's FLOP counter hooks module inputs and cannot hook a leaf.
            affine = _last(len(samples), sum(sample.needs_affinity for sample in samples))
            needed = columns(sample.text.conditions[0] for sample in samples)
            moving = latents.view_as(latents)
            maps, affinity = self.model.attend(moving, timesteps, keys, affine, needed)
            losses, tell = self._observe(samples, maps, affinity)
            (gradient,) = torch.autograd.grad(losses.sum(), latents)
        return tell(), gradient

    def _predict(self, samples: list[Sample]) -> Sequence[Tensor]:
        """Return the combined prediction of all of each sample's texts, [channels, height, width].

        A prompt with many conjuncts needs many rows, and one may have guidance that the run has not,
        so the forward is split: none is larger than the run's settings need.
        """
        watched = [sample for sample in samples if _is_watched(sample)]  # sorted to the end
        rows = [(sample, sample.text.negative) for sample in samples if sample.text.negative]
        negatives = len(rows)
        rows += [(sample, text) for sample in samples for text in sample.text.conditions]
        counts = [len(sample.text.conditions) for sample in samples]
        record_from = len(rows) - sum(counts[len(samples) - len(watched) :])
        affine_from = len(rows) - sum(sample.needs_affinity for sample in watched)
        needed = columns(one for sample in watched for one in sample.text.conditions)
        predicted, maps, affinities = [], [], []
        most = self._rows * self.slots
        for start in range(0, len(rows), most):
            some = rows[start : start + most]
            numbers: dict[Sample, int] = {}
            noise, seen, affinity = self.model.denoise(
                *_inputs(some),
                _values(some),
                _last(len(some), start + len(some) - record_from),
                _last(len(some), start + len(some) - affine_from),
                needed,
                sample_of=[numbers.setdefault(sample, len(numbers)) for sample, _ in some],
            )
            predicted.append(noise)
            maps += [] if seen is None else [seen]
            affinities += [] if affinity is None else [affinity]
        noise = torch.cat(predicted)
        texts = [sample.text for sample in samples]
        combined = combine(texts, noise[:negatives], noise[negatives:])
        if watched:
            whole = torch.cat(affinities) if affinities else None
            _, tell = self._observe(watched, torch.cat(maps), whole)
            tell()
        return combined

    def _observe(
        self, samples: list[Sample], maps: Tensor, affinity: Tensor | None
    ) -> tuple[Tensor, Callable[[], list[list[float]]]]:
        """Return the loss of every sample, [batch], and a function that waits for the device, records every
        subject's statistics in the samples' traces, and returns each sample's loss and `reached` value.

        Args:
            samples: sorted by `_by_objective`.
            maps: the maps of their conditions, [conditions of all samples, height, width, tokens].
            affinity: the affinity of the samples that need it, which come last.
        """
        texts = [sample.text for sample in samples]
        tokens, device = maps.shape[-1], maps.device
        of_conditions = [condition for text in texts for condition in text.conditions]
        competing = as_mask([condition.words for condition in of_conditions], tokens, device)
        words = normalize_over_words(maps, competing)
        spoken = [[p for one in text.conditions for p in one.positions] for text in texts]
        seen = Seen(
            maps=over_prompt(maps, texts),
            words=over_prompt(words, texts),
            prompt=as_mask(spoken, tokens, device),
            subjects=[sample.subjects for sample in samples],
            pooling=self.config.subject_pooling,
            steps=[sample.step for sample in samples],
            memory=[sample.memory for sample in samples],
        )
        of_subjects, excitations = seen.subject_maps, seen.excitations
        with torch.no_grad():
            described = describe(of_subjects, excitations)
        groups = [list(group) for _, group in groupby(samples, key=_objective_of)]
        sizes = [len(group) for group in groups]
        affine = [len(group) for group in groups if group[0].needs_affinity]
        own = iter(affinity.split(affine) if affinity is not None else ())
        affinities = [next(own) if group[0].needs_affinity else None for group in groups]
        parts = zip(groups, seen.split(sizes, affinities), strict=True)
        losses, reached = zip(*(_judged(group[0], part) for group, part in parts), strict=True)
        loss = torch.cat(losses)
        with torch.no_grad():
            two = torch.stack([loss, torch.cat(reached)], dim=1)
            raw = described.new_empty(len(samples), described.shape[1], 0, 0)
            if any(sample.trace.keeps(sample.step) for sample in samples):
                raw = pool(seen.maps, seen.subject_tokens, seen.pooling)
            packed = torch.cat([two, described.flatten(1), raw.flatten(1)], dim=1)

        def tell() -> list[list[float]]:
            numbers = packed.cpu()  # the only wait for the device
            told = numbers[:, :2].tolist()
            others = numbers[:, 2:].split([described[0].numel(), raw[0].numel()], dim=1)
            figures = others[0].unflatten(1, described.shape[1:]).float().numpy()
            maps = others[1].reshape(raw.shape)
            for i, sample in enumerate(samples):
                n = len(sample.subjects)
                sample.trace.observe(sample.step, figures[i, :n], told[i][0], maps[i, :n])
            return told

        return loss, tell

    # --- helpers ---

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    def _finish(self, samples: list[Sample]) -> list[Result]:
        """Decode samples of one size, and return their results."""
        results = []
        limit = max(1, TILED_ABOVE // self.model.pixels(samples[0].latents))
        release = self.model.release_memory
        for some, made in self._images.fitting(self._decode, samples, release, limit):
            for sample, (pixels, latents) in zip(some, made, strict=True):
                self.samples.remove(sample)
                results.append(_ended(sample, pixels, latents))
        return results

    def _decode(self, samples: list[Sample]) -> list[tuple[np.ndarray | None, Tensor]]:
        """Return each sample's pixels, None if they are not finite, and its latents on the CPU."""
        latents = torch.stack([sample.latents for sample in samples])
        pixels = self.model.decode(latents)
        # Clones, because one that is kept or pickled takes all that it is a view of with it.
        return [(one, own.clone()) for one, own in zip(pixels, latents.cpu(), strict=True)]

    def _groups(self) -> list[list[Sample]]:
        """Group the unfinished samples by the size of their latents."""
        return _by_size(sample for sample in self.samples if not sample.finished)

    def _drop_non_finite(self, samples: list[Sample], during: str) -> list[Result]:
        latents = torch.stack([sample.latents for sample in samples])
        failed = []
        for sample, good in zip(
            samples, latents.isfinite().flatten(1).all(1).tolist(), strict=True
        ):
            if not good:
                self.samples.remove(sample)
                reason = (
                    f"the latents became NaN or infinite in {during} at step {sample.step}; try "
                    "dtype float32, another seed, or a smaller scale_factor or guidance_scale"
                )
                failed.append(sample.fail(NonFiniteError(sample.request.name, reason)))
        return failed


def _by_size(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Group samples by the size of their latents: only equal sizes share a forward."""

    def size(sample: Sample) -> tuple[int, ...]:
        return tuple(sample.latents.shape)

    return [list(group) for _, group in groupby(sorted(samples, key=size), key=size)]


def _ended(sample: Sample, pixels: np.ndarray | None, latents: Tensor) -> Result:
    """Return the result of a sample that was decoded."""
    if pixels is None:
        reason = "the decoder made NaN or infinite pixels; try dtype float32 or another seed"
        return sample.fail(NonFiniteError(sample.request.name, reason))
    thresholds = sample.config.steering(DEFAULT).thresholds  # the same measure for all methods
    last_threshold = thresholds[max(thresholds)] if thresholds else None
    return sample.result(
        image=pixels,
        latents=latents,
        attention=sample.trace.record(sample.num_refinements, last_threshold),
    )


def _requests(given: Any) -> Iterable[Request]:
    """Return the requests in `given`, checked: a collection now, other iterables as they are read.

    Raises:
        SettingsError: one is not a `Request`.
    """
    if isinstance(given, (Request, str, bytes, Mapping)) or not isinstance(given, Iterable):
        given = [given]
    checked = map(_request, given)
    return list(checked) if isinstance(given, Collection) else checked


def _request(given: Any) -> Request:
    if not isinstance(given, Request):
        raise SettingsError(
            f"{shown(given)} is not a Request; write e.g. Request('a red cat', subjects=['cat'])."
        )
    return given


def _judged(sample: Sample, seen: Seen) -> tuple[Tensor, Tensor]:
    """Return the loss and `reached` value of samples that share one objective.

    Raises:
        SettingsError: the objective fails, or returns other shapes than `Objective` requires.
    """
    name, shape = sample.config.method, (len(seen.subjects),)
    try:
        loss, reached = sample.objective(seen)
        shapes = tuple(loss.shape), tuple(reached.shape)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise SettingsError(
            f"The objective of method {name} failed with {type(error).__name__}: {error}"
        ) from error
    if shapes != (shape, shape):
        raise SettingsError(
            f"The objective of method {name} returned tensors of {shapes[0]} and {shapes[1]}; it must "
            f"return two of {shape}, a value for each row."
        )
    return loss, reached


def _move(moves: Sequence[tuple[Sample, Tensor, Tensor]]) -> None:
    """Move samples down their slopes, all at once.

    Args:
        moves: each sample, how far to move it, and the gradient, [channels, height, width].
    """
    if not moves:
        return
    samples, sizes, slopes = zip(*moves, strict=True)
    latents, slope = torch.stack([sample.latents for sample in samples]), torch.stack(slopes)
    size = sent(torch.stack(sizes), latents.device)
    moved = latents - size.view(-1, 1, 1, 1) * slope
    for sample, own in zip(samples, moved, strict=True):
        sample.latents = own


def _objective_of(sample: Sample) -> tuple[bool, str]:
    return sample.needs_affinity, str(sample.method.objective)


def _by_objective(samples: list[Sample]) -> list[Sample]:
    """Sort samples by objective, those that need affinity last, so that each group is a slice."""
    return sorted(samples, key=_objective_of)


def _is_watched(sample: Sample) -> bool:
    """True if the subjects are recorded only during denoising."""
    return bool(sample.subjects) and not sample.guided_now


def _last(count: int, wanted: int) -> slice:
    """Return the slice of the last `wanted` of `count` rows, at most all; `NONE` for none."""
    return slice(max(0, count - wanted), None) if wanted > 0 else NONE


def _inputs(rows: Sequence[tuple[Sample, Text]]) -> tuple[Tensor, Tensor, Bag]:
    """Return latents, timesteps and texts as the network takes them."""
    return (
        torch.stack([sample.scaled(sample.latents) for sample, _ in rows]),
        sent(torch.stack([sample.timestep for sample, _ in rows]), rows[0][0].latents.device),
        {name: torch.stack([text.bag[name] for _, text in rows]) for name in rows[0][1].bag},
    )


def _values(rows: Sequence[tuple[Sample, Text]]) -> Tensor | None:
    """Return the texts that cross-attention computes its values from; None if these are the
    keys' texts."""
    if all(text.values is None for _, text in rows):
        return None
    return torch.stack([text.bag[TEXT] if text.values is None else text.values for _, text in rows])
