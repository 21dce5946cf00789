"""What is asked for, one image, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from aae_batch.errors import RowError
    from aae_batch.sampling.trace import AttentionRecord

Method = Literal[
    "stable-diffusion", "composable-diffusion", "structure-diffusion", "attend-and-excite"
]
METHODS: tuple[str, ...] = get_args(Method)
"""In the order of the paper's comparison: its three baselines, and its own method."""


@dataclass(frozen=True)
class Request:
    """One image to generate. Fields left at None follow the run's `GuidanceConfig`.

    Attributes:
        prompt: the text.
        subjects: words or phrases of the prompt that must be drawn, in any order, e.g.
            `["cat", "red frog"]`.
        token_indices: instead of `subjects`, positions in the tokenizer's output, where 0 is the
            start token, as in diffusers; an inner list is one subject of several tokens. Give both
            only if they agree.
        seed: of the initial noise, drawn on the CPU as diffusers does with
            `torch.Generator("cpu").manual_seed(seed)`.
        id: the name of the row in errors and results.
        negative_prompt: what classifier-free guidance moves away from.
        guidance_scale: classifier-free guidance; 1 or less switches it off.
        num_inference_steps: denoising steps.
        height, width: in pixels; multiples of 8.
        method: `"attend-and-excite"`; `"stable-diffusion"` for the same without guidance;
            `"composable-diffusion"` (Liu et al. 2022) or `"structure-diffusion"` (Feng et al. 2023),
            which `aae_batch.sampling.texts` describes.
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
    method: Method | None = None

    @property
    def name(self) -> str:
        """How errors call this row: its id, or its prompt where it has none."""
        return self.id if self.id is not None else repr(self.prompt)


@dataclass(frozen=True)
class Result:
    """What became of one request: either an image, or an error.

    Attributes:
        request: the request, as it was given.
        image: RGB.
        latents: the final latents, [channels, height / 8, width / 8], on the CPU.
        attention: what was seen of each subject.
        error: why there is no image.
        seconds: from the moment the request got a slot until its image was decoded. Requests in
            other slots share that time.
    """

    request: Request
    image: Image | None = None
    latents: Tensor | None = None
    attention: AttentionRecord | None = None
    error: RowError | None = None
    seconds: float = 0.0
