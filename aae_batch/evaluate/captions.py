"""The captions metric: similarity between the prompt and a caption of the image.

It computes Attend-and-Excite's text-text similarity (Chefer et al. 2023, section 5; official
`blip_captioning_and_clip_similarity.py`) with any captioning model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from aae_batch.columns import column
from aae_batch.evaluate.clip import Clip
from aae_batch.evaluate.metric import Attention, Loaded, MetadataRow, Metric
from aae_batch.evaluate.models import Judge
from aae_batch.evaluate.templates import IMAGENET_TEMPLATES

if TYPE_CHECKING:
    from PIL.Image import Image

DECODING = {"num_beams": 3, "max_length": 30, "min_length": 10, "do_sample": False}
"""Decoding settings: LAVIS's defaults for BLIP, which the official code uses. Lengths are in tokens,
including the prefix."""


@dataclass
class CaptionsMetric(Metric):
    """Caption of the image, and cosine similarity of prompt and caption in CLIP's text encoder.

    As in the official code, the prompt is embedded as the mean of its 80 ImageNet templates, and the
    caption as it is. The captioner can be any model of transformers' `AutoModelForImageTextToText` that
    needs no instruction. The official code uses LAVIS's BLIP base, fine-tuned on COCO (Li et al. 2022,
    arXiv 2201.12086). The default weights here may be another checkpoint, so scores may differ from the
    paper's.

    Attributes:
        prefix: text that the captioner continues, as in BLIP's fine-tuning; not part of the caption.
            Empty for a captioner that needs none.
    """

    caption_model: str
    model: str
    s3_endpoint: str | None = None
    prefix: str = ""
    _loaded: Any = field(default=None, init=False, repr=False)

    columns = (
        column("caption", pa.string(), "Caption of the image."),
        column("clip_caption", pa.float32(), "Cosine similarity of the caption and the prompt."),
    )
    short: ClassVar = {"similarity": "clip_caption"}
    best_by = "similarity"

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
