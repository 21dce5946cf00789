"""Stable Diffusion 1.x and 2.x behind four methods: encode, attend, denoise, decode."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache

import diffusers
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from PIL.Image import Image
from torch import Tensor

from aae_batch.errors import ModelError, SettingsError
from aae_batch.sampling.config import SCHEDULERS
from aae_batch.sampling.model.attention_layers import (
    cross_attention_layers,
    self_attention_layers,
    values_from,
)
from aae_batch.sampling.model.recorder import NONE, AttentionRecorder, Layer

DEFAULT_LEVEL = 2
"""Maps have a quarter of the latents' side, as in the paper: 16 of 64."""


class StableDiffusion:
    """A diffusers pipeline whose UNet predicts epsilon or v.

    Args:
        pipe: a `StableDiffusionPipeline`, or one with the same components. It is changed only
            inside `recording_maps`. Its safety checker is not run.

    Raises:
        ModelError: the components are not those of Stable Diffusion 1.x or 2.x.
    """

    def __init__(self, pipe) -> None:
        check_guidable(pipe)
        self.pipe = pipe
        self.unet = pipe.unet
        self.tokenizer = pipe.tokenizer
        self._recorder: AttentionRecorder | None = None
        self._level = DEFAULT_LEVEL
        self._encode_one = lru_cache(maxsize=64)(self._encode_one)  # type: ignore[method-assign]

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def latents_dtype(self) -> torch.dtype:
        """Dtype in which latents are stored, guided and stepped: at least float32, because an
        update is often too small to change a bfloat16 latent."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def is_version_2(self) -> bool:
        """Stable Diffusion 2.x has OpenCLIP's text encoder, of width 1024."""
        return self.unet.config.cross_attention_dim == 1024

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width of the latents the model was trained on."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return the latents' shape, [channels, height, width], for an image of `height` x
        `width` pixels."""
        factor = self.pipe.vae_scale_factor
        native = self.native_size
        return (
            self.unet.config.in_channels,
            height // factor if height else native[0],
            width // factor if width else native[1],
        )

    # --- the four main methods ---

    @torch.no_grad()
    def encode(self, text: str) -> Tensor:
        """Return the text's embedding for the UNet, [tokens, width].

        Each text is encoded alone, so that the result does not depend on the batch.
        """
        return self._encode_one(text)

    def attend(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, affinity_rows: slice = NONE
    ) -> tuple[Tensor, Tensor | None]:
        """Return attention maps, differentiable in the latents. The forward ends at the last map.

        Args:
            latents: [batch, channels, height, width], scaled as the scheduler requires; cast here
                to the UNet's dtype.
            timesteps: [batch].
            text: [batch, tokens, width].
            affinity_rows: batch rows whose affinity to record.

        Returns:
            Cross-attention [batch, map height, map width, tokens], whose rows sum to 1 over tokens,
            and the affinity [affinity rows, places, places] or None; float32 or better.
        """
        recorder = self._require_recorder()
        with recorder.recording(affinity_rows=affinity_rows, stop_early=True):
            self.unet(latents.to(self.dtype), timesteps, encoder_hidden_states=text)
        return self._recorded(recorder, latents, affinity_rows)

    @torch.no_grad()
    def denoise(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        values: Tensor | None = None,
        record: slice = NONE,
        affinity_rows: slice = NONE,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the UNet's prediction, [batch, channels, height, width] in the latents' dtype, and
        the maps and affinity of some rows, shaped as in `attend`.

        Args:
            latents, timesteps, text: as in `attend`.
            values: [batch, tokens, width], the source of the cross-attention values if not `text`.
                Keys, and so the maps, still come from `text`.
            record: batch rows whose maps to record.
            affinity_rows: those rows of `record` whose affinity to record.
        """
        with ExitStack() as stack:
            if values is not None:
                stack.enter_context(values_from(self.unet, values))
            if record != NONE:
                recorder = self._require_recorder()
                stack.enter_context(recorder.recording(record, affinity_rows))
            predicted = self.unet(latents.to(self.dtype), timesteps, encoder_hidden_states=text)
        noise = predicted.sample.to(self.latents_dtype)
        if record == NONE:
            return noise, None, None
        return noise, *self._recorded(recorder, latents, affinity_rows)

    def _recorded(
        self, recorder: AttentionRecorder, latents: Tensor, affinity_rows: slice
    ) -> tuple[Tensor, Tensor | None]:
        maps = recorder.maps.unflatten(1, self.map_size(latents))
        return maps, None if affinity_rows == NONE else recorder.affinity

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Image | None:
        """Decode final latents, [channels, height, width], to an RGB image.

        A half-precision decoder that overflows is run again in float32. Returns None if the pixels
        are not finite even then.
        """
        vae = self.pipe.vae
        dtype = vae.dtype
        scaled = latents.unsqueeze(0) / vae.config.scaling_factor
        decoded = vae.decode(scaled.to(dtype), return_dict=False)[0]
        if not decoded.isfinite().all():
            if dtype not in (torch.float16, torch.bfloat16):
                return None
            try:
                decoded = vae.to(torch.float32).decode(scaled.float(), return_dict=False)[0]
            finally:
                vae.to(dtype)
            if not decoded.isfinite().all():
                return None
        return self.pipe.image_processor.postprocess(decoded, output_type="pil")[0]

    # --- other methods for sampling ---

    def release_memory(self) -> None:
        """Release the unused memory that the device's allocator holds."""
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).empty_cache()

    def draw_noise(self, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Draw initial noise for one image, [channels, height, width], as diffusers does.

        diffusers' half-precision pipelines draw the same numbers, rounded.
        """
        return randn_tensor(
            (1, *shape), generator=generator, device=self.device, dtype=self.latents_dtype
        ).squeeze(0)

    def scheduler(self, name: str | None):
        """Return a new scheduler: the pipeline's own, or `name` with the same noise schedule.

        Raises:
            SettingsError: the scheduler is unknown or does not fit Stable Diffusion.
        """
        own = self.pipe.scheduler
        class_name = type(own).__name__ if name is None else SCHEDULERS.get(name, name)
        known = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
        if class_name not in known or not hasattr(diffusers, class_name):
            raise SettingsError(
                f"scheduler {class_name!r} cannot be used; take one of {', '.join(SCHEDULERS)}, "
                f"or of diffusers' {', '.join(known)}."
            )
        if name is None:
            return copy.deepcopy(own)
        # Stable Diffusion's own PNDM configuration has no Runge-Kutta steps
        others = {"skip_prk_steps": True} if class_name == "PNDMScheduler" else {}
        return getattr(diffusers, class_name).from_config(own.config, **others)

    @contextmanager
    def recording_maps(self, attn_res: tuple[int, int] | None) -> Iterator[None]:
        """Let `attend` and `denoise` record maps inside the block; restore the pipeline afterwards.

        Raises:
            SettingsError: the UNet has no cross-attention at that resolution.
        """
        self._level = self._find_level(attn_res)
        frozen = [p for p in self.unet.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        layers = [Layer(layer) for layer in cross_attention_layers(self.unet, self._level)]
        layers += [Layer(one, keys=None) for one in self_attention_layers(self.unet, self._level)]
        self._recorder = AttentionRecorder(layers)
        try:
            yield
        finally:
            self._recorder.close()
            self._recorder = None
            for parameter in frozen:
                parameter.requires_grad_(True)

    def map_size(self, latents: Tensor) -> tuple[int, int]:
        """Return the height and width of the maps for latents [..., height, width]."""
        height, width = latents.shape[-2:]
        for _ in range(self._level):  # each level halves, rounding up
            height, width = (height + 1) // 2, (width + 1) // 2
        return height, width

    def _find_level(self, attn_res: tuple[int, int] | None) -> int:
        height, width = self.native_size
        levels = len(self.unet.config.block_out_channels)
        possible = {
            (height >> level, width >> level): level
            for level in range(levels)
            if cross_attention_layers(self.unet, level)
        }
        wanted = attn_res or (height >> DEFAULT_LEVEL, width >> DEFAULT_LEVEL)
        if wanted not in possible:
            have = ", ".join(f"{h}x{w}" for h, w in possible)
            raise SettingsError(
                f"attn_res is {wanted[0]}x{wanted[1]}, but this model has cross-attention at "
                f"{have or 'no resolution'}; choose one of these."
            )
        return possible[wanted]

    def _require_recorder(self) -> AttentionRecorder:
        if self._recorder is None:
            raise RuntimeError("maps are recorded only inside recording_maps()")
        return self._recorder

    def _encode_one(self, text: str) -> Tensor:
        embeddings, _ = self.pipe.encode_prompt(text, self.device, 1, False)
        return embeddings[0].to(self.dtype)


def step_arguments(scheduler, generator: torch.Generator, eta: float) -> dict[str, object]:
    """Return those of the two keyword arguments that `scheduler.step` accepts, as diffusers'
    pipelines do."""
    accepted = inspect.signature(scheduler.step).parameters
    wanted = {"generator": generator, "eta": eta}
    return {name: value for name, value in wanted.items() if name in accepted}


def check_guidable(pipe) -> None:
    """Check that `pipe` has the components of Stable Diffusion 1.x or 2.x.

    Raises:
        ModelError: it does not.
    """
    name = type(pipe).__name__
    parts = ("unet", "vae", "tokenizer", "text_encoder", "scheduler")
    missing = [part for part in parts if getattr(pipe, part, None) is None]
    if missing or hasattr(pipe, "text_encoder_2"):
        raise ModelError(
            f"A {name} cannot be guided: Attend-and-Excite is made here for Stable Diffusion 1.x and "
            "2.x text-to-image models (StableDiffusionPipeline); load one of these."
        )
    config = pipe.unet.config
    if config.in_channels != pipe.vae.config.latent_channels:
        raise ModelError(
            f"The UNet takes {config.in_channels} channels and the latents have "
            f"{pipe.vae.config.latent_channels}: this looks like an inpainting or depth model; "
            "load the text-to-image one."
        )
    prediction = pipe.scheduler.config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"The scheduler's prediction_type is {prediction!r}; only 'epsilon' and 'v_prediction' "
            "models can be guided."
        )
