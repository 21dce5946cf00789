"""A request, its result, and the attention record of its subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from aae_batch.errors import RowError


@dataclass(frozen=True)
class Request:
    """One image to generate. Fields that are None follow the run's `GuidanceConfig`.

    Attributes:
        prompt: the text.
        subjects: words or phrases of the prompt that must be drawn, in any order, e.g.
            `["cat", "red frog"]`.
        token_indices: instead of `subjects`, positions in the tokenizer's output, where 0 is the
            start token, as in diffusers; an inner list is one subject of several tokens. Give both
            only if they agree.
        seed: of the initial noise, drawn on the CPU as diffusers does with
            `torch.Generator("cpu").manual_seed(seed)`.
        id: the row's name in errors and results.
        negative_prompt: what classifier-free guidance moves away from.
        guidance_scale: classifier-free guidance; 1 or less switches it off.
        num_inference_steps: denoising steps.
        height, width: in pixels; multiples of 8.
        method: a key of `aae_batch.methods.METHODS`, e.g. `"attend-and-excite"`, or
            `"stable-diffusion"` for no guidance.
    """

    prompt: str
    subjects: Sequence[str] | None = None
    token_indices: Sequence[int] | Sequence[Sequence[int]] | None = None
    seed: int = 0
    id: str | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    height: int | None = None
    width: int | None = None
    method: str | None = None

    @property
    def name(self) -> str:
        """The row's name in errors: its id, or its prompt if it has none."""
        return self.id if self.id is not None else repr(self.prompt)


@dataclass(frozen=True)
class SubjectAttention:
    """The attention of one subject of one image. Per-step arrays are float32, one entry per
    denoising step.

    If a prompt is denoised conjunct by conjunct (composable-diffusion), the maps are those of the
    subject's own conjunct, and "words" are that conjunct's.

    Attributes:
        subject: its words, as in the row or in the prompt.
        token_indices: its positions in the tokenizer's output.
        tokens: the part of the prompt at each of these positions.
        max_attention: the largest value of the subject's map after softmax and smoothing,
            in [0, 1]; one minus this is the subject's part of the loss.
        mean_attention: the mean of the subject's map after softmax, over the image.
        entropy: in nats, of that map as a distribution over the image.
        center_x, center_y: its centre of mass in [0, 1], from the left and from the top.
        map_steps: the steps whose maps are kept, ascending; the last step is the last of them.
        maps: uint8 [map_steps, height, width], the cross-attention in each step's last forward,
            averaged over heads and layers (before the softmax over words), as
            `round(255 * probability / map_scales[i])`.
        map_scales: float32 [map_steps], the largest probability of each map.
    """

    subject: str
    token_indices: tuple[int, ...]
    tokens: tuple[str, ...]
    max_attention: np.ndarray = field(repr=False)
    mean_attention: np.ndarray = field(repr=False)
    entropy: np.ndarray = field(repr=False)
    center_x: np.ndarray = field(repr=False)
    center_y: np.ndarray = field(repr=False)
    map_steps: tuple[int, ...]
    maps: np.ndarray = field(repr=False)
    map_scales: np.ndarray = field(repr=False)

    @property
    def map(self) -> np.ndarray:
        """The last step's map: uint8 [height, width]."""
        return self.maps[-1]

    @property
    def map_scale(self) -> float:
        """The largest probability of `map`, for which its 255 stands."""
        return float(self.map_scales[-1])


def _no_steps() -> np.ndarray:
    import numpy as np  # imported here so that the command line starts quickly

    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True)
class AttentionRecord:
    """What the engine recorded about one image.

    Attributes:
        subjects: one entry per subject; empty if the request named none.
        loss: float32 [steps], the method's own loss in each step's last guided forward, before its
            update; for a method without a loss, that of Attend-and-Excite.
        num_refinements: guided forwards beyond one per guided step: latent updates of iterative
            refinement over all steps, plus the noises tried before the first step.
        final_loss: the loss at the last step.
        neglected: the worst subject's attention never reached Attend-and-Excite's last threshold,
            whatever the method; None without thresholds.
    """

    subjects: tuple[SubjectAttention, ...] = ()
    loss: np.ndarray = field(default_factory=_no_steps, repr=False)
    num_refinements: int = 0
    final_loss: float | None = None
    neglected: bool | None = None


class _Picture:
    """The field `image` of a result: made of its pixels when it is first asked for."""

    def __get__(self, result: Result | None, owner: type | None = None) -> Image | None:
        held = None if result is None else result.__dict__["image"]
        if held is None:
            return None
        from PIL import Image  # imported here so that the command line starts quickly

        if not isinstance(held, Image.Image):
            assert result is not None
            held = result.__dict__["image"] = Image.fromarray(held)
        return held

    def __set__(self, result: Result, value: Image | np.ndarray | None) -> None:
        result.__dict__["image"] = value


@dataclass(frozen=True, repr=False)
class Result:
    """The result of one request: either an image or an error. A notebook shows its image, and the maps
    and curves of its subjects.

    Attributes:
        request: the request as given.
        image: RGB. It may be given as pixels, uint8 [height, width, 3]: the image is made when it is first
            asked for, in the caller's thread.
        latents: the final latents, [channels, height / 8, width / 8], on the CPU.
        attention: the attention record.
        error: why there is no image.
        seconds: from the moment the request got a slot until its image was decoded. Requests in
            other slots share that time.
        guided: guided forwards with their backwards.
        denoised: texts that were denoised, over all steps: two a step with classifier-free guidance.
        method: the request's or the run's; None if the request could not be sampled.
    """

    request: Request
    image: _Picture = _Picture()
    latents: Tensor | None = None
    attention: AttentionRecord | None = None
    error: RowError | None = None
    seconds: float = 0.0
    guided: int = 0
    denoised: int = 0
    method: str | None = None

    @property
    def forwards(self) -> int:
        """What the result cost: guided forwards and texts denoised."""
        return self.guided + self.denoised

    def __repr__(self) -> str:
        from aae_batch.display import result_text

        return result_text(self)

    def _repr_html_(self) -> str:
        from aae_batch.display import result_html

        return result_html(self)
