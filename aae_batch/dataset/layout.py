"""Every name under an output root, and the schema of every table. No other module defines them.

manifest.parquet             of a dataset of `aae-batch make`: what the rows are made from
run.json                     settings, fingerprint, layout, versions; written first
images/00012/<id>.png        the images of shard 12, in the layout `files`; or
images/00012.tar             in the layout `webdataset`, members <id>.png and <id>.json; or
                             in `parquet` none: the metadata table has them in a column `image`
attention/00012.parquet      one row per image and subject
tries/00012.parquet          one row per try, in a run with --accept or --best-of
metadata/00012.parquet       one row per manifest row; written last: this file is the commit
partial/00012/<hash>.parquet rows of shard 12 that a stopped job had finished, until the shard is committed
rewriting/00012.tar          while --retry-failed rewrites shard 12: its new objects, until all are written
progress.json                the progress of the job, updated every 15 s
summary.json                 counts, throughput, failures by reason; written when complete
metrics/clip/run.json        the settings of `aae-batch evaluate --metric clip`; written first
metrics/clip/00012.parquet   one row per image of shard 12: its id and its scores
report.html                  the page of `aae-batch report`; it may be deleted and built again

The suffix depends on the run's image format: .png, .webp or .jpg.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import TypedDict

import pyarrow as pa

from aae_batch.columns import (
    FORWARDS_COLUMN,
    IMAGE_COLUMN,
    MANIFEST_COLUMNS,
    OUTCOME_COLUMNS,
    TRIES_COLUMNS,
    column,
)
from aae_batch.dataset.image_format import Layout

MANIFEST = "manifest.parquet"
RUN = "run.json"
PROGRESS = "progress.json"
SUMMARY = "summary.json"
REPORT = "report.html"
METADATA = "metadata/"
ATTENTION = "attention/"
TRIES = "tries/"
IMAGES = "images/"
PARTIAL = "partial/"
REWRITING = "rewriting/"
METRICS = "metrics/"
"""Scores are stored beside the dataset and are no part of it: they may be deleted and computed again."""

_PARTIAL = re.compile(rf"{PARTIAL}(\d{{5,}})/[0-9a-f]{{16}}\.parquet")
_OF_SHARD = re.compile(r"(?:.*/)?(\d{5,})\.(?:parquet|tar)")


def images_of(shard: int) -> str:
    """Return the folder of a shard's images."""
    return f"{IMAGES}{shard:05d}/"


def image_name(shard: int, row_id: str, suffix: str = ".png") -> str:
    return f"{images_of(shard)}{row_id}{suffix}"


def tar_name(shard: int) -> str:
    return f"{IMAGES}{shard:05d}.tar"


def member_name(row_id: str, suffix: str) -> str:
    """Return the name of a row's file in its shard's tar. WebDataset uses the part before the first dot
    as the key, so dots of the id are written as %2E, which no id contains."""
    return row_id.replace(".", "%2E") + suffix


def attention_name(shard: int) -> str:
    return f"{ATTENTION}{shard:05d}.parquet"


def tries_name(shard: int) -> str:
    return f"{TRIES}{shard:05d}.parquet"


def metadata_name(shard: int) -> str:
    return f"{METADATA}{shard:05d}.parquet"


def partial_name(shard: int, data: bytes) -> str:
    """Return the name of an object with finished rows of a shard, given its bytes: their hash is in it."""
    return f"{PARTIAL}{shard:05d}/{hashlib.sha256(data).hexdigest()[:16]}.parquet"


def partial_of(name: str) -> int | None:
    """Return the shard in a `partial_name`; None for other names."""
    match = _PARTIAL.fullmatch(name)
    return int(match.group(1)) if match else None


def rewriting_name(shard: int) -> str:
    return f"{REWRITING}{shard:05d}.tar"


def metric_run_name(metric: str) -> str:
    return f"{METRICS}{metric}/run.json"


def metric_name(metric: str, shard: int) -> str:
    return f"{METRICS}{metric}/{shard:05d}.parquet"


def shard_of(name: str) -> int | None:
    """Return the shard number in the name of a table or tar; None for other names."""
    match = _OF_SHARD.fullmatch(name)
    return int(match.group(1)) if match else None


def shards_among(names: Iterable[str], named: Callable[[int], str]) -> list[int]:
    """Return, sorted, the shards whose name according to `named` is among `names`."""
    found = ((shard_of(name), name) for name in names)
    return sorted(shard for shard, name in found if shard is not None and named(shard) == name)


def is_of_shard(name: str, shard: int) -> bool:
    """Return whether this is a name of one of the shard's images or tables."""
    ours = (tar_name(shard), attention_name(shard), tries_name(shard), metadata_name(shard))
    return name in ours or name.startswith(images_of(shard))


_STEPS = pa.list_(pa.float32())

