"""Rows become pictures and table rows; a shard's tables are its commit, `metadata` last. All of them are
created and never overwritten: see `settle.py`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.dataset import layout as names
from aae_batch.dataset.forms import Files, Form
from aae_batch.dataset.outcome import Outcome, reason
from aae_batch.dataset.rewriting import rewrite
from aae_batch.dataset.settle import settle
from aae_batch.errors import RowError

if TYPE_CHECKING:
    from aae_batch.manifest.row import Row
    from aae_batch.request import Result
    from aae_batch.sampling.config import GuidanceConfig
    from aae_batch.sampling.trace import AttentionRecord
    from aae_batch.store.base import Storage


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
    return Outcome(row.index, as_used(row, config) | reason(error, kind))


@dataclass(frozen=True)
class ShardWriter:
    """Writes one shard.

    Attributes:
        fingerprint: of the run.
        form: how the run stores its pictures.
    """

    storage: Storage
    shard: int
    fingerprint: str
    form: Form = Files()

    def write_image(
        self,
        row: Row,
        result: Result,
        config: GuidanceConfig,
        keep: bool = False,
        spent: Callable[[str, float], None] = lambda phase, seconds: None,
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
        data = self.form.image_format.encode(result.image)
        encoded = time.perf_counter()
        spent("encode", encoded - start)
        seen = result.attention
        metadata = as_used(row, config) | {
            "status": "ok",
            "file_name": self.form.file_name(self.shard, row.id),
            "sha256": hashlib.sha256(data).hexdigest(),
            "width": result.image.width,
            "height": result.image.height,
            "num_refinements": seen.num_refinements if seen else 0,
            "final_loss": seen.final_loss if seen else None,
            "neglected": seen.neglected if seen else None,
            "seconds": result.seconds,
        }
        attention = _attention_rows(row, seen) if seen else []
        outcome = Outcome(row.index, metadata, attention, data)
        if self.form.at_once and not keep:
            settled = self.form.settle_picture(self.storage, outcome, create=True)
            outcome = replace(settled, image=None)
            spent("upload", time.perf_counter() - encoded)
        return outcome

    def commit(self, outcomes: Sequence[Outcome], extras: pa.Table) -> None:
        """Create the shard's tables, and its pictures where they are not written yet; with the last of
        them it is done. Where it is done already, by whomever, nothing of it is changed.

        Args:
            outcomes: one per row of the shard, in any order.
            extras: the manifest's own columns, in its order.
        """
        made = _in_order(outcomes)
        committed = names.metadata_name(self.shard)
        if self.storage.exists(committed):
            return
        metadata = self._metadata(made, extras)
        settled = self.form.settle_shard(self.storage, self.shard, made, metadata)
        if settled is None:
            return
        if settled is not made:  # what is there is of an earlier attempt
            metadata = self._metadata(settled, extras)
        attention = _attention(settled)
        kept = settle(
            self.storage,
            names.attention_name(self.shard),
            _parquet(attention),
            lambda stored: _same_subjects(stored, attention),
            committed,
        )
        if kept is not None:
            self.storage.create_bytes(committed, _parquet(metadata))

    def recommit(self, outcomes: Sequence[Outcome], extras: pa.Table) -> None:
        """Rewrite the committed shard, whole or not at all; see `rewriting.py`.

        Args:
            outcomes: one per row of the shard, in any order; in the layout `files` those with a new
                picture have it.
            extras: as for `commit`.
        """
        made = [
            self.form.settle_picture(self.storage, outcome, create=False)
            for outcome in _in_order(outcomes)
        ]
        metadata = self._metadata(made, extras)
        objects = self.form.objects(self.shard, made, metadata)
        objects[names.attention_name(self.shard)] = _parquet(_attention(made))
        objects[names.metadata_name(self.shard)] = _parquet(metadata)
        rewrite(self.storage, self.shard, objects)

    def _metadata(self, outcomes: Sequence[Outcome], extras: pa.Table) -> pa.Table:
        shared = {"shard": self.shard, "fingerprint": self.fingerprint}
        records = [outcome.metadata | shared | self.form.cells(outcome) for outcome in outcomes]
        # Columns one by one: an extra column may hold what has no Python value.
        schema = names.metadata_schema(extras.schema, self.form.layout)
        columns = [
            extras[column.name].combine_chunks()
            if column.name in extras.column_names
            else pa.array([record.get(column.name) for record in records], column.type)
            for column in schema
        ]
        return pa.table(columns, schema=schema)


def _in_order(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return sorted(outcomes, key=lambda outcome: outcome.index)


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
        {name: getattr(subject, name, None) for name in names.ATTENTION_SCHEMA.names}
        | {
            "id": row.id,
            "loss": seen.loss,
            "map": subject.map.tobytes(),
            "map_height": subject.map.shape[0],
            "map_width": subject.map.shape[1],
        }
        for subject in seen.subjects
    ]


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()
