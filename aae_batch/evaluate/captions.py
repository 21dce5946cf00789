"""Would a caption of the picture say what the prompt says? Computed as Attend-and-Excite's text-text
similarity is (Chefer et al. 2023, section 5; official `blip_captioning_and_clip_similarity.py`), with a
captioner of choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from aae_batch.evaluate.clip import Clip
from aae_batch.evaluate.metric import Attention, Loaded, Row, column
from aae_batch.evaluate.models import load_model, load_part
from aae_batch.evaluate.templates import IMAGENET_TEMPLATES

if TYPE_CHECKING:
    from PIL.Image import Image

DECODING = {"num_beams": 3, "max_length": 30, "min_length": 10, "do_sample": False}
"""How captions are decoded: LAVIS's own for BLIP, which the official code calls. Lengths are in tokens
and count the prefix."""

PREFIX = "a picture of "
"""What LAVIS has BLIP's captions begin with, as they were fine-tuned; it is no part of the caption."""


@dataclass
class CaptionsMetric:
    """A caption of the picture, and the similarity of prompt and caption by CLIP's text encoder.

    The prompt is the mean of its 80 ImageNet sentences, the caption stands for itself, as in the
    official code. Any captioning model of transformers' `AutoModelForImageTextToText` that needs no
    instruction will do. The official code takes LAVIS's BLIP (Li et al. 2022, arXiv 2201.12086), base,
    fine-tuned on COCO; the default weights here may be another checkpoint, so figures need not be the
    paper's.

    Attributes:
        prefix: what the captioner is made to go on from; empty for one that begins by itself.
    """

    caption_model: str
    model: str
    s3_endpoint: str | None = None
    prefix: str = PREFIX
    _loaded: Any = field(default=None, init=False, repr=False)

    sees_images = True
    attention_columns = ()
    columns = (
        column("caption", pa.string(), "What the captioning model says of the picture."),
        column("clip_caption", pa.float32(), "Cosine of the caption with the prompt."),
    )

    @property
    def models(self) -> tuple[str, ...]:
        return (self.caption_model, self.model)

    def settings(self) -> dict[str, Any]:
        return {
            "caption_model": self.caption_model,
            "model": self.model,
            "templates": len(IMAGENET_TEMPLATES),
            "decoding": DECODING,
            "caption_prefix": self.prefix,
        }

    def load(self, device: str, dtype: str) -> Loaded:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        name, endpoint = self.caption_model, self.s3_endpoint
        clip = Clip(self.model, device, dtype, endpoint)
        captioner = load_model(AutoModelForImageTextToText, name, device, dtype, endpoint)
        tokenizer = load_part(AutoTokenizer, name, endpoint)
        processor = load_part(AutoImageProcessor, name, endpoint, backend="pil")
        self._loaded = clip, captioner, tokenizer, processor
        return Loaded.of(captioner)

    def score(
        self, rows: Sequence[Row], images: Sequence[Image], attention: Attention
    ) -> list[dict[str, Any]]:
        clip = self._loaded[0]
        captions = self.captions(images)
        return [
            {"caption": caption, "clip_caption": float(said @ clip.ensemble(row["prompt"]))}
            for row, caption, said in zip(rows, captions, clip.texts(captions), strict=True)
        ]

    def captions(self, images: Sequence[Image]) -> list[str]:
        import torch

        _, captioner, tokenizer, processor = self._loaded
        pixels = processor(list(images), return_tensors="pt")["pixel_values"]
        begun, said = self._begun(len(images))
        with torch.inference_mode():
            pixels = pixels.to(captioner.device, captioner.dtype)
            tokens = captioner.generate(pixel_values=pixels, **begun, **DECODING)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip().removeprefix(said).strip() for text in texts]

    def _begun(self, images: int) -> tuple[dict[str, Any], str]:
        """The prefix as inputs of `generate`, and as it reads when it is decoded again."""
        if not self.prefix.strip():
            return {}, ""
        _, captioner, tokenizer, _ = self._loaded
        words = tokenizer([self.prefix] * images, return_tensors="pt").to(captioner.device)
        begun = {name: words[name] for name in ("input_ids", "attention_mask")}
        return begun, tokenizer.decode(begun["input_ids"][0], skip_special_tokens=True).strip()
