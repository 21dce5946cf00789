"""Would a caption of the picture say what the prompt says? Computed as Attend-and-Excite's text-text
similarity is (Chefer et al. 2023, section 5; official `blip_captioning_and_clip_similarity.py`), with a
captioner of choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from aae_batch.columns import column
from aae_batch.evaluate.clip import Clip
from aae_batch.evaluate.metric import Attention, Loaded, MetadataRow, Metric
from aae_batch.evaluate.models import Judge
from aae_batch.evaluate.templates import IMAGENET_TEMPLATES

if TYPE_CHECKING:
    from PIL.Image import Image

DECODING = {"num_beams": 3, "max_length": 30, "min_length": 10, "do_sample": False}
"""How captions are decoded: LAVIS's own for BLIP, which the official code calls. Lengths are in tokens
and count the prefix."""


@dataclass
class CaptionsMetric(Metric):
    """A caption of the picture, and the similarity of prompt and caption by CLIP's text encoder.

    The prompt is the mean of its 80 ImageNet sentences, the caption stands for itself, as in the
    official code. Any captioning model of transformers' `AutoModelForImageTextToText` that needs no
    instruction will do. The official code takes LAVIS's BLIP (Li et al. 2022, arXiv 2201.12086), base,
    fine-tuned on COCO; the default weights here may be another checkpoint, so figures need not be the
    paper's.

    Attributes:
        prefix: what the captioner is made to go on from, as BLIP was fine-tuned to; it is no part of the
            caption. Empty for one that begins by itself.
    """

    caption_model: str
    model: str
    s3_endpoint: str | None = None
    prefix: str = ""
    _loaded: Any = field(default=None, init=False, repr=False)

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
        from transformers import AutoModelForImageTextToText as Captioner

        where = (device, dtype, self.s3_endpoint)
        self._loaded = Clip(self.model, *where), Judge.load(Captioner, self.caption_model, *where)
        return Loaded.of(self._loaded[1].model)

    def score(
        self, rows: Sequence[MetadataRow], images: Sequence[Image], attention: Attention
    ) -> list[dict[str, Any]]:
        clip, _ = self._loaded
        captions = self.captions(images)
        return [
            {"caption": caption, "clip_caption": float(said @ clip.ensemble(row["prompt"]))}
            for row, caption, said in zip(rows, captions, clip.texts(captions), strict=True)
        ]

    def captions(self, images: Sequence[Image]) -> list[str]:
        import torch

        captioner: Judge = self._loaded[1]
        words, prefix = captioner.tokenizer, ""
        start: dict[str, Any] = {}
        if self.prefix.strip():
            tokens = words([self.prefix] * len(images), return_tensors="pt")
            tokens = tokens.to(captioner.model.device)
            start = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            prefix = words.decode(start["input_ids"][0], skip_special_tokens=True).strip()
        with torch.inference_mode():
            pixels = captioner.pixels(images)
            tokens = captioner.model.generate(pixel_values=pixels, **start, **DECODING)
        texts = words.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip().removeprefix(prefix).strip() for text in texts]
