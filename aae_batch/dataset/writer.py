"""Rows become pictures and table rows; a shard's tables are its commit, `metadata` last. All of them are
created and never overwritten: see `settle.py`."""

from __future__ import annotations

import hashlib
import json
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.dataset import layout as names
from aae_batch.dataset.image_format import ImageFormat
from aae_batch.dataset.layout import Layout
from aae_batch.dataset.rewriting import rewrite
from aae_batch.dataset.settle import is_picture, settle, settle_picture
from aae_batch.dataset.webdataset import tar_members, tar_of
from aae_batch.errors import OccupiedError, RowError
from aae_batch.sampling.resolve import overridden

if TYPE_CHECKING:
    from aae_batch.manifest.row import Row
    from aae_batch.request import AttentionRecord, Result
    from aae_batch.sampling.config import GuidanceConfig
    from aae_batch.store.base import Storage

PNG = ImageFormat()

_OF_THE_TABLE_ONLY = frozenset(
    ["status", "error_type", "error", "file_name", "seconds", "shard", "fingerprint"]
)
"""Columns that a picture's JSON in a tar lacks. Without them, among which `seconds` alone differs from
run to run, the same shard gives the same tar."""


_MEASURED = ("num_refinements", "final_loss", "neglected")
"""Columns that rounding may change from one attempt to the next."""


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
    return Outcome(row.index, as_used(row, config) | _reason(error, kind))


def write_image(
    storage: Storage,
    shard: int,
    row: Row,
    result: Result,
    config: GuidanceConfig,
    layout: Layout = "files",
    image_format: ImageFormat = PNG,
    spent: Callable[[str, float], None] = lambda phase, seconds: None,
    keep: bool = False,
) -> Outcome:
    """Encode the picture of a finished row, if there is one, and say what its table rows are. In the
    layout `files` it is written at once.

    Args:
        keep: hold the picture for the commit in that layout, too.
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
    at_once = layout == "files" and not keep
    if at_once:
        assert name is not None
        there = settle_picture(storage, name, data, result.image.size, image_format)
        if there is None:
            return failed(row, config, _occupied(storage, row.id, name))
        data = there
        spent("upload", time.perf_counter() - encoded)
    seen = result.attention
    metadata = as_used(row, config) | {
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
        image=None if at_once else data,
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
    """Create a shard's tables, and its pictures where they are not written yet; with the last of them
    it is done. Where it is done already, by whomever, nothing of it is changed.

    Args:
        outcomes: one per row of the shard, in any order.
        extras: the manifest's own columns, in its order.
    """
    outcomes = sorted(outcomes, key=lambda outcome: outcome.index)
    committed = names.metadata_name(shard)
    if storage.exists(committed):
        return
    if layout == "files":
        _sweep(storage, shard, outcomes, image_format)
    elif layout == "webdataset":
        described = _metadata(shard, outcomes, extras, fingerprint, layout, image_format)
        tar = _tar(described, outcomes, image_format)
        there = settle(
            storage,
            names.tar_name(shard),
            tar,
            lambda stored: _from_tar(stored, outcomes, image_format) is not None,
            committed,
        )
        if there is None:
            return
        if there != tar:
            outcomes = _from_tar(there, outcomes, image_format) or outcomes
    attention = _attention(outcomes)
    kept = settle(
        storage,
        names.attention_name(shard),
        _parquet(attention),
        lambda stored: _same_subjects(stored, attention),
        committed,
    )
    if kept is not None:
        metadata = _metadata(shard, outcomes, extras, fingerprint, layout, image_format)
        storage.create_bytes(committed, _parquet(metadata))


def recommit(
    storage: Storage,
    shard: int,
    outcomes: Sequence[Outcome],
    extras: pa.Table,
    fingerprint: str,
    layout: Layout = "files",
    image_format: ImageFormat = PNG,
) -> None:
    """Write a committed shard anew, whole or not at all; see `rewriting.py`.

    Args:
        outcomes: one per row of the shard, in any order; in the layout `files` those with a new
            picture have it.
    """
    outcomes = sorted(outcomes, key=lambda outcome: outcome.index)
    objects: dict[str, bytes] = {}
    if layout == "files":
        outcomes = [_unless_occupied(storage, outcome, image_format) for outcome in outcomes]
        for outcome in outcomes:
            if outcome.image is not None:
                objects[outcome.metadata["file_name"]] = outcome.image
    metadata = _metadata(shard, outcomes, extras, fingerprint, layout, image_format)
    if layout == "webdataset":
        objects[names.tar_name(shard)] = _tar(metadata, outcomes, image_format)
    objects[names.attention_name(shard)] = _parquet(_attention(outcomes))
    objects[names.metadata_name(shard)] = _parquet(metadata)
    rewrite(storage, shard, objects)


def _metadata(
    shard: int,
    outcomes: Sequence[Outcome],
    extras: pa.Table,
    fingerprint: str,
    layout: Layout,
    image_format: ImageFormat,
) -> pa.Table:
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
    return pa.table(columns, schema=schema)


def _attention(outcomes: Sequence[Outcome]) -> pa.Table:
    seen = [row for outcome in outcomes for row in outcome.attention]
    return pa.Table.from_pylist(seen, schema=names.ATTENTION_SCHEMA)


def _same_subjects(stored: bytes, attention: pa.Table) -> bool:
    """Whether a stored attention table is of the same pictures and subjects."""
    columns = ["id", "subject", "token_indices"]
    try:
        found = pq.read_table(pa.BufferReader(stored))
        return found.schema.equals(attention.schema) and found.select(columns).equals(
            attention.select(columns)
        )
    except pa.ArrowException:
        return False


def _tar(metadata: pa.Table, outcomes: Sequence[Outcome], image_format: ImageFormat) -> bytes:
    described = metadata.drop_columns(list(_OF_THE_TABLE_ONLY))
    return tar_of(described, [outcome.image for outcome in outcomes], image_format.suffix)


def _from_tar(
    tar: bytes, outcomes: Sequence[Outcome], image_format: ImageFormat
) -> list[Outcome] | None:
    """The outcomes with the pictures that a tar has, and what it says of them; None where it does not
    have just these."""
    taken = []
    try:
        members = dict(tar_members(tar))
        for outcome in outcomes:
            if outcome.failed:
                taken.append(outcome)
                continue
            row = outcome.metadata
            image = members.pop(names.member_name(row["id"], image_format.suffix))
            said = json.loads(members.pop(names.member_name(row["id"], ".json")))
            if not is_picture(image, (row["width"], row["height"]), image_format):
                return None
            measured = {name: said[name] for name in _MEASURED}
            measured["sha256"] = hashlib.sha256(image).hexdigest()
            taken.append(replace(outcome, image=image, metadata=row | measured))
    except (tarfile.TarError, EOFError, ValueError, KeyError):
        return None
    return None if members else taken


def _unless_occupied(storage: Storage, outcome: Outcome, image_format: ImageFormat) -> Outcome:
    """The same, where its picture's name is free or has the same picture; else a failed one."""
    row = outcome.metadata
    if outcome.image is None or not storage.exists(row["file_name"]):
        return outcome
    stored = storage.read_bytes(row["file_name"])
    if is_picture(stored, (row["width"], row["height"]), image_format):
        digest = {"sha256": hashlib.sha256(stored).hexdigest()}
        return replace(outcome, image=stored, metadata=row | digest)
    kept = {column.name: row.get(column.name) for column in names.MANIFEST_COLUMNS}
    reason = _reason(_occupied(storage, row["id"], row["file_name"]))
    return Outcome(outcome.index, kept | reason)


