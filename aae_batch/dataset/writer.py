"""Write a shard of an output: its images, then its tables. The `metadata` table is written last and
commits the shard. Objects are created and never overwritten: see `settle.py`."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.columns import TRIES_NAMES
from aae_batch.dataset import layout as names
from aae_batch.dataset.image_format import PNG, ImageFormat
from aae_batch.dataset.layout import Layout
from aae_batch.dataset.outcome import Outcome, reason
from aae_batch.dataset.problem import Problem
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.rewriting import rewrite
from aae_batch.dataset.settle import settle
from aae_batch.errors import OutputError, RowError
from aae_batch.sampling.resolve import overridden
from aae_batch.store.base import Storage

if TYPE_CHECKING:
    from aae_batch.manifest.row import Row
    from aae_batch.request import AttentionRecord, Result
    from aae_batch.sampling.config import GuidanceConfig

_OWN_COLUMNS = [column.name for column in (*names.MANIFEST_COLUMNS, *names.OUTCOME_COLUMNS)]


@dataclass(frozen=True)
class Shard(ABC):
    """One shard of a run's output. The subclasses in `layouts.py` implement the layouts.

    Attributes:
        fingerprint: of the run.
        at_once: whether each image is written as soon as it is generated instead of with the commit.
        with_tries: whether rows are tried several times, so that the shard has a table of tries.
        with_forwards: whether the metadata has the column `forwards`.
        with_maps: whether the attention table has maps over time.
    """

    storage: Storage
    index: int
    fingerprint: str
    image_format: ImageFormat = PNG
    with_tries: bool = False
    with_forwards: bool = True
    with_maps: bool = False
    layout: ClassVar[Layout]
    at_once: ClassVar[bool] = False

    @staticmethod
    def pictures_of(index: int) -> str | None:
        """Return the name of the object with all images of the shard; None in layouts without one."""
        return None

    @property
    def attention_schema(self) -> pa.Schema:
        return names.attention_schema(self.with_maps)

    @abstractmethod
    def file_name(self, row_id: str) -> str | None:
        """Return the `file_name` of a row's image in the metadata; `Dataset.image_bytes` reads it."""

    @abstractmethod
    def pictures(
        self, table: bytes, good: Collection[str], failed: Collection[str]
    ) -> Iterator[tuple[str, bytes] | Problem]:
        """Yield the ids and encoded images of a committed shard, and the problems with other objects.

        Args:
            table: the metadata table's bytes.
            good: ids of rows with an image.
            failed: ids of failed rows for which an earlier attempt may have left an image.

        Raises:
            tarfile.TarError, EOFError, pa.ArrowException: the images cannot be read.
        """

    def write_image(
        self,
        row: Row,
        result: Result,
        config: GuidanceConfig,
        keep: bool = False,
        spent: Callable[[str, float], None] = lambda phase, seconds: None,
        tries: Sequence[dict[str, Any]] = (),
    ) -> Outcome:
        """Encode the image of a finished row, if it has one, and return the row's outcome. The layout
        `files` writes the image at once.

        Args:
            keep: in that layout too, keep the image for the commit.
            spent: called with each phase, `encode` or `upload`, and its seconds.
            tries: the row's rows of the table of tries.
        """
        if result.error is not None:
            return failed(row, config, result.error, forwards=result.forwards).after(tries)
        assert result.image is not None
        start = time.perf_counter()
        data = self.image_format.encode(result.image)
        encoded = time.perf_counter()
        spent("encode", encoded - start)
        seen = result.attention
        metadata = as_used(row, config) | {
            "status": "ok",
            "file_name": self.file_name(row.id),
            "sha256": hashlib.sha256(data).hexdigest(),
            "width": result.image.width,
            "height": result.image.height,
            "num_refinements": seen.num_refinements if seen else 0,
            "final_loss": seen.final_loss if seen else None,
            "neglected": seen.neglected if seen else None,
            "seconds": result.seconds,
            "forwards": result.forwards,
        }
        attention = attention_rows(row, seen, self.attention_schema) if seen else []
        outcome = Outcome(row.index, metadata, attention, image=data).after(tries)
        if self.at_once and not keep:
            outcome = replace(self._settle_picture(outcome, create=True), image=None)
            spent("upload", time.perf_counter() - encoded)
        return outcome

    def commit(self, outcomes: Sequence[Outcome], extras: pa.Table) -> None:
        """Create the shard's images, if not written yet, and its tables. The last table commits the shard.
        A shard that is committed already is not changed.

        Args:
            outcomes: one per row of the shard, in any order.
            extras: the manifest's extra columns, in its order.
        """
        made = sorted(outcomes, key=lambda outcome: outcome.index)
        committed = names.metadata_name(self.index)
        if self.storage.exists(committed):
            return
        metadata = self._metadata(made, extras)
        settled = self._settle(made, metadata)
        if settled is None:
            return
        if settled is not made:  # images of an earlier attempt are used
            metadata = self._metadata(settled, extras)
        is_of_others = True  # what another attempt left is taken only together
        for name, (table, columns) in self._tables(settled).items():
            ours = _parquet(table)
            fits = partial(_same_in, columns if is_of_others else [], table)
            stored = settle(self.storage, name, ours, fits, committed)
            if stored is None:
                return
            is_of_others = stored != ours or not self.with_tries
        self.storage.create_bytes(committed, _parquet(metadata))

    def recommit(self, outcomes: Sequence[Outcome], extras: pa.Table) -> None:
        """Rewrite the committed shard atomically; see `rewriting.py`.

        Args:
            outcomes: as for `commit`; in the layout `files`, new images must be included.
        """
        in_order = sorted(outcomes, key=lambda outcome: outcome.index)
        made = [self._settle_picture(outcome, create=False) for outcome in in_order]
        metadata = self._metadata(made, extras)
        objects = self._objects(made, metadata)
        for name, (table, _) in self._tables(made).items():
            objects[name] = _parquet(table)
        objects[names.metadata_name(self.index)] = _parquet(metadata)
        rewrite(self.storage, self.index, objects)

    def stored_outcomes(self, start: int) -> list[Outcome]:
        """Return the outcomes of a committed shard whose first row is row `start` of the manifest.

        Raises:
            OutputError: a part of it cannot be read.
        """
        dataset = Dataset(self.storage)
        attention: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in dataset.attention_of(self.index).to_pylist():
            attention[row["id"]].append(row)
        tries: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in dataset.tries_of(self.index).to_pylist() if self.with_tries else ():
            tries[row["id"]].append(row)
        found = []
        own = [*_OWN_COLUMNS, *(TRIES_NAMES if self.with_tries else ())]
        for i, row in enumerate(dataset.table(self.index, own).to_pylist(), start):
            made = tries[row["id"]] if row.get("tries") else []
            if row["status"] == "ok":
                image = None if self.at_once else dataset.image_bytes(row)
                found.append(Outcome(i, row, attention[row["id"]], image=image).after(made))
            else:
                found.append(Outcome(i, row).after(made))
        return found

    def read(self, name: str) -> bytes | None:
        """Return an object's bytes; None if it does not exist.

        Raises:
            OutputError: it exists and cannot be read, so it may still be intact.
        """
        try:
            return self.storage.read_bytes(name)
        except OutputError:
            if self.storage.exists(name):
                raise
            return None

    def _settle_picture(self, outcome: Outcome, create: bool) -> Outcome:
        """Return the outcome with the bytes that are, or will be, stored under its image's own name: its
        own, or those of the same image that another attempt stored first. If another object has that name,
        return a failed outcome. In layouts without a file per image the outcome is unchanged.

        Args:
            create: create the image if it does not exist; otherwise only look.
        """
        return outcome

    def _settle(self, outcomes: list[Outcome], metadata: pa.Table) -> list[Outcome] | None:
        """Prepare the images for the commit. Returns the outcomes with the images that are stored; None
        if the shard was committed meanwhile."""
        return outcomes

    def _objects(self, outcomes: list[Outcome], metadata: pa.Table) -> dict[str, bytes]:
        """Return the objects with images, by name, that a rewrite writes besides the tables."""
        return {}

    def _cells(self, outcome: Outcome) -> dict[str, Any]:
        """Return the values of metadata columns that only this layout has."""
        return {}

    def _tables(self, outcomes: list[Outcome]) -> dict[str, tuple[pa.Table, list[str]]]:
        """Return the tables beside the metadata by name, each with the columns in which another attempt's
        must be the same."""
        seen = [row for outcome in outcomes for row in outcome.attention]
        attention = pa.Table.from_pylist(seen, schema=self.attention_schema)
        same = ["id", "subject", "token_indices"]
        found: dict[str, tuple[pa.Table, list[str]]] = {}
        if self.with_tries:  # first: they say of which try a row's attention is
            made = [row for outcome in outcomes for row in outcome.tries]
            tries = pa.Table.from_pylist(made, schema=names.TRIES_SCHEMA)
            found[names.tries_name(self.index)] = tries, ["id", "try", "seed", "verdict", "kept"]
        return found | {names.attention_name(self.index): (attention, same)}

    def metadata_schema(self, extras: pa.Schema) -> pa.Schema:
        """As `layout.metadata_schema`, for this run."""
        return names.metadata_schema(extras, self.layout, self.with_tries, self.with_forwards)

    def _metadata(self, outcomes: list[Outcome], extras: pa.Table) -> pa.Table:
        shared = {"shard": self.index, "fingerprint": self.fingerprint}
        records = [outcome.metadata | shared | self._cells(outcome) for outcome in outcomes]
        # Columns one by one: an extra column may hold values that Python cannot represent.
        schema = self.metadata_schema(extras.schema)
        columns = [
            extras[column.name].combine_chunks()
            if column.name in extras.column_names
            else pa.array([record.get(column.name) for record in records], column.type)
            for column in schema
        ]
        return pa.table(columns, schema=schema)


