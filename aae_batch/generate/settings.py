"""A generation job's settings, and which of them the images depend on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from aae_batch.dataset.image_format import ImageFormat, ImageKind, Layout
from aae_batch.errors import SettingsError
from aae_batch.evaluate.settings import JudgeSettings, Place, weights_of
from aae_batch.generate.acceptance import TRIES, Acceptance, Unaccepted, metrics_named
from aae_batch.ladder import Ladder
from aae_batch.methods import DEFAULT, METHODS, load_plugins
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.settings import Settings
from aae_batch.store.base import expanded

SHARD_SIZE = 256


def _failures(value: Any) -> Any:
    """Parse a count as int, or a share as float up to 1."""
    wrong = "give a number of rows, or a share such as 5%"
    if isinstance(value, str):
        try:
            value = float(value[:-1]) / 100 if value.endswith("%") else int(value)
        except ValueError:
            raise ValueError(wrong) from None
    most = 1.0 if isinstance(value, float) else math.inf
    if isinstance(value, (int, float)) and not 0 <= value <= most:
        raise ValueError(wrong)  # NaN too
    return value


def _slots(value: Any) -> Any:
    """Parse a positive number or `auto`."""
    if value == "auto":
        return value
    try:
        number = 0 if isinstance(value, bool) else int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1 or (isinstance(value, float) and number != value):
        raise ValueError("give a number from 1, or auto")
    return number


def listed(value: Any) -> Any:
    """Parse a comma-separated list of names as a tuple."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return () if value is None else tuple(value)


def _loras(value: Any) -> tuple[str, ...]:
    """Parse one or more `ID` or `ID:scale`, and write all with their scales."""
    from aae_batch.sampling.model.lora import parse_loras

    given = (value,) if isinstance(value, str) else tuple(value or ())
    return tuple(str(lora) for lora in parse_loras(given))


class ModelSettings(Settings):
    """Which model makes the images.

    Raises:
        SettingsError: a value is unknown or out of range.
    """

    group = "Model"

    model: Place = Field(
        "shapes",
        description="Hub id, folder in diffusers' layout, URL of one (s3://bucket/folder), or "
        "'shapes' or 'shapes-flow', the models in this package.",
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of the model on the hub. Default: main."
    )
    variant: str | None = Field(
        None,
        min_length=1,
        description="Which of the model's weights, e.g. fp16 for files such as model.fp16.safetensors. "
        "Default: those without a variant.",
    )
    lora: Annotated[tuple[str, ...], BeforeValidator(_loras)] = Field(
        (),
        description="LoRA to add to the model's weights, as ID or ID:scale, e.g. owner/name:0.8; repeat "
        "for several. ID is a .safetensors file, a folder with one, a URL of either, or a hub id: "
        "owner/name, owner/name/file.safetensors, owner/name@revision. Needs peft. Default: none.",
        json_schema_extra={"repeatable": True},
    )
    slots: Annotated[int | Literal["auto"], BeforeValidator(_slots)] = Field(
        8,
        description="Images in flight in each actor; memory use grows with it. auto: as many as fit, "
        "measured on the GPU when the model is loaded.",
    )
    compile: bool = Field(
        False,
        description="Compile the model, once it has run for long enough that this pays: on a GPU, about a third "
        "more images from some ten minutes on. Pixels differ by rounding.",
    )


