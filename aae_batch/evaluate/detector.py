"""Are the subjects there? Detectors look for each of them."""

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
class ShapesDetector(Metric):
    """The detector of the embedded model's world (`aae_batch.shapes.detector.judge`).

    A subject is found where there is such a shape, whatever its colour; its score is the likeness of
    the best such object. `bound` says whether that shape is there in the colour that the prompt gives
    it, null where it gives none. All is null where a subject is no shape of the world.
    """

    attention_columns = ("subject",)
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
        own = {"bound": bound, "all_bound": all(coloured) if coloured else None}
        return _summary(verdict.drawn, scores) | own


def thing_of(subject: str, phrase: str) -> Thing | None:
    """The shape that a subject names, in the colour that stands directly before it in the subject, else
    in its phrase, or in none: "circle" of "a red circle". None where it names no shape of the world."""
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
    """A detector that is told what to look for: OWL-ViT (Minderer et al. 2022, arXiv 2205.06230), OWLv2,
    or another of transformers' with the same outputs.

    It is asked for "a photo of a {phrase}", where the phrase is the part of the prompt that speaks of
    the subject (see `phrases.py`). A subject's score is the largest over all boxes, and it is found
    from `threshold` on. Where two subjects are the same words, one object does for both.
    """

    model: str
    threshold: float
    s3_endpoint: str | None = None
    _judge: Judge | None = field(default=None, init=False, repr=False)

    attention_columns = ("subject",)
    columns = COLUMNS

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
        """The best score over all boxes: [pictures][queries]. Every picture has as many queries as
        the one with the most, the last of them empty."""
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
