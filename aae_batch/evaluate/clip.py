"""Do picture and text agree? Similarities of CLIP (Radford et al. 2021, arXiv 2103.00020), as
Attend-and-Excite reports them (Chefer et al. 2023, section 5; official `compute_clip_similarity.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from aae_batch.errors import ModelError
from aae_batch.evaluate.metric import Attention, Loaded, Row, column
from aae_batch.evaluate.models import load_model, load_part
from aae_batch.evaluate.phrases import phrases, subjects_of
from aae_batch.evaluate.templates import IMAGENET_TEMPLATES, ensemble

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

TEXTS_HELD = 4096
"""Embeddings of texts that are kept: the seeds of a prompt share it."""


class Clip:
    """A CLIP model of transformers. Its embeddings are unit vectors: [n, width], float32."""

    def __init__(self, model: str, device: str, dtype: str, s3_endpoint: str | None) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.model = load_model(AutoModel, model, device, dtype, s3_endpoint)
        if not (hasattr(self.model, "text_model") and hasattr(self.model, "get_image_features")):
            raise ModelError(
                f"Model {model!r} is a {type(self.model).__name__}, which does not compare texts with "
                "pictures; use a CLIP model, e.g. openai/clip-vit-base-patch16."
            )
        self.tokenizer = load_part(AutoTokenizer, model, s3_endpoint)
        self.processor = load_part(AutoImageProcessor, model, s3_endpoint, backend="pil")
        self.ensemble = lru_cache(TEXTS_HELD)(self._ensemble)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Longer texts than the model reads are cut."""
        import torch

        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.model.device)
        with torch.inference_mode():
            return _unit(self.model.get_text_features(**tokens).pooler_output)

    def images(self, images: Sequence[Image]) -> Tensor:
        import torch

        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            pixels = pixels.to(self.model.device, self.model.dtype)
            return _unit(self.model.get_image_features(pixels).pooler_output)

    def _ensemble(self, text: str) -> Tensor:
        """A text as the mean of its 80 sentences: [width], of length one."""
        return _unit(self.texts(ensemble(text)).mean(dim=0))


def _unit(vectors: Tensor) -> Tensor:
    vectors = vectors.float()
    return vectors / vectors.norm(dim=-1, keepdim=True)


@dataclass
class ClipMetric:
    """Similarity of the picture with the full prompt, and the least of those with its subjects.

    A text is the normalised mean of the embeddings of the 80 ImageNet templates with the text in its
    place. The text of a subject is the part of the prompt that speaks of it (see `phrases.py`): the
    official code splits the prompt at " and " or " with " into two.
    """

    model: str
    s3_endpoint: str | None = None
    clip: Clip | None = field(default=None, init=False, repr=False)

    sees_images = True
    attention_columns = ("subject",)
    columns = (
        column("clip_full", pa.float32(), "Cosine of the picture with the prompt."),
        column(
            "clip_min_subject",
            pa.float32(),
            "The least of the picture's cosines with its subjects; null without subjects.",
        ),
    )

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def settings(self) -> dict[str, Any]:
        return {"model": self.model, "templates": len(IMAGENET_TEMPLATES)}

    def load(self, device: str, dtype: str) -> Loaded:
        self.clip = Clip(self.model, device, dtype, self.s3_endpoint)
        return Loaded.of(self.clip.model)

    def score(
        self, rows: Sequence[Row], images: Sequence[Image], attention: Attention
    ) -> list[dict[str, Any]]:
        assert self.clip is not None
        scores = []
        for row, image in zip(rows, self.clip.images(images), strict=True):
            prompt, subjects = row["prompt"], subjects_of(row, attention.get(row["id"], ()))
            of_subjects = [
                float(image @ self.clip.ensemble(text)) for text in phrases(prompt, subjects)
            ]
            scores.append(
                {
                    "clip_full": float(image @ self.clip.ensemble(prompt)),
                    "clip_min_subject": min(of_subjects, default=None),
                }
            )
        return scores
