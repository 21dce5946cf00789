"""Every column of a manifest and of the metadata table, once: name, type, meaning."""

from __future__ import annotations

import pyarrow as pa

from aae_batch.methods import METHODS


def column(name: str, kind: pa.DataType, description: str) -> pa.Field:
    return pa.field(name, kind, metadata={"description": description})


_ROW_COLUMNS: tuple[pa.Field, ...] = (
    column(
        "id", pa.string(), "The row's name: unique in the manifest, and the picture's file name."
    ),
    column("prompt", pa.string(), "The text."),
    column("subjects", pa.list_(pa.string()), "Words or phrases that must be drawn."),
    column(
        "token_indices",
        pa.list_(pa.list_(pa.int32())),
        "Subjects as positions in the tokenizer's output; 0 is the start token.",
    ),
    column("seed", pa.int64(), "Of the initial noise. Default: from a hash of the id."),
)

_SETTING_COLUMNS: tuple[pa.Field, ...] = (
    column("method", pa.string(), f"One of {', '.join(METHODS)}."),
    column("negative_prompt", pa.string(), "What classifier-free guidance moves away from."),
    column("guidance_scale", pa.float64(), "Strength of classifier-free guidance."),
    column("num_inference_steps", pa.int32(), "Denoising steps."),
    column("height", pa.int32(), "Of the picture, in pixels."),
    column("width", pa.int32(), "Of the picture, in pixels."),
)

MANIFEST_COLUMNS = (*_ROW_COLUMNS, *_SETTING_COLUMNS)
"""What a manifest may say about a row. In the metadata table: as used, defaults filled in; null
where a bad row's value could not be read."""

NAMES = tuple(field.name for field in MANIFEST_COLUMNS)
ALIASES = {"subject_indices": "token_indices"}
"""Other names that a manifest may give to a column."""

OVERRIDES = tuple(field.name for field in _SETTING_COLUMNS)
"""Columns that override the run's setting of the same name."""

OUTCOME_COLUMNS: tuple[pa.Field, ...] = (
    column("status", pa.string(), "ok or failed."),
    column("error_type", pa.string(), "The class of the error; null when ok."),
    column("error", pa.string(), "What was wrong, and how to fix it; null when ok."),
    column(
        "file_name",
        pa.string(),
        "The picture, relative to the output root, in a tar after a #; null when failed, and where "
        "the column image has it.",
    ),
    column("sha256", pa.string(), "Of the picture's bytes."),
    column(
        "num_refinements",
        pa.int32(),
        "Latent updates of iterative refinement, over all steps, and start noises that were tried.",
    ),
    column(
        "final_loss",
        pa.float32(),
        "The method's own loss at the last step, which does not compare across methods; of attend-and-excite "
        "and methods without guidance: 1 - the attention of the worst subject.",
    ),
    column(
        "neglected",
        pa.bool_(),
        "The worst subject's attention never reached attend-and-excite's last threshold, whatever the "
        "method; null without thresholds.",
    ),
    column("seconds", pa.float32(), "From slot to decoded picture; shared with the other slots."),
    column("shard", pa.int32(), "The shard that holds the row."),
    column("fingerprint", pa.string(), "Of the settings and the manifest; the same in run.json."),
)
"""What a run adds to each row."""

IMAGE_COLUMN = column(
    "image",
    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    "The picture as a file's bytes, and that file's name; null when failed. Layout parquet only.",
)

RESERVED = frozenset(field.name for field in (*OUTCOME_COLUMNS, IMAGE_COLUMN))
"""Names that a manifest's own columns must not have."""
