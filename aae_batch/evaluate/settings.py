"""What a person decides about the scoring of a dataset, and which of it the scores depend on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from aae_batch.dataset.methods import thresholds_of
from aae_batch.job.settings import ActorSettings, Dtype

if TYPE_CHECKING:
    from aae_batch.evaluate.metric import Metric

CLIP = "openai/clip-vit-base-patch16"
CAPTIONER = "Salesforce/blip-image-captioning-base"
DETECTOR = "google/owlv2-base-patch16-ensemble"

OF_OUTPUT = "output"
"""Among what scores depend on: the dataset's fingerprint, where all else is of the judge."""

MetricName = Literal["clip", "captions", "detector", "attention"]
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A folder, which may begin with ~, or a URL, or a hub id."""


class ScoreSettings(ActorSettings):
    """One metric over one dataset.

    Raises:
        SettingsError: a value is unknown or out of range.
    """

    output: Place = Field(description="The dataset's root: a folder, or a URL.")
    metric: MetricName = Field(description="What to score by.")
    model: Place = Field(
        CLIP, description="CLIP model for clip and captions: hub id, folder, or URL of one."
    )
    caption_model: Place = Field(
        CAPTIONER, description="Model that writes captions: hub id, folder, or URL of one."
    )
    caption_prefix: str = Field(
        "a picture of ",
        description="Words that captions are made to begin with, as BLIP was trained to; they are cut "
        "off again. Give '' for a captioner that begins by itself.",
    )
    detector: Place | None = Field(
        None,
        description="shapes, the embedded model's detector, or an OWL-type model: hub id, folder, or "
        "URL of one. Default: shapes for pictures of the embedded model, else "
        f"{DETECTOR}.",
    )
    detector_threshold: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Score from which an OWL-type detector has found a subject, 0 to 1.",
    )
    batch_size: int = Field(16, ge=1, description="Pictures that a model takes at a time.")
    dtype: Dtype = "float32"
    again: bool = Field(
        False,
        description="Score everything again, also what other settings scored. To go on after a stop, "
        "leave it off.",
    )
    retry_failed: bool = Field(
        False, description="Try the pictures again that could not be scored."
    )

    def metric_for(self, run: dict[str, Any]) -> Metric:
        """The metric, for a dataset whose `run.json` says `run`."""
        from aae_batch.evaluate.attention import AttentionMetric
        from aae_batch.evaluate.captions import CaptionsMetric
        from aae_batch.evaluate.clip import ClipMetric
        from aae_batch.evaluate.detector import SHAPES, OpenVocabularyDetector, ShapesDetector
        from aae_batch.sampling.model.loading import EMBEDDED

        endpoint, made_by = self.actors_s3_endpoint, run["settings"]
        if self.metric == "clip":
            return ClipMetric(self.model, endpoint)
        if self.metric == "captions":
            return CaptionsMetric(self.caption_model, self.model, endpoint, self.caption_prefix)
        if self.metric == "attention":
            return AttentionMetric(thresholds_of(run))
        detector = self.detector or (SHAPES if made_by["model"] == EMBEDDED else DETECTOR)
        if detector == SHAPES:
            return ShapesDetector()
        return OpenVocabularyDetector(detector, self.detector_threshold, endpoint)

    def depends_on(self, metric: Metric, run: dict[str, Any]) -> dict[str, Any]:
        """Everything that scores depend on but the pictures, each of which they name by its SHA-256.

        Raises:
            ModelError: a folder or an object store has no such model, or cannot be read.
        """
        found = {OF_OUTPUT: run["fingerprint"], **metric.settings()}
        if metric.models:
            found["dtype"] = self.dtype
        weights = weights_of(metric, self.s3_endpoint)
        return found | {f"weights of {model}": digest for model, digest in weights.items()}


def weights_of(metric: Metric, s3_endpoint: str | None) -> dict[str, str | None]:
    """The digest of each model of a metric; None for one on the hub.

    Raises:
        ModelError: a folder or an object store has no such model, or cannot be read.
    """
    from aae_batch.evaluate.models import JUDGE_FILES, refuse_missing_folder
    from aae_batch.sampling.model.weights import weights_digest

    for model in metric.models:
        refuse_missing_folder(model)
    return {model: weights_digest(model, s3_endpoint, JUDGE_FILES) for model in metric.models}
