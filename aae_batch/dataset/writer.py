"""Rows become pictures and table rows; a shard's tables are its commit, `metadata` last."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.dataset import layout
from aae_batch.errors import RowError

if TYPE_CHECKING:
    from PIL.Image import Image

    from aae_batch.attention_stats import AttentionRecord
    from aae_batch.config import GuidanceConfig
    from aae_batch.dataset.storage import Storage
    from aae_batch.request import Result
    from aae_batch.row import Row

PNG_LEVEL = 1
"""Level 6 takes five times as long for files a few per cent smaller."""


@dataclass(frozen=True)
class Outcome:
    """What became of one row, as the tables will say it.

    Attributes:
        index: the row's position in the manifest.
        metadata: its row of the metadata table, without extra columns, shard and fingerprint.
        attention: its rows of the attention table.
    """

    index: int
    metadata: dict[str, Any]
    attention: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.metadata["status"] == "failed"


def encode_png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


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
    storage: Storage, shard: int, row: Row, result: Result, config: GuidanceConfig
) -> Outcome:
    """Write the picture of a finished row, if there is one, and say what its table rows are."""
    if result.error is not None:
        return failed(row, config, result.error)
    assert result.image is not None
    data = encode_png(result.image)
    name = layout.image_name(shard, row.id)
    storage.write_bytes(name, data)
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
    return Outcome(row.index, metadata, _attention_rows(row, seen) if seen else [])


def commit(
    storage: Storage, shard: int, outcomes: Sequence[Outcome], extras: pa.Table, fingerprint: str
) -> None:
    """Write a shard's tables; with the last of them it is done.

    Args:
        outcomes: one per row of the shard, in any order.
        extras: the manifest's own columns, in its order.
    """
    outcomes = sorted(outcomes, key=lambda outcome: outcome.index)
    shared = {"shard": shard, "fingerprint": fingerprint}
    records = [outcome.metadata | shared for outcome in outcomes]
    # Columns one by one: an extra column may hold what has no Python value.
    columns = [
        extras[column.name].combine_chunks()
        if column.name in extras.column_names
        else pa.array([record.get(column.name) for record in records], column.type)
        for column in layout.metadata_schema(extras.schema)
    ]
    metadata = pa.table(columns, schema=layout.metadata_schema(extras.schema))
    seen = [row for outcome in outcomes for row in outcome.attention]
    attention = pa.Table.from_pylist(seen, schema=layout.ATTENTION_SCHEMA)
    _sweep(storage, shard, {record.get("file_name") for record in records})
    storage.write_bytes(layout.attention_name(shard), _parquet(attention))
    storage.write_bytes(layout.metadata_name(shard), _parquet(metadata))


def _sweep(storage: Storage, shard: int, wanted: set[str | None]) -> None:
    """Remove pictures that an earlier, unfinished attempt left for rows that failed this time."""
    for name in storage.list(layout.images_of(shard)):
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
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()
