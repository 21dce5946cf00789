"""How a dataset for others is laid out: pieces of rows with their pictures, one file or many."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.dataset import layout
from aae_batch.dataset.webdataset import tar_of
from aae_batch.errors import SettingsError
from aae_batch.manifest.row import is_safe_id
from aae_batch.store.base import Storage

FORMATS = ("hf", "parquet", "webdataset", "imagefolder")

CARD = "README.md"
SAMPLES = "samples.png"
TABLE = "train/metadata.parquet"
"""Of a folder of images."""

ROWS_A_GROUP = 100
"""Of a Parquet file: what a reader who wants one picture must fetch."""

MOST_PARQUET_FILES = 100_000
"""Hugging Face's `datasets` finds names with five digits."""

THREADS = 8
"""Files that are written at once where each picture is one."""


@dataclass(frozen=True)
class Piece:
    """Rows and their pictures, encoded, in the same order. `index` counts the pieces from 0."""

    index: int
    rows: pa.Table
    pictures: Sequence[bytes]


class Format(Protocol):
    """Writes pieces to a destination.

    Attributes:
        num_bytes: written so far.
    """

    num_bytes: int

    def write(self, piece: Piece) -> None: ...

    def close(self) -> None:
        """Write what can only be written at the end."""


def open_format(
    name: str, destination: Storage, pieces: int, suffix: str, schema: pa.Schema
) -> Format:
    """The format of a name.

    Args:
        pieces: how many there are going to be.
        suffix: of picture files, with its dot.
        schema: of the pieces' rows.

    Raises:
        SettingsError: there are more pieces than readers would find.
    """
    if name == "imagefolder":
        return ImageFolder(destination, suffix)
    if name == "webdataset":
        return WebDataset(destination, suffix)
    return Parquet(destination, pieces, suffix, schema)


def files_of(format: str, pieces: int, suffix: str, names: Iterable[str]) -> set[str]:
    """Those of `names` that files of an export can have, besides its card and its samples.

    Args:
        format, pieces, suffix: as for `open_format`.
    """
    if format == "imagefolder":
        folder, end = "train/", suffix
        ids = {name: name.removeprefix(folder).removesuffix(end) for name in names}
        return {
            name
            for name, row_id in ids.items()
            if name == TABLE or (name == f"{folder}{row_id}{end}" and is_safe_id(row_id))
        }
    name_of = _tar_name if format == "webdataset" else partial(_parquet_name, pieces)
    return set(names) & set(map(name_of, range(pieces)))


def _tar_name(index: int) -> str:
    return f"train-{index:05d}.tar"


def _parquet_name(pieces: int, index: int) -> str:
    return f"data/train-{index:05d}-of-{pieces:05d}.parquet"


class Parquet:
    """`data/train-00000-of-00005.parquet`: a file a piece, with a column `image`."""

    def __init__(self, destination: Storage, pieces: int, suffix: str, schema: pa.Schema) -> None:
        if pieces > MOST_PARQUET_FILES:
            raise SettingsError(
                f"Of {pieces:,} Parquet files the library datasets would find the first "
                f"{MOST_PARQUET_FILES:,}: give larger --rows-per-file."
            )
        self._destination = destination
        self._pieces = pieces
        self._suffix = suffix
        image = pa.field(layout.IMAGE_COLUMN.name, layout.IMAGE_COLUMN.type)
        self.schema = pa.schema([image, *schema], metadata=layout.HUGGING_FACE)
        # Pictures are compressed already, and none is there twice.
        others = [leaf for leaf in _leaves(self.schema) if leaf != f"{image.name}.bytes"]
        self._compression = dict.fromkeys(others, "zstd")
        self._use_dictionary = others
        self.num_bytes = 0
        self.memory_bytes = 0
        """The rows in Arrow's format, which Hugging Face calls the dataset's size."""

    def write(self, piece: Piece) -> None:
        """Memory holds the pictures twice: as they are, and in the file."""
        sink = io.BytesIO()
        with pq.ParquetWriter(
            sink,
            self.schema,
            compression=self._compression,
            use_dictionary=self._use_dictionary,
            write_page_index=True,
        ) as file:
            for start in range(0, piece.rows.num_rows, ROWS_A_GROUP):
                group = self._group(piece, slice(start, start + ROWS_A_GROUP))
                file.write_table(group)
                self.memory_bytes += group.nbytes
        data = sink.getvalue()
        self._destination.write_bytes(_parquet_name(self._pieces, piece.index), data)
        self.num_bytes += len(data)

    def _group(self, piece: Piece, places: slice) -> pa.Table:
        rows = piece.rows[places]
        cells = [
            {"bytes": picture, "path": f"{row_id}{self._suffix}"}
            for row_id, picture in zip(rows["id"].to_pylist(), piece.pictures[places], strict=True)
        ]
        images = pa.array(cells, layout.IMAGE_COLUMN.type)
        return rows.add_column(0, layout.IMAGE_COLUMN.name, images)

    def close(self) -> None: ...


class WebDataset:
    """`train-00000.tar`: a file a piece, with `<id>.png` and `<id>.json` of each row."""

    def __init__(self, destination: Storage, suffix: str) -> None:
        self._destination = destination
        self._suffix = suffix
        self.num_bytes = 0

    def write(self, piece: Piece) -> None:
        data = tar_of(piece.rows, piece.pictures, self._suffix)
        self._destination.write_bytes(_tar_name(piece.index), data)
        self.num_bytes += len(data)

    def close(self) -> None: ...


class ImageFolder:
    """`train/<id>.png`, and `train/metadata.parquet` with all rows, which are in memory until then."""

    def __init__(self, destination: Storage, suffix: str) -> None:
        self._destination = destination
        self._suffix = suffix
        self._rows: list[pa.Table] = []
        self.num_bytes = 0

    def write(self, piece: Piece) -> None:
        names = [f"{row_id}{self._suffix}" for row_id in piece.rows["id"].to_pylist()]
        with ThreadPoolExecutor(THREADS) as pool:
            paths = [f"train/{name}" for name in names]
            list(pool.map(self._destination.write_bytes, paths, piece.pictures))
        self._rows.append(piece.rows.add_column(0, "file_name", pa.array(names, pa.string())))
        self.num_bytes += sum(map(len, piece.pictures))

    def close(self) -> None:
        sink = io.BytesIO()
        rows = pa.concat_tables(self._rows)
        pq.write_table(rows, sink, row_group_size=10_000, compression="zstd", write_page_index=True)
        data = sink.getvalue()
        self._destination.write_bytes(TABLE, data)
        self.num_bytes += len(data)


def _leaves(schema: pa.Schema) -> list[str]:
    """What Parquet calls the columns of a schema, e.g. `subjects.list.element`."""
    sink = io.BytesIO()
    pq.write_table(schema.empty_table(), sink)
    written = pq.ParquetFile(sink).schema
    return [written.column(i).path for i in range(len(written))]
