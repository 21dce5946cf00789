"""A family of models behind a few verbs: encode, attend, denoise, decode."""

from __future__ import annotations

import copy
import logging
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from inspect import signature
from typing import Any, ClassVar
from weakref import WeakSet

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import DataParallel
from torch.nn.parallel import DistributedDataParallel

from aae_batch.errors import ModelError, SettingsError
from aae_batch.quiet import quiet
from aae_batch.sampling import families
from aae_batch.sampling.config import SCHEDULERS, GuidanceConfig
from aae_batch.sampling.memory import AtOnce
from aae_batch.sampling.model.compiled import CompiledPasses, Kind, Made, hooks_of, why_not_compiled
from aae_batch.sampling.model.loading import is_quantized, limits
from aae_batch.sampling.model.recorder import ALL, NONE, AttentionRecorder, Layer, is_compiled
from aae_batch.sampling.words import Stream

logger = logging.getLogger("aae_batch.sampling.model")

Bag = dict[str, Tensor]
"""An encoded text as a network takes it, by the names of its arguments. Every tensor is one row; a
batch stacks them."""

TEXT = "encoder_hidden_states"
"""The part of a bag that a network attends to: [tokens, width]."""

KEPT_TEXTS, WINDOW = 64, 256
"""Encoded texts that are kept, the last ones used; and where text encoders leave the device in between,
where so many are encoded in one go. 256 texts of 512 tokens of T5 are 1 GiB."""

TEXTS_AT_ONCE = 16
"""Texts that share a forward of the text encoders: with 512 tokens for T5 they take about 3 GiB meanwhile."""

EVICTED_ABOVE = 0.1
"""Share of the device's memory above which text encoders are there only while they encode."""

TILED_ABOVE = 4 * 1024 * 1024
"""Images with more pixels than this are decoded in tiles."""


