"""All columns of manifests and of the metadata table: name, type, meaning."""

from __future__ import annotations

import pyarrow as pa

from aae_batch.methods import METHODS


def column(name: str, kind: pa.DataType, description: str) -> pa.Field:
    return pa.field(name, kind, metadata={"description": description})


_ROW_COLUMNS: tuple[pa.Field, ...] = (
    column("id", pa.string(), "The row's name: unique in the manifest, and the image's file name."),
    column("prompt", pa.string(), "The text."),
    column("subjects", pa.list_(pa.string()), "Words or phrases that must be drawn."),
    column(
        "token_indices",
        pa.list_(pa.list_(pa.int32())),
        "Subjects as positions in the tokenizer's output; 0 is the start token.",
    ),
    column("seed", pa.int64(), "Seed of the initial noise. Default: from a hash of the id."),
)

_SETTING_COLUMNS: tuple[pa.Field, ...] = (
    column("method", pa.string(), f"One of {', '.join(METHODS)}."),
    column("negative_prompt", pa.string(), "What classifier-free guidance moves away from."),
    column("guidance_scale", pa.float64(), "Strength of classifier-free guidance."),
    column("num_inference_steps", pa.int32(), "Denoising steps."),
    column("height", pa.int32(), "Image height in pixels."),
    column("width", pa.int32(), "Image width in pixels."),
)

MANIFEST_COLUMNS = (*_ROW_COLUMNS, *_SETTING_COLUMNS)
"""A manifest's columns. The metadata table holds them as used, with defaults filled in; null if
a bad row's value could not be read."""

NAMES = tuple(field.name for field in MANIFEST_COLUMNS)
ALIASES = {"subject_indices": "token_indices"}
"""Alternative column names that a manifest may use."""

OVERRIDES = tuple(field.name for field in _SETTING_COLUMNS)
"""Columns that override the run's setting of the same name."""

FORWARDS_COLUMN = column(
    "forwards",
    pa.int32(),
    "Cost: texts denoised, two a step with classifier-free guidance, and guided forwards, each with its "
    "backward, together, over all tries. Null if the row was not sampled. Runs that an earlier version began "
    "do not have this column.",
)

OUTCOME_COLUMNS: tuple[pa.Field, ...] = (
    column("status", pa.string(), "ok or failed."),
    column("error_type", pa.string(), "The class of the error; null when ok."),
    column("error", pa.string(), "What was wrong, and how to fix it; null when ok."),
    column(
        "file_name",
        pa.string(),
        "The image's path relative to the output root; in a tar, its name there follows a #. Null when "
        "failed, and with layout parquet, which has the column image.",
    ),
    column("sha256", pa.string(), "SHA-256 of the image file's bytes."),
    column(
        "num_refinements",
        pa.int32(),
        "Latent updates of iterative refinement over all steps, plus the start noises tried.",
    ),
    column(
        "final_loss",
        pa.float32(),
        "The method's own loss at the last step, not comparable across methods; for attend-and-excite "
        "and methods without guidance: 1 - the attention of the worst subject.",
    ),
    column(
        "neglected",
        pa.bool_(),
        "The worst subject's attention never reached attend-and-excite's last threshold, whatever the "
        "method; null without thresholds.",
    ),
    column(
        "seconds",
        pa.float32(),
        "Latency: from slot to decoded image, in a batch shared with other rows. What the row cost is in "
        "forwards.",
    ),
    FORWARDS_COLUMN,
    column("shard", pa.int32(), "The shard that holds the row."),
    column("fingerprint", pa.string(), "Hash of the settings and the manifest, as in run.json."),
)
"""Columns that a run adds to each row."""

TRIES_COLUMNS: tuple[pa.Field, ...] = (
    column("tries", pa.int32(), "How often the row was tried."),
    column("kept_try", pa.int32(), "The try, from 0, that made the image; null when failed."),
    column(
        "accepted",
        pa.bool_(),
        "Whether the judges accept the image; null if they cannot judge it, as without subjects.",
    ),
    column(
        "first_seed",
        pa.int64(),
        "The row's own seed, which its first try had: rows are paired by it.",
    ),
)
"""Columns that a run with `--accept` or `--best-of` adds. `seed` and `method` are the kept try's."""

TRIES_NAMES = tuple(field.name for field in TRIES_COLUMNS)

IMAGE_COLUMN = column(
    "image",
    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    "The image file's bytes, and its name; null when failed. Layout parquet only.",
)

RESERVED = frozenset(field.name for field in (*OUTCOME_COLUMNS, IMAGE_COLUMN))
"""Names that a manifest's extra columns must not have."""
