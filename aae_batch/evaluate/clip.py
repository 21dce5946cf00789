"""The clip metric: image-text similarity in CLIP (Radford et al. 2021, arXiv 2103.00020), as
Attend-and-Excite reports it (Chefer et al. 2023, section 5; official `compute_clip_similarity.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from aae_batch.columns import column
from aae_batch.evaluate.metric import Attention, Loaded, MetadataRow, Metric
from aae_batch.evaluate.models import Judge
from aae_batch.evaluate.phrases import phrases, subjects_of
from aae_batch.evaluate.templates import IMAGENET_TEMPLATES, ensemble

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

TEXTS_HELD = 4096
"""Size of the cache of text embeddings, which images of one prompt share."""


class Clip:
    """A CLIP model of transformers. Embeddings are unit vectors: [n, width], float32."""

    def __init__(self, model: str, device: str, dtype: str, s3_endpoint: str | None) -> None:
        from transformers import AutoModel

        self._judge = Judge.load(
            AutoModel,
            model,
            device,
            dtype,
            s3_endpoint,
            needs=("text_model", "get_image_features"),
            advice=", which does not compare texts with images; use a CLIP model, e.g. "
            "openai/clip-vit-base-patch16.",
        )
        self.model = self._judge.model
        self.ensemble = lru_cache(TEXTS_HELD)(self._ensemble)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, truncated to the length of the model."""
        import torch

        tokens = self._judge.tokens(texts, padding=True)
        with torch.inference_mode():
            return _unit(self.model.get_text_features(**tokens).pooler_output)

    def images(self, images: Sequence[Image]) -> Tensor:
        import torch

        with torch.inference_mode():
            return _unit(self.model.get_image_features(self._judge.pixels(images)).pooler_output)

    def _ensemble(self, text: str) -> Tensor:
        """Return the normalized mean embedding of a text in the 80 ImageNet templates: [width]."""
        return _unit(self.texts(ensemble(text)).mean(dim=0))


def _unit(vectors: Tensor) -> Tensor:
    vectors = vectors.float()
    return vectors / vectors.norm(dim=-1, keepdim=True)


@dataclass
class ClipMetric(Metric):
    """Cosine similarity of the image with the full prompt, and the minimum of those with its subjects.

    A text is embedded as the normalized mean over the 80 ImageNet templates. The text of a subject is its
    phrase in the prompt (see `phrases.py`); the official code splits the prompt in two at " and " or
    " with ".
    """

    model: str
    s3_endpoint: str | None = None
    clip: Clip | None = field(default=None, init=False, repr=False)

    attention_columns = ("subject",)
    columns = (
        column("clip_full", pa.float32(), "Cosine similarity of the image and the prompt."),
        column(
            "clip_min_subject",
            pa.float32(),
            "Minimum over subjects of the cosine similarity with the image; null without subjects.",
        ),
    )
    short: ClassVar = {"full": "clip_full", "min_subject": "clip_min_subject"}
    best_by = "min_subject"

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def settings(self) -> dict[str, Any]:
        return {"model": self.model, "templates": len(IMAGENET_TEMPLATES)}

    def load(self, device: str, dtype: str) -> Loaded:
        self.clip = Clip(self.model, device, dtype, self.s3_endpoint)
        return Loaded.of(self.clip.model)

    def score(
        self, rows: Sequence[MetadataRow], images: Sequence[Image], attention: Attention
    ) -> list[dict[str, Any]]:
        assert self.clip is not None
        scores = []
        for row, image in zip(rows, self.clip.images(images), strict=True):
            prompt, subjects = row["prompt"], subjects_of(row, attention)
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
