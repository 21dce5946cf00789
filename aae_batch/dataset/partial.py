"""Keep the finished rows of a shard that a stopped job did not complete, for the next run of the job.

Each `partial/00012/<hash>.parquet` holds some of the shard's outcomes. It is written once, and deleted
after the shard's commit. No row depends on it: if it is damaged, its rows are generated again, and if
another run wrote it, or nobody knows who, it is left alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.dataset import layout
from aae_batch.dataset.outcome import Outcome
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.run_record import Shards
from aae_batch.dataset.writer import Shard
from aae_batch.errors import OutputError
from aae_batch.store.base import Storage
from aae_batch.store.read_ahead import read_ahead

_FINGERPRINT = b"fingerprint"
_STATUS = b"status"

Files: TypeAlias = Mapping[str, Mapping[int, str]]
"""The files of a shard: name -> row of the manifest -> its status, as in the metadata."""

_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64()),
        pa.field(
            "metadata", pa.struct(list(layout.metadata_schema(pa.schema([]), with_tries=True)))
        ),
        pa.field("attention", pa.list_(pa.struct(list(layout.attention_schema(with_maps=True))))),
        pa.field("tries", pa.list_(pa.struct(list(layout.TRIES_SCHEMA)))),
        pa.field("image", pa.large_binary()),
    ]
)
"""The attributes of `Outcome`."""

logger = logging.getLogger("aae_batch.job")


def keep(shard: Shard, outcomes: Sequence[Outcome]) -> None:
    """Write outcomes of a shard that is not committed. If they cannot be written, they are lost."""
    if not outcomes:
        return
    rows = [vars(outcome) for outcome in outcomes]
    status = json.dumps({outcome.index: outcome.metadata["status"] for outcome in outcomes})
    marks = {_FINGERPRINT: shard.fingerprint, _STATUS: status}
    table = pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata(marks))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    try:
        shard.storage.write_bytes(layout.partial_name(shard.index, data), data)
    except OutputError as error:
        logger.warning("%d finished rows of shard %d are lost: %s", len(rows), shard.index, error)


def kept(
    storage: Storage, fingerprint: str, on_other: Callable[[str], None] = lambda name: None
) -> dict[int, Files]:
    """Return shard -> its files that this run wrote. Reads their footers.

    Args:
        on_other: called with the name of each other object.
    """
    found: dict[int, dict[str, Mapping[int, str]]] = defaultdict(dict)
    for name in storage.list(layout.PARTIAL):
        shard, rows = layout.partial_of(name), _rows_in(storage, name, fingerprint)
        if shard is None or rows is None:
            on_other(name)
        else:
            found[shard][name] = rows
    return dict(found)


def statuses(files: Files) -> dict[int, str]:
    """Return the status of each row in a shard's files: several may hold the same row."""
    return {row: status for rows in files.values() for row, status in rows.items()}


def made_again(dataset: Dataset, found: Mapping[int, Files]) -> list[int]:
    """Return the committed shards of `found` with failed rows that a stopped `--retry-failed` made again, or
    whose metadata is damaged."""
    shards, again = Shards.of(dataset.run or {}), []
    for shard in sorted(found.keys() & {*dataset.shards()}):
        kept = statuses(found[shard])
        try:
            failed = dataset.failed_rows([shard]).get(shard, [])
        except OutputError:
            again.append(shard)
            continue
        if any(kept.get(shards[shard].start + place) == "ok" for place in failed):
            again.append(shard)
    return again


def take_up(
    shard: Shard, names: Iterable[str], rows: Collection[int]
) -> tuple[dict[int, Outcome], list[str]]:
    """Return, by row, the outcomes of `rows` of the manifest whose images are whole; and those of the
    files `names` that are damaged, which are deleted."""
    found: dict[int, Outcome] = {}
    damaged = []
    for name in names:
        data = shard.read(name)
        if data is None or layout.partial_name(shard.index, data) != name:
            damaged.append(name)
            continue
        read = pq.read_table(pa.BufferReader(data)).to_pylist()
        wanted = [Outcome(**row) for row in read if row["index"] in rows]
        whole = read_ahead(lambda outcome: _has_its_image(shard, outcome), wanted)
        found |= {o.index: o for o, is_whole in zip(wanted, whole, strict=True) if is_whole}
    discard(shard.storage, damaged)
    return found, damaged


def discard(storage: Storage, names: Iterable[str]) -> None:
    """Delete files of this run that are of no more use."""
    for name in names:
        storage.delete(name)


def _rows_in(storage: Storage, name: str, fingerprint: str) -> dict[int, str] | None:
    """Return the status of each row in a file of this run; None if it is another one."""
    try:
        with storage.open(name) as source, pq.ParquetFile(source) as file:
            schema = file.schema_arrow
    except (pa.ArrowException, OSError, OutputError):
        return None
    said: Mapping[bytes, bytes] = schema.metadata or {}
    is_ours = schema.equals(_SCHEMA) and said.get(_FINGERPRINT) == fingerprint.encode()
    if not is_ours or _STATUS not in said:
        return None
    return {int(row): status for row, status in json.loads(said[_STATUS]).items()}


def _has_its_image(shard: Shard, outcome: Outcome) -> bool:
    """Return whether the outcome's image is as it was made; True without one."""
    if outcome.failed:
        return True
    data = outcome.image
    if data is None and shard.at_once:
        data = shard.read(outcome.metadata["file_name"])
    return data is not None and hashlib.sha256(data).hexdigest() == outcome.metadata["sha256"]
