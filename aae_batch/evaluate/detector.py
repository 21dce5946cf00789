"""The detector metric: which subjects an object detector finds in the image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from aae_batch.columns import column
from aae_batch.evaluate.metric import Attention, Loaded, MetadataRow, Metric
from aae_batch.evaluate.models import Judge
from aae_batch.evaluate.phrases import phrases, subjects_of
from aae_batch.evaluate.templates import filled

if TYPE_CHECKING:
    from PIL.Image import Image

    from aae_batch.shapes.world import Thing

SHAPES = "shapes"
"""Name of the detector for images of the embedded model; it needs no weights."""

QUERY = "a photo of a {}"
"""Query to an open-vocabulary detector, as in the examples of OWL-ViT and OWLv2."""

COLUMNS = (
    column("subjects_named", pa.int32(), "Number of subjects that the row names."),
    column("subjects_found", pa.int32(), "Number of subjects that the detector finds."),
    column("all_found", pa.bool_(), "Whether all subjects are found; null without subjects."),
    column("found", pa.list_(pa.bool_()), "Whether each subject is found, in their order."),
    column(
        "scores", pa.list_(pa.float32()), "The detector's confidence in each subject, in [0, 1]."
    ),
)


@dataclass
class ShapesDetector(Metric):
    """The detector for images of the embedded model (`aae_batch.shapes.detector.judge`).

    A subject is found if its shape is present in any colour; its score is the likeness of the best such
    object. `bound` tells whether the shape is present in the colour that the prompt gives it, and is null
    if it gives none. All columns are null if a subject is not a known shape.
    """

    attention_columns = ("subject",)
    columns = (
        *COLUMNS,
        column(
            "bound",
            pa.list_(pa.bool_()),
            "Whether each subject is in the image in the colour that the prompt gives it; null where "
            "it gives none.",
        ),
        column(
            "all_bound",
            pa.bool_(),
            "Whether all subjects with a colour are in the image in it; null if none has one.",
        ),
        column(
            "other_objects",
            pa.int32(),
            "Number of objects in the image that no subject names, or that resemble no shape.",
        ),
    )
    best_by = "subjects_found"

    def settings(self) -> dict[str, Any]:
        return {"detector": SHAPES, "version": 2}  # of its columns

    def score(
        self, rows: Sequence[MetadataRow], images: Sequence[Image], attention: Attention
    ) -> list[dict[str, Any]]:
        return [
            self._look(row["prompt"], subjects_of(row, attention), image)
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
        own: dict[str, Any] = {
            "bound": bound,
            "all_bound": all(coloured) if coloured else None,
            "other_objects": verdict.junk,
        }
        return _summary(verdict.drawn, scores) | own


def thing_of(subject: str, phrase: str) -> Thing | None:
    """Return the shape that a subject names, or None if it names none.

    Its colour is the word directly before the shape, first in the subject, else in its phrase: red for
    "circle" in "a red circle".
    """
    from aae_batch.shapes.world import COLOURS, SHAPES, Thing

    def colour_in(text: str) -> str:
        words = ["", *_words(text)]
        before = words[words.index(shape) - 1] if shape in words else ""
        return before if before in COLOURS else ""

    shape = next((word for word in _words(subject) if word in SHAPES), "")
    return Thing(shape, colour_in(subject) or colour_in(phrase)) if shape else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@dataclass
class OpenVocabularyDetector(Metric):
    """An open-vocabulary detector: OWL-ViT (Minderer et al. 2022, arXiv 2205.06230), OWLv2, or another
    model of transformers with the same outputs.

    The query is "a photo of a {phrase}", with the subject's phrase in the prompt (see `phrases.py`). A
    subject's score is the maximum over all boxes; the subject is found if it is at least `threshold`. One
    object suffices for two subjects with the same words.
    """

    model: str
    threshold: float
    s3_endpoint: str | None = None
    _judge: Judge | None = field(default=None, init=False, repr=False)

    attention_columns = ("subject",)
    columns = COLUMNS
    best_by = "subjects_found"

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def settings(self) -> dict[str, Any]:
        return {"detector": self.model, "detector_threshold": self.threshold}

    def load(self, device: str, dtype: str) -> Loaded:
        from transformers import AutoModelForZeroShotObjectDetection as Detector

        self._judge = Judge.load(
            Detector,
            self.model,
            device,
            dtype,
            self.s3_endpoint,
            needs=("class_predictor",),
            advice="; use an OWL-type detector, e.g. google/owlv2-base-patch16-ensemble.",
        )
        return Loaded.of(self._judge.model)

    def score(
        self, rows: Sequence[MetadataRow], images: Sequence[Image], attention: Attention
    ) -> list[dict[str, Any]]:
        named = [phrases(row["prompt"], subjects_of(row, attention)) for row in rows]
        if not any(named):
            return [_summary((), ()) for _ in rows]
        likely = self._best_scores(named, images)
        scores = [row[: len(some)] for row, some in zip(likely, named, strict=True)]
        return [_summary([score >= self.threshold for score in row], row) for row in scores]

    def _best_scores(
        self, named: Sequence[Sequence[str]], images: Sequence[Image]
    ) -> list[list[float]]:
        """Return the best score over all boxes: [images][queries], padded with empty queries to the same
        number for every image."""
        import torch

        assert self._judge is not None
        most = max(map(len, named))
        padded = [phrase for some in named for phrase in (*some, *[""] * (most - len(some)))]
        tokens = self._judge.tokens([filled(QUERY, phrase) for phrase in padded], "max_length")
        with torch.inference_mode():
            logits = self._judge.model(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                pixel_values=self._judge.pixels(images),
            ).logits
        return logits.float().sigmoid().amax(dim=1).tolist()


def _summary(found: Sequence[bool], scores: Sequence[float]) -> dict[str, Any]:
    return {
        "subjects_named": len(found),
        "subjects_found": sum(found),
        "all_found": all(found) if found else None,
        "found": list(found),
        "scores": list(scores),
    }