class FormSettings(Settings):
    """How rows are stored.

    Raises:
        SettingsError: a value is unknown or out of range.
    """

    group = "Output"

    shard_size: int | None = Field(
        None,
        ge=1,
        description=f"Rows per shard, the unit of commit and resume. Default: {SHARD_SIZE}, or as the "
        "output was begun.",
    )
    layout: Layout | None = Field(
        None,
        description="files (a file per image), webdataset (a tar per shard) or parquet (a column "
        "of the metadata table). The last two hold the encoded images of up to four shards in memory. "
        "Default: files, or as the output was begun.",
    )
    image_format: ImageKind | None = Field(
        None, description="png, webp or jpeg. Default: png, or as the output was begun."
    )
    image_quality: int | None = Field(
        None, description="Quality of jpeg and lossy webp, 1 to 100. Default: jpeg 95, webp 90."
    )
    png_level: int | None = Field(None, description="Compression level of png, 0 to 9. Default: 1.")
    webp_lossless: bool | None = Field(None, description="Use lossless webp. Default: lossy.")

    def form(self, begun: dict[str, Any]) -> dict[str, Any]:
        """Return how rows are stored, for `run.json`: values given here, else those of `begun`,
        else the defaults.

        Raises:
            SettingsError: a given setting does not apply to the image format.
        """
        return {
            "shard_size": self.shard_size or begun.get("shard_size", SHARD_SIZE),
            "layout": self.layout or begun.get("layout", "files"),
            "image_format": self._image_format(begun.get("image_format", {})).settings(),
        }

    def _image_format(self, begun: dict[str, Any]) -> ImageFormat:
        kind = self.image_format or begun.get("kind", "png")
        lossless = begun.get("lossless") if self.webp_lossless is None else self.webp_lossless
        given = {
            "kind": kind,
            "level": self.png_level,
            "quality": self.image_quality,
            "lossless": self.webp_lossless,
        }
        if (kind, lossless) == (begun.get("kind"), begun.get("lossless")):
            given |= {name: value for name, value in begun.items() if given[name] is None}
        return ImageFormat(**given)


class TrialSettings(JudgeSettings):
    """How often a row is tried, and which try is kept.

    Raises:
        SettingsError: a value is unknown or out of range.
    """

    group = "Tries"

    accept: str | None = Field(
        None,
        description="Judge every picture as it is made, and try again with other noise until this is "
        'true: a SQL condition on scores of `evaluate`, e.g. "detector.all_found" or '
        '"clip.min_subject >= 0.25 AND captions.similarity > 0.7". Default: every picture is accepted.',
    )
    tries: int | None = Field(
        None, ge=1, le=1000, description=f"The most tries of a row. Default: {TRIES} with --accept."
    )
    ladder: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        (),
        description="Methods for the tries of a row, cheap ones first, each with one try or "
        "METHOD:TRIES, the last with all that are left, e.g. stable-diffusion,attend-and-excite. Stands "
        "in for --method. Default: --method alone.",
    )
    unaccepted: Unaccepted = Field(
        "keep",
        description="What becomes of a row when no try was accepted: keep its best picture, with "
        "accepted = false; fail; or drop, which is no failure.",
    )
    best_of: int | None = Field(
        None,
        ge=2,
        le=1000,
        description="Make this many pictures of every row, and keep the best by --by, one that is "
        "accepted if there is one. Default: the first accepted picture is kept.",
    )
    by: str | None = Field(
        None,
        description="Which picture is the best: a score as in --accept; the largest wins. Default: the "
        "main score of the first metric in --accept, else -final_loss.",
    )
    give_up_below: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Give a try up after the steps that are guided, before it is finished and decoded, if "
        "the worst subject's attention is below this share; see docs/accept.md. Default: never.",
    )
    keep_rejected: bool = Field(
        False, description="Keep the pictures of other tries, in the tables of tries/."
    )
    judge_device: str | None = Field(
        None, description="Torch device of the judges, e.g. cpu. Default: the model's."
    )

    @model_validator(mode="after")
    def _tries_need_a_judge(self) -> TrialSettings:
        given = self.accept is not None or self.best_of is not None
        others = ["tries", "ladder", "by", "give_up_below", "keep_rejected", "judge_device"]
        if not given:
            if self.unaccepted != "keep":
                others.append("unaccepted")
            for name in others:
                if getattr(self, name):
                    raise SettingsError(
                        f"--{name.replace('_', '-')} is for rows that are tried several times: add --accept "
                        "or --best-of."
                    )
        if self.best_of is not None and self.tries is not None:
            raise SettingsError("--best-of is the number of tries: leave out --tries.")
        return self


