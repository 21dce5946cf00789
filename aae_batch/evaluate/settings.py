"""Settings of judges and of a scoring run, and those that scores depend on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field

from aae_batch.dataset.methods import thresholds_of
from aae_batch.job.settings import ActorSettings, Dtype

if TYPE_CHECKING:
    from aae_batch.evaluate.metric import Metric

CLIP = "openai/clip-vit-base-patch16"
CAPTIONER = "Salesforce/blip-image-captioning-base"
DETECTOR = "google/owlv2-base-patch16-ensemble"

OF_OUTPUT = "output"
"""Key of the dataset's fingerprint in `depends_on`; all other keys describe the judge."""

MetricName = Literal["clip", "captions", "detector", "attention"]
METRICS: tuple[str, ...] = get_args(MetricName)
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A folder (a leading ~ is expanded), a URL or a hub id."""


class JudgeSettings(ActorSettings):
    """Which models judge pictures.

    Raises:
        SettingsError: a value is unknown or out of range.
    """

    group = "Judges"

    clip_model: Place = Field(
        CLIP, description="CLIP model for clip and captions: hub id, folder or URL."
    )
    caption_model: Place = Field(CAPTIONER, description="Captioning model: hub id, folder or URL.")
    caption_prefix: str = Field(
        "a picture of ",
        description="Text that the captioner continues, as in BLIP's training; it is removed from the "
        "caption. Use '' for a captioner that needs none.",
    )
    detector: Place | None = Field(
        None,
        description="shapes, the embedded model's detector, or an OWL-type model: hub id, folder or "
        "URL. Default: shapes for images of the embedded model, else "
        f"{DETECTOR}.",
    )
    detector_threshold: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Minimum score at which an OWL-type detector finds a subject, 0 to 1.",
    )

    def metric_for(self, name: str, model: str, thresholds: Mapping[int, float]) -> Metric:
        """Return a metric by its name.

        Args:
            model: what made the pictures.
            thresholds: of attention-and-excite in that run.
        """
        from aae_batch.evaluate.attention import AttentionMetric
        from aae_batch.evaluate.captions import CaptionsMetric
        from aae_batch.evaluate.clip import ClipMetric
        from aae_batch.evaluate.detector import SHAPES, OpenVocabularyDetector, ShapesDetector
        from aae_batch.sampling.model.loading import EMBEDDED

        endpoint = self.actors_s3_endpoint
        if name == "clip":
            return ClipMetric(self.clip_model, endpoint)
        if name == "captions":
            return CaptionsMetric(
                self.caption_model, self.clip_model, endpoint, self.caption_prefix
            )
        if name == "attention":
            return AttentionMetric(thresholds)
        detector = self.detector or (SHAPES if model in EMBEDDED else DETECTOR)
        if detector == SHAPES:
            return ShapesDetector()
        return OpenVocabularyDetector(detector, self.detector_threshold, endpoint)


class ScoreSettings(JudgeSettings):
    """Settings for scoring one dataset with one metric.

    Raises:
        SettingsError: a value is unknown or out of range.
    """

    group = "Options"

    output: Place = Field(description="Root of the dataset: folder or URL.")
    metric: MetricName = Field(description="Metric to score with.")
    batch_size: int = Field(16, ge=1, description="Images per batch.")
    dtype: Dtype = "float32"
    again: bool = Field(
        False,
        description="Score everything again, including what other settings scored. Not needed to "
        "resume after a stop.",
    )
    retry_failed: bool = Field(False, description="Retry images that could not be scored.")

    def metric_of(self, run: dict[str, Any]) -> Metric:
        """Return the metric, for a dataset with the given `run.json`."""
        return self.metric_for(self.metric, run["settings"]["model"], thresholds_of(run))

    def depends_on(self, metric: Metric, run: dict[str, Any]) -> dict[str, Any]:
        """Return everything that scores depend on, except the images, whose SHA-256 each score records.

        Raises:
            ModelError: a model is missing in its folder or object store, or cannot be read.
        """
        found = {OF_OUTPUT: run["fingerprint"], **metric.settings()}
        if metric.models:
            found["dtype"] = self.dtype
        weights = weights_of(metric, self.s3_endpoint)
        return found | {f"weights of {model}": digest for model, digest in weights.items()}


def weights_of(metric: Metric, s3_endpoint: str | None) -> dict[str, str | None]:
    """Return the digest of each model of a metric, None for a model on the hub.

    Raises:
        ModelError: a model is missing in its folder or object store, or cannot be read.
    """
    from aae_batch.evaluate.models import JUDGE_FILES
    from aae_batch.sampling.model.loading import refuse_missing_folder
    from aae_batch.sampling.model.weights import weights_digest

    for model in metric.models:
        refuse_missing_folder(model)
    return {model: weights_digest(model, s3_endpoint, JUDGE_FILES) for model in metric.models}