def _occupied(storage: Storage, row_id: str, name: str) -> OccupiedError:
    return OccupiedError(
        row_id,
        f"{storage.place(name)} is there and is no picture of this run: move it away, and run the same "
        "command again with --retry-failed.",
    )


def _reason(error: RowError, kind: str = "") -> dict[str, str]:
    return {"status": "failed", "error_type": kind or type(error).__name__, "error": str(error)}


def _image_cell(row_id: str, image: bytes | None, suffix: str) -> dict[str, Any] | None:
    return None if image is None else {"bytes": image, "path": f"{row_id}{suffix}"}


def _sweep(
    storage: Storage, shard: int, outcomes: Sequence[Outcome], image_format: ImageFormat
) -> None:
    """Remove pictures that an earlier, unfinished attempt left for rows that failed this time."""
    left = {
        names.image_name(shard, outcome.metadata["id"], image_format.suffix)
        for outcome in outcomes
        if may_have_left_a_picture(outcome.metadata)
    }
    left -= {outcome.metadata.get("file_name") for outcome in outcomes}  # rows may share an id
    for name in left.intersection(storage.list(names.images_of(shard)) if left else ()):
        ours = is_picture(storage.read_bytes(name), None, image_format)
        if ours and not storage.exists(names.metadata_name(shard)):
            storage.delete(name)


def may_have_left_a_picture(row: Mapping[str, Any]) -> bool:
    """Whether an earlier attempt at a row that has none may have drawn it: what is no picture, and what
    had its place, is no run's."""
    return row["status"] == "failed" and row["error_type"] != OccupiedError.__name__


def as_used(row: Row, config: GuidanceConfig) -> dict[str, Any]:
    """The manifest's columns of a row, with the run's settings where it has none of its own."""
    request = row.request
    indices = request.token_indices
    used = {
        "id": row.id,
        "prompt": request.prompt or None,
        "subjects": request.subjects,
        "token_indices": None if indices is None else [_inner(entry) for entry in indices],
        "seed": request.seed,
        **overridden(request, config),
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