class JobSettings(TrialSettings, FormSettings, ModelSettings):
    """One job: a manifest, an output, and how to generate the output from the manifest.

    Raises:
        SettingsError: a value is unknown or out of range.
    """

    group = "Options"

    manifest: Annotated[str, BeforeValidator(expanded)] = Field(
        description="Parquet, CSV, TSV or JSONL, or a folder of Parquet files, path or URL; one row per "
        "image. Columns: prompt "
        "(required), subjects or token_indices, seed, id, negative_prompt, guidance_scale, "
        "num_inference_steps, height, width, method; others are copied to the metadata table."
    )
    output: Place = Field(
        description="Folder for the dataset, s3://bucket/prefix, or another URL (gs://, abfs://, "
        "hf://). An incomplete dataset is resumed."
    )
    retry_failed: bool = Field(False, description="Generate failed rows again.")
    other_versions: bool = Field(
        False,
        description="Resume a run begun with other versions of aae_batch, torch, diffusers or "
        "transformers; images may differ.",
    )
    max_failures: Annotated[int | float | None, BeforeValidator(_failures)] = Field(
        None,
        description="Stop when more rows than this fail: a number, or a share such as 5%. Default: never.",
    )
    plugin: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        (),
        description="Modules that register your own methods, e.g. package.module, separated by commas. "
        "Default: none.",
    )
    guidance: GuidanceConfig = Field(description="How to sample.")

    @model_validator(mode="before")
    @classmethod
    def _begin_with_the_first_rung(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A row that names no method has the ladder's first."""
        rungs, guidance = listed(values.get("ladder")), values.get("guidance")
        method = rungs[0].partition(":")[0] if rungs else None
        if method in METHODS and isinstance(guidance, GuidanceConfig):
            values = values | {"guidance": guidance.updated(method=method)}
        return values

    @property
    def acceptance(self) -> Acceptance | None:
        """When a row is done; None if its first picture is the row's.

        Raises:
            SettingsError: an expression does not fit, or the ladder does not.
        """
        if self.accept is None and self.best_of is None:
            return None
        names = metrics_named(self.accept, self.by)
        thresholds = self.guidance.steering(DEFAULT).thresholds
        metrics = {name: self.metric_for(name, self.model, thresholds) for name in names}
        by = self.by
        if by is None:
            by = f"{names[0]}.{metrics[names[0]].best_by}" if names else "-final_loss"
        acceptance = Acceptance(
            accept=self.accept,
            by=by,
            ladder=Ladder.of(
                self.ladder or (self.guidance.method,), self.best_of or self.tries or TRIES
            ),
            all_tries=self.best_of is not None,
            unaccepted=self.unaccepted,
            give_up_below=self.give_up_below,
            keep_rejected=self.keep_rejected,
            metrics=metrics,
        )
        acceptance.check()
        return acceptance

    @property
    def methods(self) -> list[str]:
        """The methods that a row without one is tried by."""
        rule = self.acceptance
        return [rung.method for rung in rule.ladder.rungs] if rule else [self.guidance.method]

    def pixels(self, manifest_digest: str) -> dict[str, Any]:
        """Return everything that the images depend on, as JSON values."""
        from aae_batch.sampling.model.weights import lora_digests, weights_digest

        plugins = load_plugins(self.plugin)
        steering = {method: asdict(self.guidance.steering(method)) for method in METHODS}
        return {
            "model": self.model,
            "revision": self.revision,
            "variant": self.variant,
            "weights": weights_digest(self.model, self.s3_endpoint),
            "lora": list(self.lora),
            "lora_weights": lora_digests(self.lora, self.s3_endpoint),
            "device": self.device.partition(":")[0],
            "dtype": self.dtype,
            "guidance": json.loads(self.guidance.model_dump_json()),
            "steering": json.loads(json.dumps(steering)),
            "plugin": list(self.plugin),
            "plugin_versions": plugins,
            "manifest": manifest_digest,
            "acceptance": self._accepted(),
        }

    def _accepted(self) -> dict[str, Any] | None:
        """Return what decides on the tries of a row, as JSON values."""
        rule = self.acceptance
        if rule is None:
            return None
        return {
            "accept": rule.accept,
            "by": rule.by,
            "tries": rule.ladder.tries,
            "ladder": [str(rung) for rung in rule.ladder.rungs],
            "all_tries": rule.all_tries,
            "unaccepted": rule.unaccepted,
            "give_up_below": rule.give_up_below,
            "keep_rejected": rule.keep_rejected,
            "judges": {
                name: {**metric.settings(), "weights": weights_of(metric, self.s3_endpoint)}
                for name, metric in rule.metrics.items()
            },
        }
