"""Read a run's output."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import PurePath
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from aae_batch.dataset import layout
from aae_batch.dataset.run_record import (
    NotARun,
    check_record,
    counts_forwards,
    courtesy,
    keeps_maps,
    tries_again,
)
from aae_batch.dataset.webdataset import tar_members
from aae_batch.errors import DroppedError, OutputError
from aae_batch.store.base import Storage
from aae_batch.store.open import open_storage
from aae_batch.store.read_ahead import read_ahead


class Dataset:
    """A dataset at an output root, complete or not.

    Args:
        root: the output root, or its storage.
    """

    def __init__(self, root: str | os.PathLike[str] | Storage) -> None:
        is_path = isinstance(root, (str, PurePath))
        self.storage: Storage = open_storage(root) if is_path else root  # type: ignore[arg-type,assignment]
        self._held: tuple[str, dict[str, bytes]] = ("", {})

    @property
    def run(self) -> dict[str, Any] | None:
        """The content of `run.json`; None if the output has none.

        Raises:
            OutputError: it cannot be read, or no run wrote it.
        """
        record = self._json(layout.RUN)
        try:
            return None if record is None else check_record(record)
        except NotARun as error:
            raise OutputError(
                f"{self.storage.place(layout.RUN)} does not say how the output was made: {error}; "
                "restore it, or choose another output."
            ) from None

    @property
    def summary(self) -> dict[str, Any] | None:
        """The content of `summary.json`; None if it is missing or damaged. It is written when the dataset
        is complete, and can be written again."""
        return self._courtesy(layout.SUMMARY)

    @property
    def progress(self) -> layout.ProgressRecord | None:
        """The content of `progress.json`; None if it is missing or damaged."""
        return cast("layout.ProgressRecord | None", self._courtesy(layout.PROGRESS))

    def shards(self) -> list[int]:
        """Return the committed shards, sorted."""
        return layout.shards_among(self.storage.list(layout.METADATA), layout.metadata_name)

    def tables(
        self, columns: list[str] | None = None, shards: Sequence[int] | None = None
    ) -> Iterator[pa.Table]:
        """Yield the result of `table` for each of `shards`, in order, reading ahead. Default: all
        committed shards."""
        listed = self.shards() if shards is None else shards
        return read_ahead(lambda shard: self.table(shard, columns), listed)

    def table(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """Return the metadata of a committed shard. Default: all columns except the images."""
        return self._table(layout.metadata_name(shard), columns)

    def metadata(
        self, columns: list[str] | None = None, shards: Sequence[int] | None = None
    ) -> pa.Table:
        """Return the concatenated `tables`, in the manifest's order. Without a shard the table is empty
        and has the columns that every dataset has."""
        tables = list(self.tables(columns, shards))
        if tables:
            return self._joined(tables)
        counts = (run := self.run) is None or counts_forwards(run)
        schema = layout.metadata_schema(
            pa.schema([]), with_tries=self._with_tries, with_forwards=counts
        )
        wanted = [column for column in schema if columns is None or column.name in columns]
        return pa.schema(wanted).empty_table()

    def _joined(self, tables: list[pa.Table]) -> pa.Table:
        try:
            return pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise OutputError(
                f"The tables in {self.storage.place(layout.METADATA)} have columns of different types, as two "
                "versions that read the manifest otherwise write them: name the columns that you need "
                "without these, or read the shards one by one with `Dataset.table`."
            ) from error

    def attention(self) -> pa.Table:
        """Return the attention rows of all committed shards."""
        tables = read_ahead(self.attention_of, self.shards())
        schema = layout.attention_schema(self.run is not None and keeps_maps(self.run))
        return pa.concat_tables([schema.empty_table(), *tables])

    def attention_of(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """Return the attention rows of a committed shard."""
        return self._table(layout.attention_name(shard), columns)

    def tries(self) -> pa.Table:
        """Return the tries of all committed shards; none in a run that makes one picture a row."""
        tables = read_ahead(self.tries_of, self.shards() if self._with_tries else [])
        return pa.concat_tables([layout.TRIES_SCHEMA.empty_table(), *tables])

    def tries_of(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """Return the tries of a committed shard, of a run with `--accept` or `--best-of`."""
        return self._table(layout.tries_name(shard), columns)

    def pictures_of_tries(self, shard: int) -> Iterator[tuple[str, int, bytes]]:
        """Yield row id, number and encoded image of the tries whose pictures `--keep-rejected` kept."""
        with self._parquet(layout.tries_name(shard)) as file:
            for batch in file.iter_batches(_PICTURES_AT_ONCE, columns=["id", "try", "picture"]):
                for made in batch.to_pylist():
                    if made["picture"] is not None:
                        yield made["id"], made["try"], made["picture"]

    @property
    def _with_tries(self) -> bool:
        return self.run is not None and tries_again(self.run)

    def metrics(self) -> list[str]:
        """Return the names of the metrics with scores, e.g. `clip`, sorted."""
        parts = (name.split("/") for name in self.storage.list(layout.METRICS))
        return sorted({metric for _, metric, *_ in parts})

    def metric_run(self, metric: str) -> dict[str, Any] | None:
        """Return the content of a metric's `run.json`; None if it is missing.

        Raises:
            OutputError: it cannot be read, or no metric wrote it.
        """
        name = layout.metric_run_name(metric)
        run = self._json(name)
        if run is not None and not (
            isinstance(run.get("settings"), dict) and isinstance(run.get("fingerprint"), str)
        ):
            raise OutputError(
                f"{self.storage.place(name)} does not say how the images were scored: remove it, and "
                f"score again with --metric {metric}."
            )
        return run

    def scored_shards(self, metric: str) -> list[int]:
        """Return the shards that a metric has scored, sorted."""
        prefix = layout.metric_name(metric, 0).removesuffix("00000.parquet")
        named = partial(layout.metric_name, metric)
        return layout.shards_among(self.storage.list(prefix), named)

    def scores_of(self, metric: str, shard: int, columns: list[str] | None = None) -> pa.Table:
        """Return a metric's scores of a shard's images: `layout.SCORED_COLUMNS` and the metric's columns.

        Raises:
            OutputError: the table is missing or damaged.
        """
        return self.marked_scores_of(metric, shard, columns)[0]

    def marked_scores_of(
        self, metric: str, shard: int, columns: list[str] | None = None
    ) -> tuple[pa.Table, dict[str, str]]:
        """Return `scores_of` and the table's own metadata; for its keys see `layout.SCORES_FINGERPRINT`
        and `layout.SCORES_UNSCORED`."""
        with self._parquet(layout.metric_name(metric, shard)) as file:
            table = file.read(columns)
        said = table.schema.metadata or {}
        marks = {key.decode(): value.decode() for key, value in said.items()}
        return table.replace_schema_metadata(None), marks

    def metric_fingerprint(self, metric: str) -> str | None:
        """Return the fingerprint of the settings of a metric's last run; None if unknown."""
        return (self.metric_run(metric) or {}).get("fingerprint")

    def failed_rows(self, shards: Sequence[int] | None = None) -> dict[int, list[int]]:
        """Return, for each of `shards` with failed rows, their positions in the shard, without rows that
        were dropped. Default: all committed shards. Reads their metadata tables."""
        found = {}
        shards = self.shards() if shards is None else shards
        for shard, table in zip(shards, self.tables(["error_type"], shards), strict=True):
            kinds = pc.fill_null(table["error_type"], DroppedError.__name__)
            failed = pc.indices_nonzero(pc.not_equal(kinds, DroppedError.__name__)).to_pylist()
            if failed:
                found[shard] = failed
        return found

    def image(self, row: Mapping[str, Any]) -> Image.Image:
        """Return the decoded image of a metadata row, which needs `id`, `shard` and `file_name`.

        Raises:
            OutputError: the row has no image, or it cannot be read.
        """
        data = self.image_bytes(row)
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's errors for damaged files
            place = self.storage.place(row["file_name"] or layout.metadata_name(row["shard"]))
            raise OutputError(
                f"The image of row {row['id']} in {place} is damaged: {self._repair()}"
            ) from error
        return image

    def image_bytes(self, row: Mapping[str, Any]) -> bytes:
        """Return the encoded image of a metadata row, as for `image`. If one object holds a shard's
        images, those of the last shard read stay in memory, so read rows in order.

        Raises:
            OutputError: the row has no image, or it cannot be read.
        """
        name = row["file_name"]
        if name is None:
            place, key, read = layout.metadata_name(row["shard"]), row["id"], parquet_images
        elif "#" in name:
            (place, key), read = name.split("#"), tar_members
        else:
            return self.storage.read_bytes(name)
        if self._held[0] != place:
            with self._whole(place):
                self._held = (place, dict(read(self.storage.read_bytes(place))))
        try:
            return self._held[1][key]
        except KeyError:
            raise OutputError(
                f"Row {row['id']} has no image in {self.storage.place(place)}; its columns status "
                "and error say why."
            ) from None

    def _table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        with self._parquet(name) as file:
            names = file.schema_arrow.names
            if columns is None and layout.IMAGE_COLUMN.name in names:
                columns = [name for name in names if name != layout.IMAGE_COLUMN.name]
            return file.read(columns).replace_schema_metadata(None)

    @contextmanager
    def _parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        with self._whole(name), self.storage.open(name) as source, pq.ParquetFile(source) as file:
            yield file

    @contextmanager
    def _whole(self, name: str) -> Iterator[None]:
        """Turn errors of reading a damaged object into one sentence."""
        try:
            yield
        except pa.ArrowMemoryError:
            raise
        except (pa.ArrowException, tarfile.TarError, EOFError, OSError) as error:
            place = self.storage.place(name)
            if isinstance(error, OSError) and error.strerror:  # None in Arrow's own errors
                raise OutputError(f"Cannot read {place}: {error.strerror}.") from error
            fix = self._repair()
            if name.startswith(layout.METRICS):
                metric = name.split("/")[1]
                fix = f"`aae-batch evaluate` with --metric {metric} computes it again."
            raise OutputError(f"{place} is damaged: {fix}") from error

    def _repair(self) -> str:
        return (
            f"`aae-batch verify --repair {self.storage.root}` removes it, and the command that started "
            "the run generates it again."
        )

    def _json(self, name: str) -> dict[str, Any] | None:
        if not self.storage.exists(name):
            return None
        try:
            found = json.loads(self.storage.read_bytes(name))
        except (ValueError, RecursionError) as error:
            raise OutputError(f"{self.storage.place(name)} is not JSON: {error}.") from error
        if not isinstance(found, dict):
            raise OutputError(
                f"{self.storage.place(name)} is not a JSON object: restore or remove it."
            )
        return found

    def _courtesy(self, name: str) -> dict[str, Any] | None:
        """Return a record that no row depends on; None if it is missing or damaged."""
        if not self.storage.exists(name):
            return None
        return courtesy(name, self.storage.read_bytes(name))