def failed(
    row: Row,
    config: GuidanceConfig,
    error: RowError | None = None,
    kind: str = "",
    forwards: int | None = None,
) -> Outcome:
    """Return the outcome of a failed row.

    Args:
        error: why it failed. Default: the row's error in the manifest.
        kind: name for `error_type`. Default: the error's class.
        forwards: what it cost, if it was sampled.
    """
    error = error or row.error
    assert error is not None
    return Outcome(row.index, as_used(row, config) | reason(error, kind) | {"forwards": forwards})


def _same_in(columns: list[str], table: pa.Table, stored: bytes) -> bool:
    """Return whether a stored table has the same values in some columns; False without any."""
    try:
        found = pq.read_table(pa.BufferReader(stored))
        same_kind = found.schema.equals(table.schema)
        same = same_kind and found.select(columns).equals(table.select(columns))
        return bool(columns) and same
    except pa.ArrowException:
        return False


def as_used(row: Row, config: GuidanceConfig) -> dict[str, Any]:
    """Return a row's manifest columns, with the run's settings as defaults."""
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


def attention_rows(
    row: Row, seen: AttentionRecord, schema: pa.Schema = names.ATTENTION_SCHEMA
) -> list[dict[str, Any]]:
    columns = schema.names
    return [
        {name: getattr(subject, name, None) for name in columns}
        | {
            "id": row.id,
            "loss": seen.loss,
            "map_height": subject.map.shape[0],
            "map_width": subject.map.shape[1],
        }
        | {name: getattr(subject, name).tobytes() for name in ("map", "maps") if name in columns}
        for subject in seen.subjects
    ]


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()
