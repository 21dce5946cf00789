"""Are the subjects there? Detectors look for each of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from aae_batch.errors import ModelError
from aae_batch.evaluate.metric import Attention, Loaded, Row, column
from aae_batch.evaluate.models import load_model, load_part
from aae_batch.evaluate.phrases import phrases, subjects_of
from aae_batch.evaluate.templates import filled

if TYPE_CHECKING:
    from PIL.Image import Image

    from aae_batch.shapes.world import Thing

SHAPES = "shapes"
"""The name of the embedded model's detector, which needs no weights."""

QUERY = "a photo of a {}"
"""What an open-vocabulary detector is asked for, as in OWL-ViT's and OWLv2's own examples."""

COLUMNS = (
    column("subjects_named", pa.int32(), "How many subjects the row names."),
    column("subjects_found", pa.int32(), "How many of them are in the picture."),
    column("all_found", pa.bool_(), "All of them are; null without subjects."),
    column("found", pa.list_(pa.bool_()), "Which of them are, in their order."),
    column("scores", pa.list_(pa.float32()), "How sure the detector is of each, in [0, 1]."),
)


@dataclass
class ShapesDetector:
    """The detector of the embedded model's world (`aae_batch.shapes.detector.judge`).

    A subject is found where there is such a shape, whatever its colour; its score is the likeness of
    the best such object. `bound` says whether that shape is there in the colour that the prompt gives
    it, null where it gives none. All is null where a subject is no shape of the world.
    """

    sees_images = True
    attention_columns = ("subject",)
    models = ()
    columns = (
        *COLUMNS,
        column(
            "bound",
            pa.list_(pa.bool_()),
            "Which subjects are in the picture in the colour that the prompt gives them; null where "
            "it gives none.",
        ),
        column("all_bound", pa.bool_(), "All that have a colour are; null where none has."),
    )

    def settings(self) -> dict[str, Any]:
        return {"detector": SHAPES}

    def load(self, device: str, dtype: str) -> Loaded:
        return Loaded()

    def score(
        self, rows: Sequence[Row], images: Sequence[Image], attention: Attention
    ) -> list[dict[str, Any]]:
        return [
            self._look(row["prompt"], subjects_of(row, attention.get(row["id"], ())), image)
            for row, image in zip(rows, images, strict=True)
        ]

    def _look(self, prompt: str, subjects: Sequence[str], image: Image) -> dict[str, Any]:
        from aae_batch.shapes.detector import judge

        named = [
            thing_of(subject, phrase)
            for subject, phrase in zip(subjects, phrases(prompt, subjects), strict=True)
        ]
        things = [thing for thing in named if thing is not None]
        if len(things) < len(named):
            return {column.name: None for column in self.columns}
        verdict = judge(image, things)
        scores = [
            max((seen.score for seen in verdict.detections if seen.shape == thing.shape), default=0)
            for thing in things
        ]
        bound = [
            there if thing.colour else None
            for thing, there in zip(things, verdict.bound, strict=True)
        ]
        coloured = [there for there in bound if there is not None]
        return _summed(verdict.drawn, scores) | {
            "bound": bound,
            "all_bound": all(coloured) if coloured else None,
        }


def thing_of(subject: str, phrase: str) -> Thing | None:
    """The shape that a subject names, in the colour that stands directly before it in the subject, else
    in its phrase, or in none: "circle" of "a red circle". None where it names no shape of the world."""
    from aae_batch.shapes.world import SHAPES, Thing

    shape = next((word for word in _words(subject) if word in SHAPES), None)
    if shape is None:
        return None
    return Thing(shape, _colour_before(shape, subject) or _colour_before(shape, phrase))


def _colour_before(shape: str, text: str) -> str:
    from aae_batch.shapes.world import COLOURS

    words = ["", *_words(text)]
    before = words[words.index(shape) - 1] if shape in words else ""
    return before if before in COLOURS else ""


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@dataclass
class OpenVocabularyDetector:
    """A detector that is told what to look for: OWL-ViT (Minderer et al. 2022, arXiv 2205.06230), OWLv2,
    or another of transformers' with the same outputs.

    It is asked for "a photo of a {phrase}", where the phrase is the part of the prompt that speaks of
    the subject (see `phrases.py`). A subject's score is the largest over all boxes, and it is found
    from `threshold` on. Where two subjects are the same words, one object does for both.
    """

    model: str
    threshold: float
    s3_endpoint: str | None = None
    _loaded: Any = field(default=None, init=False, repr=False)

    sees_images = True
    attention_columns = ("subject",)
    columns = COLUMNS

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def settings(self) -> dict[str, Any]:
        return {"detector": self.model, "detector_threshold": self.threshold}

    def load(self, device: str, dtype: str) -> Loaded:
        from transformers import (
            AutoImageProcessor,
            AutoModelForZeroShotObjectDetection,
            AutoTokenizer,
        )

        name, endpoint = self.model, self.s3_endpoint
        detector = load_model(AutoModelForZeroShotObjectDetection, name, device, dtype, endpoint)
        if not hasattr(detector, "class_predictor"):
            raise ModelError(
                f"Model {name!r} is a {type(detector).__name__}; use an OWL-type detector, e.g. "
                "google/owlv2-base-patch16-ensemble."
            )
        tokenizer = load_part(AutoTokenizer, name, endpoint)
        processor = load_part(AutoImageProcessor, name, endpoint, backend="pil")
        self._loaded = detector, tokenizer, processor
        return Loaded.of(detector)

    def score(
        self, rows: Sequence[Row], images: Sequence[Image], attention: Attention
    ) -> list[dict[str, Any]]:
        named = [
            phrases(row["prompt"], subjects_of(row, attention.get(row["id"], ()))) for row in rows
        ]
        most = max(len(some) for some in named)
        if not most:
            return [_summed((), ()) for _ in rows]
        likely = self._best_scores(named, most, images)
        scores = [row[: len(some)] for row, some in zip(likely, named, strict=True)]
        return [_summed([score >= self.threshold for score in row], row) for row in scores]

    def _best_scores(
        self, named: Sequence[Sequence[str]], most: int, images: Sequence[Image]
    ) -> list[list[float]]:
        """The best score over all boxes: [pictures][queries]. Every picture has as many queries as
        the one with the most, the last of them empty."""
        import torch

        detector, tokenizer, processor = self._loaded
        texts = [filled(QUERY, phrase) for some in named for phrase in _padded(some, most)]
        longest = detector.config.text_config.max_position_embeddings
        tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        ).to(detector.device)
        pixels = processor(list(images), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            logits = detector(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                pixel_values=pixels.to(detector.device, detector.dtype),
            ).logits
        return logits.float().sigmoid().amax(dim=1).tolist()


def _padded(phrases: Sequence[str], length: int) -> list[str]:
    return [*phrases, *[""] * (length - len(phrases))]


def _summed(found: Sequence[bool], scores: Sequence[float]) -> dict[str, Any]:
    return {
        "subjects_named": len(found),
        "subjects_found": sum(found),
        "all_found": all(found) if found else None,
        "found": list(found),
        "scores": list(scores),
    }