_PICTURES_AT_ONCE = 16


def parquet_images(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the ids and encoded images of a metadata table in the layout `parquet`, in order. Rows
    without an image are skipped."""
    file = pq.ParquetFile(pa.BufferReader(data))
    for batch in file.iter_batches(_PICTURES_AT_ONCE, columns=["id", layout.IMAGE_COLUMN.name]):
        for row in batch.to_pylist():
            if row.get("image") is not None:
                yield row["id"], row["image"]["bytes"]


def attention_map(row: Mapping[str, Any]) -> np.ndarray:
    """Return the last map of a row of the attention table as probabilities: float32 [height, width]."""
    return _probabilities(row, row["map"], [row["map_scale"]])[0]


def attention_maps(row: Mapping[str, Any]) -> tuple[list[int], np.ndarray]:
    """Return the maps over time of a row of the attention table: their steps, counted from 0, and the maps
    as probabilities, float32 [steps, height, width]. Without `--attention-maps every:N`, the last map alone.
    """
    if row.get("maps") is None:
        return [len(row["max_attention"]) - 1], attention_map(row)[None]
    return row["map_steps"], _probabilities(row, row["maps"], row["map_scales"])


def _probabilities(row: Mapping[str, Any], maps: bytes, scales: list[float]) -> np.ndarray:
    values = np.frombuffer(maps, np.uint8).reshape(-1, row["map_height"], row["map_width"])
    return values * (np.asarray(scales, np.float32) / 255)[:, None, None]
