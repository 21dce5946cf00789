"""Rows become pictures and table rows; a shard's tables are its commit, `metadata` last."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.dataset import layout as names
from aae_batch.dataset.image_format import ImageFormat
from aae_batch.dataset.layout import Layout
from aae_batch.dataset.webdataset import tar_of
from aae_batch.errors import RowError

if TYPE_CHECKING:
    from aae_batch.attention_stats import AttentionRecord
    from aae_batch.config import GuidanceConfig
    from aae_batch.dataset.storage import Storage
    from aae_batch.request import Result
    from aae_batch.row import Row

PNG = ImageFormat()

_OF_THE_TABLE_ONLY = frozenset(
    ["status", "error_type", "error", "file_name", "seconds", "shard", "fingerprint"]
)
"""Columns that a picture's JSON in a tar lacks. Without them, among which `seconds` alone differs from
run to run, the same shard gives the same tar."""


@dataclass(frozen=True)
class Outcome:
    """What became of one row, as the tables will say it.

    Attributes:
        index: the row's position in the manifest.
        metadata: its row of the metadata table, without extra columns, shard and fingerprint.
        attention: its rows of the attention table.
        image: the encoded picture, in the layouts whose pictures are written with the commit. A
            shard's are in memory together until then, some 256 files.
    """

    index: int
    metadata: dict[str, Any]
    attention: list[dict[str, Any]] = field(default_factory=list)
    image: bytes | None = None

    @property
    def failed(self) -> bool:
        return self.metadata["status"] == "failed"


def failed(
    row: Row, config: GuidanceConfig, error: RowError | None = None, kind: str = ""
) -> Outcome:
    """The outcome of a row without a picture.

    Args:
        error: why; default: what was wrong in the manifest.
        kind: the name of the error's type where it is not its class.
    """
    error = error or row.error
    assert error is not None
    reason = {"status": "failed", "error_type": kind or type(error).__name__, "error": str(error)}
    return Outcome(row.index, _as_used(row, config) | reason)


def write_image(
    storage: Storage,
    shard: int,
    row: Row,
    result: Result,
    config: GuidanceConfig,
    layout: Layout = "files",
    image_format: ImageFormat = PNG,
    spent: Callable[[str, float], None] = lambda phase, seconds: None,
) -> Outcome:
    """Encode the picture of a finished row, if there is one, and say what its table rows are. In the
    layout `files` it is written at once.

    Args:
        spent: is told the seconds of the phases `encode` and `upload`.
    """
    if result.error is not None:
        return failed(row, config, result.error)
    assert result.image is not None
    start = time.perf_counter()
    data = image_format.encode(result.image)
    encoded = time.perf_counter()
    spent("encode", encoded - start)
    name = names.file_name(layout, shard, row.id, image_format.suffix)
    if layout == "files":
        assert name is not None
        storage.write_bytes(name, data)
        spent("upload", time.perf_counter() - encoded)
    seen = result.attention
    metadata = _as_used(row, config) | {
        "status": "ok",
        "file_name": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "width": result.image.width,
        "height": result.image.height,
        "num_refinements": seen.num_refinements if seen else 0,
        "final_loss": seen.final_loss if seen else None,
        "neglected": seen.neglected if seen else None,
        "seconds": result.seconds,
    }
    return Outcome(
        row.index,
        metadata,
        _attention_rows(row, seen) if seen else [],
        image=None if layout == "files" else data,
    )


def commit(
    storage: Storage,
    shard: int,
    outcomes: Sequence[Outcome],
    extras: pa.Table,
    fingerprint: str,
    layout: Layout = "files",
    image_format: ImageFormat = PNG,
) -> None:
    """Write a shard's tables, and its pictures where they are not written yet; with the last of them
    it is done.

    Args:
        outcomes: one per row of the shard, in any order.
        extras: the manifest's own columns, in its order.
    """
    outcomes = sorted(outcomes, key=lambda outcome: outcome.index)
    shared = {"shard": shard, "fingerprint": fingerprint}
    records = [outcome.metadata | shared for outcome in outcomes]
    # Columns one by one: an extra column may hold what has no Python value.
    schema = names.metadata_schema(extras.schema, layout)
    if layout == "parquet":
        for record, outcome in zip(records, outcomes, strict=True):
            record["image"] = _image_cell(record["id"], outcome.image, image_format.suffix)
    columns = [
        extras[column.name].combine_chunks()
        if column.name in extras.column_names
        else pa.array([record.get(column.name) for record in records], column.type)
        for column in schema
    ]
    metadata = pa.table(columns, schema=schema)
    seen = [row for outcome in outcomes for row in outcome.attention]
    attention = pa.Table.from_pylist(seen, schema=names.ATTENTION_SCHEMA)
    if layout == "files":
        _sweep(storage, shard, {record.get("file_name") for record in records})
    elif layout == "webdataset":
        images = [outcome.image for outcome in outcomes]
        described = metadata.drop_columns(list(_OF_THE_TABLE_ONLY))
        tar = tar_of(described, images, image_format.suffix)
        storage.write_bytes(names.tar_name(shard), tar)
    storage.write_bytes(names.attention_name(shard), _parquet(attention))
    storage.write_bytes(names.metadata_name(shard), _parquet(metadata))


def _image_cell(row_id: str, image: bytes | None, suffix: str) -> dict[str, Any] | None:
    return None if image is None else {"bytes": image, "path": f"{row_id}{suffix}"}


def _sweep(storage: Storage, shard: int, wanted: set[str | None]) -> None:
    """Remove pictures that an earlier, unfinished attempt left for rows that failed this time."""
    for name in storage.list(names.images_of(shard)):
        if name not in wanted:
            storage.delete(name)


def _as_used(row: Row, config: GuidanceConfig) -> dict[str, Any]:
    """The manifest's columns of a row, with the run's settings where it has none of its own."""
    request = row.request
    indices = request.token_indices
    used = {
        "id": row.id,
        "prompt": request.prompt or None,
        "subjects": request.subjects,
        "token_indices": None if indices is None else [_inner(entry) for entry in indices],
        "seed": request.seed,
        **{
            name: getattr(config, name)
            if getattr(request, name) is None
            else getattr(request, name)
            for name in ("method", "negative_prompt", "guidance_scale", "num_inference_steps")
        },
        "height": request.height or config.height,
        "width": request.width or config.width,
    }
    return used | dict.fromkeys(row.unread)


def _inner(entry: int | Sequence[int]) -> list[int]:
    return [entry] if isinstance(entry, int) else list(entry)


def _attention_rows(row: Row, seen: AttentionRecord) -> list[dict[str, Any]]:
    return [
        {
            "id": row.id,
            "subject": subject.subject,
            "token_indices": subject.token_indices,
            "tokens": subject.tokens,
            "max_attention": subject.max_attention,
            "mean_attention": subject.mean_attention,
            "entropy": subject.entropy,
            "center_x": subject.center_x,
            "center_y": subject.center_y,
            "loss": seen.loss,
            "map": subject.map.tobytes(),
            "map_height": subject.map.shape[0],
            "map_width": subject.map.shape[1],
            "map_scale": subject.map_scale,
        }
        for subject in seen.subjects
    ]


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()