ATTENTION_SCHEMA = pa.schema(
    [
        column("id", pa.string(), "The row's id, as in the metadata table."),
        column("subject", pa.string(), "The subject's words."),
        column("token_indices", pa.list_(pa.int32()), "Its positions in the tokenizer's output."),
        column("tokens", pa.list_(pa.string()), "The part of the prompt at each position."),
        column("max_attention", _STEPS, "Per step: the largest value of the subject's map."),
        column("mean_attention", _STEPS, "Per step: the mean of the subject's map."),
        column("entropy", _STEPS, "Per step: of the map as a distribution over the image, nats."),
        column("center_x", _STEPS, "Per step: centre of mass from the left, in [0, 1]."),
        column("center_y", _STEPS, "Per step: centre of mass from the top, in [0, 1]."),
        column("loss", _STEPS, "Per step: the loss of the image, the same for its subjects."),
        column("map", pa.binary(), "uint8, map_height x map_width: attention at the last step."),
        column("map_height", pa.int32(), "Rows of map."),
        column("map_width", pa.int32(), "Columns of map."),
        column("map_scale", pa.float32(), "The probability that 255 stands for in map."),
    ]
)
"""One row per image and subject; see `attention_schema`.

With composable-diffusion, a subject's maps come from its own conjunct, where it competes only with that
conjunct's words. Its values are therefore larger than those of other methods and cannot be compared with
them. Its positions still refer to the whole prompt.
"""

MAPS_COLUMNS: tuple[pa.Field, ...] = (
    column("map_steps", pa.list_(pa.int32()), "The steps in maps, ascending, from 0 to the last."),
    column(
        "maps",
        pa.binary(),
        "uint8, steps x map_height x map_width: the attention at each of map_steps; the last is map.",
    ),
    column("map_scales", pa.list_(pa.float32()), "The probability that 255 stands for in each."),
)
"""Columns of the attention table in a run with `--attention-maps every:N`."""


def attention_schema(with_maps: bool = False) -> pa.Schema:
    """Return the attention table's schema.

    Args:
        with_maps: whether the run keeps maps over time.
    """
    return pa.schema([*ATTENTION_SCHEMA, *MAPS_COLUMNS]) if with_maps else ATTENTION_SCHEMA


TRIES_SCHEMA = pa.schema(
    [
        column("id", pa.string(), "The row's id, as in the metadata table."),
        column("try", pa.int32(), "Number of the try, from 0; a hopeless method's are left out."),
        column("method", pa.string(), "Its method."),
        column("seed", pa.int64(), "Its seed."),
        column(
            "verdict",
            pa.string(),
            "accepted, rejected, unjudged (the judges have nothing to go by), given up (before it was "
            "finished) or failed.",
        ),
        column("kept", pa.bool_(), "Whether its picture is the row's image."),
        column("error", pa.string(), "Why there is no picture; null otherwise."),
        column("value", pa.float64(), "What the best picture is found by, the larger the better."),
        column("scores", pa.string(), "JSON: the columns of every metric that judged it."),
        column("num_refinements", pa.int32(), "As in the metadata."),
        column("final_loss", pa.float32(), "As in the metadata."),
        column("guided", pa.int32(), "Guided forwards, each with its backward."),
        column("denoised", pa.int32(), "Texts denoised: two a step with classifier-free guidance."),
        column("seconds", pa.float32(), "As in the metadata."),
        column("picture", pa.binary(), "Its file's bytes, with --keep-rejected; null if kept."),
    ]
)
"""One row per try of a row, in the order of the manifest and of the tries."""

SCORED_COLUMNS: tuple[pa.Field, ...] = (
    column("id", pa.string(), "The row's id, as in the metadata table."),
    column("sha256", pa.string(), "SHA-256 of the scored image."),
)
"""The first columns of every metric's table; the metric's own columns follow. One row per image."""

SCORES_FINGERPRINT = "fingerprint"
"""Key in the Parquet metadata of a metric's table: the `fingerprint` of the metric's run that wrote it. If
it differs from the one in the metric's `run.json`, the table has other settings and will be replaced."""

SCORES_UNSCORED = "unscored"
"""Another key there: a JSON list of the ids of images that could not be scored. Their scores are null."""

HUGGING_FACE = {"huggingface": '{"info": {"features": {"image": {"_type": "Image"}}}}'}
"""Schema metadata that tells Hugging Face's `datasets` that the column `image` holds images."""


def metadata_schema(
    extras: pa.Schema,
    layout: Layout = "files",
    with_tries: bool = False,
    with_forwards: bool = True,
) -> pa.Schema:
    """Return the metadata table's schema: the standard manifest columns, then the extra columns of the
    manifest, then the columns that the run adds."""
    of_run = [column for column in OUTCOME_COLUMNS if with_forwards or column != FORWARDS_COLUMN]
    columns = [*MANIFEST_COLUMNS, *extras, *of_run, *(TRIES_COLUMNS if with_tries else ())]
    if layout == "parquet":
        return pa.schema([*columns, IMAGE_COLUMN], metadata=HUGGING_FACE)
    return pa.schema(columns)


PROGRESS_SECONDS = 15.0
"""Approximate seconds between two writes of `progress.json`."""


class ProgressRecord(TypedDict):
    """The content of `progress.json` at `time`. Speed and refinements cover the session that wrote it."""

    time: str  # ISO 8601, with the offset from UTC
    rows: int  # in the manifest
    done: int  # finished rows, including those of shards in progress
    failures: dict[str, int]  # by `error_type`, most frequent first; over all sessions
    images_per_second: float
    mean_refinements: float
    eta_seconds: float | None  # null before the session's first row