class Network(ABC):
    """A diffusers pipeline of one family.

    Args:
        pipe: the pipeline. It is changed only inside `recording_maps`. Its safety checker is not
            run.

    Raises:
        ModelError: the components are not those of the family.
    """

    facts: ClassVar[families.Family]
    checkpoints: ClassVar[bool] = False
    """Guided forwards save only what is between blocks, and run each block again in the
    backward."""

    def __init__(self, pipe) -> None:
        self.check(pipe)
        self.pipe = pipe
        self._place: tuple[torch.device, torch.dtype] | None = None
        """Device and dtype while a run is open: diffusers finds them by walking over all modules."""
        self.max_sequence_length = self.facts.max_sequence_length
        self.evicts_text_encoders = self._wants_eviction()
        self.batches_texts_and_images = self.device.type != "cpu"
        """Texts share forwards, and images decodings. A CPU gains little by it, and too large a batch ends
        the process there, without an error."""
        self._recorder: AttentionRecorder | None = None
        self._passes_of: Callable[[AttentionRecorder], CompiledPasses] | None = None
        self._compiled: list[CompiledPasses] = []
        self._passes: CompiledPasses | None = None  # of the open run
        self._encoded: OrderedDict[str, Bag] = OrderedDict()
        self._expected: dict[str, None] = {}
        self._texts = AtOnce(TEXTS_AT_ONCE, "texts to encode")
        self._together = False

    # --- what differs from family to family ---

    @property
    @abstractmethod
    def network(self) -> Any:
        """The denoising network."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """The latents' channels."""

    @property
    @abstractmethod
    def native_size(self) -> tuple[int, int]:
        """Height and width of the latents the model was trained on."""

    def check(self, pipe) -> None:
        """Check that a pipeline has the family's components.

        Raises:
            ModelError: it does not.
        """
        missing = [part for part in self.facts.parts if getattr(pipe, part, None) is None]
        if missing:
            raise ModelError(
                f"This {type(pipe).__name__} has no {missing[0]}, and cannot be guided as "
                f"{self.facts.name} without it; load the whole model."
            )
        for part in self.facts.parts:
            if isinstance(getattr(pipe, part), (DataParallel, DistributedDataParallel)):
                raise ModelError(
                    f"The pipeline's {part} is wrapped in {type(getattr(pipe, part)).__name__}, which "
                    f"cannot be guided; set pipe.{part} = pipe.{part}.module, and open an Engine on "
                    "each device to use several."
                )

        for part, tokenizer, most in limits(pipe):
            if tokenizer.model_max_length > most:
                raise ModelError(
                    f"The pipeline's {part} gives texts of any length to a text encoder that reads {most} "
                    f"tokens; set pipe.{part}.model_max_length = {most}."
                )

    @abstractmethod
    def _embed(self, texts: list[str]) -> Bag:
        """Encode texts as the pipeline does; each part of the bag is stacked, [texts, ...]."""

    @abstractmethod
    def blank(self) -> Bag:
        """Return a text without content on the network's device, to count what a pass costs."""

    @abstractmethod
    def _forward(self, latents: Tensor, timesteps: Tensor, text: Bag) -> Tensor:
        """Run the network, on [batch, channels, height, width] in its own dtype."""

    @abstractmethod
    def _layers(self, config: GuidanceConfig) -> list[Layer]:
        """Return the attention layers that guidance reads, in forward order.

        Raises:
            SettingsError: the network has no such layers.
        """

    @abstractmethod
    def map_size(self, latents: Tensor) -> tuple[int, int]:
        """Return the height and width of the maps for latents [..., height, width]."""

    @abstractmethod
    def scheduler(self, name: str | None):
        """Return a new scheduler: the pipeline's own, or `name`.

        Raises:
            SettingsError: the scheduler is unknown or does not fit the model.
        """

    def set_timesteps(self, scheduler, steps: int, shape: Sequence[int]) -> None:
        """Prepare a scheduler for latents of `shape`, as the pipeline does, but with timesteps on the host:
        schedulers read them as numbers, and would wait for the device each time."""
        scheduler.set_timesteps(steps)

    def _extras(self, config: GuidanceConfig) -> Bag:
        """Return what the network takes beside the text, which depends on a row's settings."""
        return {}

    # --- facts ---

    @property
    def device(self) -> torch.device:
        """Where the network runs, wherever accelerate's offloading keeps its weights."""
        if self._place is not None:
            return self._place[0]
        is_hooked = hasattr(self.network, "_hf_hook")
        return self.pipe._execution_device if is_hooked else self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype if self._place is None else self._place[1]

    @property
    def latents_dtype(self) -> torch.dtype:
        """Dtype in which latents are stored, guided and stepped: at least float32, because an
        update is often too small to change a bfloat16 latent."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def sizes(self) -> families.Sizes:
        """What height and width of an image may be."""
        factor = self.pipe.vae_scale_factor
        return families.Sizes.of(self.facts, factor, self.network.config, self.facts.level)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """How the network reads prompts."""
        readers = [r for r in self.facts.readers if getattr(self.pipe, r.encoder, None) is not None]
        tokenizers = {reader.folder: getattr(self.pipe, reader.folder) for reader in readers}
        return self.facts.streams(tokenizers, self.max_sequence_length)

    def trims_text(self, config: GuidanceConfig) -> bool:
        """True if a subject is compared with the words up to the end token only."""
        return self.facts.trims_text if config.normalize_eot is None else config.normalize_eot

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return the latents' shape, [channels, height, width], for an image of `height` x
        `width` pixels."""
        factor, native = self.pipe.vae_scale_factor, self.native_size
        return (
            self.channels,
            height // factor if height else native[0],
            width // factor if width else native[1],
        )

    # --- the four main methods ---

    def encode(self, text: str, config: GuidanceConfig) -> Bag:
        """Encode a text for the network, with what else a row's settings give it.

        Expected texts are encoded with it. All are padded to one length, so what shares a forward changes
        the result only by rounding.
        """
        if text not in self._encoded:
            self._encode_expected(text)
        self._encoded.move_to_end(text)
        kept = {name: one.to(self.device) for name, one in self._encoded[text].items()}
        return {**kept, **self._extras(config)}

    def expect(self, texts: Iterable[str], together: bool) -> None:
        """Announce the texts that will be encoded next, in place of earlier ones: all are encoded in one
        go.

        Args:
            together: texts share forwards, `TEXTS_AT_ONCE` each; else, each is encoded by itself.
        """
        self._expected, self._together = dict.fromkeys(texts), together

    @torch.no_grad()
    def _encode_expected(self, text: str) -> None:
        texts = [*self._expected, text]
        self._expected.clear()
        for one in texts:  # what is there already must not make room for the others
            if one in self._encoded:
                self._encoded.move_to_end(one)
        wanted = [one for one in dict.fromkeys(texts) if one not in self._encoded]
        limit = None if self._together else 1
        with self._text_encoders_here():
            for some, bag in self._texts.fitting(self._kept, wanted, self.release_memory, limit):
                for i, one in enumerate(some):
                    # Clones, because a view would keep the others' memory.
                    self._encoded[one] = {name: part[i].clone() for name, part in bag.items()}
        most = WINDOW if self.evicts_text_encoders else KEPT_TEXTS
        while len(self._encoded) > max(most, len(set(texts))):
            self._encoded.popitem(last=False)

    def _kept(self, texts: list[str]) -> Bag:
        """Encode texts, stacked, in the dtype and the place in which they are kept."""
        device = "cpu" if self.evicts_text_encoders else self.device
        return {name: part.to(device, self.dtype) for name, part in self._embed(texts).items()}

    @property
    def _text_encoders(self) -> list[Any]:
        """Those that can be moved: 8-bit weights of bitsandbytes cannot, and accelerate's hooks keep
        what they placed."""
        names = (f"text_encoder{number}" for number in ("", "_2", "_3"))
        there = [one for name in names if (one := getattr(self.pipe, name, None)) is not None]
        return [
            one
            for one in there
            if not (is_quantized(one) or hasattr(one, "hf_device_map") or hasattr(one, "_hf_hook"))
        ]

    def _wants_eviction(self) -> bool:
        """True if the text encoders take much of the device's memory, as T5's 9 GiB do."""
        if self.device.type != "cuda":
            return False
        parameters = [p for encoder in self._text_encoders for p in encoder.parameters()]
        size = sum(p.numel() * p.element_size() for p in parameters)
        return size > EVICTED_ABOVE * torch.cuda.get_device_properties(self.device).total_memory

    @contextmanager
    def _text_encoders_here(self) -> Iterator[None]:
        """Bring the text encoders to the device inside the block, if they leave it otherwise."""
        if not self.evicts_text_encoders:
            yield
            return
        for encoder in self._text_encoders:
            encoder.to(self.device)
        try:
            yield
        finally:
            self.make_room()

    def encode_negative(self, config: GuidanceConfig) -> Bag:
        """Encode what classifier-free guidance moves away from."""
        return self.encode(config.negative_prompt or "", config)

    def attend(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Bag,
        affinity_rows: slice = NONE,
        columns: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return attention maps, differentiable in the latents. The forward ends at the last map.

        Args:
            latents: [batch, channels, height, width], scaled as the scheduler requires; cast here
                to the network's dtype.
            timesteps: [batch].
            text: encoded texts, stacked.
            affinity_rows: batch rows whose affinity to record.
            columns: tokens whose maps are needed, all if None. Others may be 0.

        Returns:
            Attention to the text [batch, map height, map width, tokens], and the affinity
            [affinity rows, places, places] or None; float32 or better.
        """
        recorder, inputs = self._require_recorder(), (latents.to(self.dtype), timesteps, text)
        made = self._compiled_pass("guided", inputs, ALL, affinity_rows)
        if made is not None:
            assert made.maps is not None
            return made.maps, made.affinity
        with recorder.recording(ALL, affinity_rows, stop_early=True, columns=columns):
            self._forward(*inputs)
        return self._recorded(recorder, latents, affinity_rows)

    @torch.no_grad()
    def denoise(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Bag,
        values: Tensor | None = None,
        record: slice = NONE,
        affinity_rows: slice = NONE,
        columns: Sequence[int] | None = None,
        sample_of: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the network's prediction, [batch, channels, height, width] in the latents' dtype,
        and the maps and affinity of some rows, shaped as in `attend`.

        Args:
            latents, timesteps, text: as in `attend`.
            values: [batch, tokens, width], the source of the cross-attention values if not `text`.
                Keys, and so the maps, still come from `text`.
            record: batch rows whose maps to record.
            affinity_rows: those rows of `record` whose affinity to record.
            columns: as in `attend`.
            sample_of: the sample of each row, whose rows have equal latents and timesteps, if the
                network may use that. It does if the first rows are samples 0, 1, ..., one each.
        """
        inputs = latents.to(self.dtype), timesteps, text
        if values is None:
            kind: Kind = "plain" if record == NONE else "recorded"
            made = self._compiled_pass(kind, inputs, record, affinity_rows, sample_of)
            if made is not None:
                assert made.predicted is not None
                return made.predicted.to(self.latents_dtype), made.maps, made.affinity
        with ExitStack() as stack:
            stack.enter_context(self._sharing(sample_of))
            if values is not None:
                stack.enter_context(self._values_from(values))
            if record != NONE:
                recorder = self._require_recorder()
                stack.enter_context(recorder.recording(record, affinity_rows, columns=columns))
            elif (
                self._recorder is not None
            ):  # a compiled network is compiled with its own processors
                self._recorder.close()
            predicted = self._forward(*inputs)
        predicted = predicted.to(self.latents_dtype)
        if record == NONE:
            return predicted, None, None
        return predicted, *self._recorded(recorder, latents, affinity_rows)

    def _compiled_pass(
        self,
        kind: Kind,
        inputs: tuple[Tensor, Tensor, Bag],
        record: slice,
        affinity_rows: slice,
        sample_of: Sequence[int] = (),
    ) -> Made | None:
        """Run a pass compiled, if it is to be. Returns what it made of the rows asked for, maps shaped as in
        `attend`; None if the pass is to run as it is."""
        if self._passes is None:
            return None
        made = self._passes.run(kind, *inputs, affinity_rows != NONE, sample_of)
        if made is None or made.maps is None:
            return made
        maps = made.maps[record].unflatten(1, self.map_size(inputs[0]))
        affinity = None if made.affinity is None else made.affinity[affinity_rows]
        return Made(made.predicted, maps, affinity)

    def _recorded(
        self, recorder: AttentionRecorder, latents: Tensor, affinity_rows: slice
    ) -> tuple[Tensor, Tensor | None]:
        maps = recorder.maps.unflatten(1, self.map_size(latents))
        return maps, None if affinity_rows == NONE else recorder.affinity

    def _sharing(self, sample_of: Sequence[int]) -> AbstractContextManager[Any]:
        """Compute what a sample's rows have in common once inside the block, if the network can."""
        return nullcontext()

    def _repeated(self, latents: Tensor, timesteps: Tensor, text: Bag, times: int) -> Tensor:
        """Run the network on several texts of each sample.

        Args:
            text: the first text of all samples, then the second, and so on, `times` in all.
        """
        return self._forward(latents.repeat(times, 1, 1, 1), timesteps.repeat(times), text)

    def _values_from(self, values: Tensor):
        raise ModelError(f"{self.facts.name} has no cross-attention with values of its own.")

    def pixels(self, latents: Tensor) -> int:
        """Return the number of pixels of an image, from its latents [..., height, width]."""
        return latents.shape[-2:].numel() * self.pipe.vae_scale_factor**2

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[np.ndarray | None]:
        """Decode final latents, [batch, channels, height, width], to RGB images of uint8 [height, width, 3].

        What overflows in a half-precision decoder is decoded again in float32. Of an image whose pixels
        are not finite even then, there is None.
        """
        vae = self.pipe.vae
        dtype, scaled = vae.dtype, self._unscaled(latents)
        with _tiled(vae, self.pixels(latents)):
            images = self._decoded(scaled.to(dtype))
            again = [i for i, image in enumerate(images) if image is None]
            if again and dtype in (torch.float16, torch.bfloat16):
                with quiet():  # diffusers warns of every cast
                    try:
                        vae.to(torch.float32)
                        in_float32 = self._decoded(scaled[again].float())
                    finally:
                        vae.to(dtype)
                for i, image in zip(again, in_float32, strict=True):
                    images[i] = image
        return images

    def _decoded(self, scaled: Tensor) -> list[np.ndarray | None]:
        """Run the decoder; the bytes are those of diffusers' `postprocess`, which makes them on the host."""
        decoded = self.pipe.vae.decode(scaled, return_dict=False)[0]
        finite = decoded.isfinite().flatten(1).all(1)
        shares = self.pipe.image_processor.postprocess(decoded, output_type="pt").float()
        levels = (shares.permute(0, 2, 3, 1) * 255).round()
        images = levels.to(torch.uint8, memory_format=torch.contiguous_format).cpu().numpy()
        return [
            image.copy() if good else None  # kept without the others
            for image, good in zip(images, finite.tolist(), strict=True)
        ]

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Undo what the VAE's configuration says was done to the latents."""
        config = self.pipe.vae.config
        latents = latents / config.scaling_factor
        if getattr(config, "latents_mean", None) and getattr(config, "latents_std", None):
            shape = (1, -1, 1, 1)
            latents = latents * latents.new_tensor(config.latents_std).view(shape)
            latents = latents + latents.new_tensor(config.latents_mean).view(shape)
        return latents + (getattr(config, "shift_factor", None) or 0)

    # --- other methods for sampling ---

    def make_room(self) -> None:
        """Release all memory of the device that a forward does not need."""
        if self.evicts_text_encoders:
            for encoder in self._text_encoders:
                encoder.to("cpu")
        self.release_memory()

    def release_memory(self) -> None:
        """Release the unused memory that the device's allocator holds."""
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).empty_cache()

    def draw_noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw initial noise for one image, [channels, height, width], as diffusers does.

        diffusers' half-precision pipelines draw the same numbers, rounded.
        """
        return randn_tensor(
            (1, *shape), generator=generator, device=self.device, dtype=self.latents_dtype
        ).squeeze(0)

    @contextmanager
    def recording_maps(self, config: GuidanceConfig | None = None) -> Iterator[None]:
        """Sample with these settings inside the block: let `attend` and `denoise` record maps.
        Restores the pipeline afterwards, and remembers no text.

        Raises:
            ModelError: the pipeline is sampling already, or its attention cannot be read.
            SettingsError: the network has no such attention layers, or reads no sequence of that
                length.
        """
        config = config or GuidanceConfig()
        network, before = self.network, self.max_sequence_length
        with _claimed(network), ExitStack() as stack:
            if getattr(self.pipe, "_all_hooks", None):  # of model offloading
                stack.callback(self.pipe.maybe_free_model_hooks)
            stack.callback(self._forget, before)
            self._forget(self.facts.sequence_length(config.max_sequence_length))
            recorder = self._recorder_for(self._layers(config))
            stack.callback(self._close_passes)
            stack.callback(recorder.close)
            # By name, because accelerate's hooks replace parameters.
            if any(one.is_inference() for one in network.parameters()):
                raise ModelError(
                    "This pipeline was loaded inside torch.inference_mode(), which leaves its weights "
                    "without gradients for good; load it outside."
                )
            trainable = {name for name, one in network.named_parameters() if one.requires_grad}
            stack.callback(_require_grad, network, trainable, True)
            _require_grad(network, trainable, False)
            if self.checkpoints and not network.is_gradient_checkpointing:
                stack.callback(network.disable_gradient_checkpointing)
                network.enable_gradient_checkpointing()
            self._recorder = recorder
            self._place = self.device, self.dtype
            try:
                yield
            finally:
                self._recorder = self._place = None

    def compile(self, patience: float = 0.0, tell: Callable[[str], None] = logger.info) -> None:
        """Compile the network's passes in runs that are opened from now on, each when it has run for some time as it
        is. Where that is not possible, a warning says why.

        Args:
            patience: that time, in seconds.
            tell: called with a sentence when compiling begins and ends.
        """
        reason = why_not_compiled(self.network)
        if reason is not None:
            logger.warning("the model is not compiled, because %s", reason)
            return
        self._compiled = []
        self._passes_of = lambda recorder: CompiledPasses(
            self.network, self._repeated, recorder, patience, tell
        )

    @property
    def compiles(self) -> bool:
        return self._passes_of is not None

    @property
    def compiling_seconds(self) -> float:
        """Time spent on compiling."""
        return sum(passes.seconds for passes in self._compiled)

    def ran(self, seconds: float) -> None:
        """Tell how long the passes since the last call took, with what the caller did until the device had
        finished."""
        if self._passes is not None:
            self._passes.ran(seconds)

    def _recorder_for(self, layers: list[Layer]) -> AttentionRecorder:
        """Return a recorder of these layers: that of an earlier run if passes are compiled with it."""
        fresh = AttentionRecorder(layers, is_compiled(self.network))
        if self._passes_of is None or why_not_compiled(self.network) is not None:
            return fresh
        hooks = hooks_of(self.network)
        known = [one for one in self._compiled if one.recorder.is_of(layers) and one.hooks == hooks]
        if not known:
            known = [self._passes_of(fresh)]
            self._compiled += known
        self._passes = known[0]
        return self._passes.recorder

    def _close_passes(self) -> None:
        if self._passes is not None:
            self._passes.close()
        self._passes = None

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """Compile nothing inside the block."""
        passes, self._passes = self._passes, None
        try:
            yield
        finally:
            self._passes = passes

    def _forget(self, length: int | None) -> None:
        """Forget all texts, which text encoders may encode otherwise the next time, and read
        sequences of this length."""
        self.max_sequence_length = length
        self._encoded.clear()
        self._expected.clear()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def _require_recorder(self) -> AttentionRecorder:
        if self._recorder is None:
            raise RuntimeError("maps are recorded only inside recording_maps()")
        return self._recorder


_sampling: WeakSet[torch.nn.Module] = WeakSet()
_sampling_lock = threading.RLock()
"""Reentrant, because a generator that the garbage collector closes may be in the same thread."""


@contextmanager
def _claimed(network: torch.nn.Module) -> Iterator[None]:
    """Keep others from sampling with a network inside the block.

    Raises:
        ModelError: it is sampling already.
    """
    network = getattr(network, "_orig_mod", network)  # of a compiled one
    with _sampling_lock:
        if network in _sampling:
            raise ModelError(
                "This pipeline is still sampling for another generate; take all its results or call "
                "its close() first, or load the pipeline a second time."
            )
        _sampling.add(network)
    try:
        yield
    finally:
        with _sampling_lock:
            _sampling.discard(network)


def _require_grad(network: torch.nn.Module, names: Set[str], required: bool) -> None:
    for name, parameter in network.named_parameters():
        if name in names:
            parameter.requires_grad_(required)


def network_of(pipe) -> Network:
    """Return a pipeline behind the verbs of its family.

    Raises:
        ModelError: it is of none, or its components are not those of its family.
    """
    from pkgutil import resolve_name

    family = families.family_of(type(pipe))
    if family is None:
        raise ModelError(f"This is {families.why_not_guidable(type(pipe).__name__)}.")
    return resolve_name(family.network)(pipe)


def chosen(layers: Sequence[Any], numbers: Sequence[int] | None, what: str) -> list[Any]:
    """Return the layers that a setting chooses by number; all without one.

    Raises:
        SettingsError: there is none of a number.
    """
    if numbers is None:
        return list(layers)
    wrong = [number for number in numbers if number >= len(layers)]
    if wrong:
        raise SettingsError(
            f"attn_layers has {wrong[0]}, but this model has {what} 0 to {len(layers) - 1}; choose "
            "among these."
        )
    return [layers[number] for number in numbers]


# --- schedulers of all kinds ---


def named_scheduler(own, name: str | None, known: Sequence[str]):
    """Return a copy of the pipeline's scheduler, or `name` with the same noise schedule.

    Args:
        known: the classes that fit the family.

    Raises:
        SettingsError: the scheduler is none of these, or has no such noise schedule.
    """
    if name is None or (name == type(own).__name__ and name in known):
        return copy.deepcopy(own)
    class_name = SCHEDULERS.get(name, name)
    if class_name not in known or not hasattr(diffusers, class_name):
        short = [name for name, long in SCHEDULERS.items() if long in known]
        raise SettingsError(
            f"scheduler {class_name!r} cannot be used; take one of {', '.join([*short, *known])}."
        )
    made = getattr(diffusers, class_name)
    if ("beta_schedule" in own.config) != ("beta_schedule" in signature(made.__init__).parameters):
        raise SettingsError(
            f"scheduler {class_name!r} cannot have the noise schedule of this model's "
            f"{type(own).__name__}; leave it out, or take another."
        )
    # Stable Diffusion's own PNDM configuration has no Runge-Kutta steps
    others = {"skip_prk_steps": True} if class_name == "PNDMScheduler" else {}
    return made.from_config(own.config, **others)


def noise_scale(scheduler) -> float:
    """Return the standard deviation of initial latents."""
    return getattr(scheduler, "init_noise_sigma", 1.0)


def scaled(scheduler, latents: Tensor, timestep: Tensor) -> Tensor:
    """Scale latents as the network expects: the identity for DDIM, PNDM and flow matching."""
    scale = getattr(scheduler, "scale_model_input", None)
    return latents if scale is None else scale(latents, timestep)


def step_arguments(scheduler, generator: torch.Generator, eta: float) -> dict[str, object]:
    """Return those of the two keyword arguments that `scheduler.step` accepts, as diffusers'
    pipelines do."""
    accepted = signature(scheduler.step).parameters
    wanted = {"generator": generator, "eta": eta}
    return {name: value for name, value in wanted.items() if name in accepted}


@contextmanager
def _tiled(vae, pixels: int) -> Iterator[None]:
    """Decode in tiles inside the block if the image is large."""
    if pixels <= TILED_ABOVE or getattr(vae, "use_tiling", True):
        yield
        return
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()
