"""The export formats. Each writes parts, which are rows with their images, as one file or many."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.dataset import layout
from aae_batch.dataset.webdataset import tar_of
from aae_batch.errors import OutputError, SettingsError
from aae_batch.manifest.row import is_safe_id
from aae_batch.store.base import Storage

FORMATS = ("hf", "parquet", "webdataset", "imagefolder")

CARD = "README.md"
SAMPLES = "samples.png"
TABLE = "train/metadata.parquet"
"""The table of an image folder."""

ROWS_A_GROUP = 100
"""Rows per Parquet row group: what a reader must fetch to get one image."""

MOST_PARQUET_FILES = 100_000
"""Hugging Face's `datasets` finds only names with five digits."""

THREADS = 8
"""Concurrent writes in formats with one file per image."""


@dataclass(frozen=True)
class Part:
    """Rows and their encoded images, in the same order. `index` counts parts from 0."""

    index: int
    rows: pa.Table
    pictures: Sequence[bytes]


class Format(Protocol):
    """Writes parts to a destination."""

    def write(self, part: Part) -> None: ...

    def close(self) -> None:
        """Write what has to wait for the last part."""


def open_format(
    name: str, destination: Storage, parts: int, suffix: str, schema: pa.Schema
) -> Format:
    """Return the writer of the format `name`.

    Args:
        parts: the number of parts that will be written.
        suffix: of image files, including the dot.
        schema: of the parts' rows.

    Raises:
        SettingsError: readers would not find that many parts.
    """
    if name == "imagefolder":
        return ImageFolder(destination, suffix)
    if name == "webdataset":
        return WebDataset(destination, suffix)
    return Parquet(destination, parts, suffix, schema)


def files_of(format: str, parts: int, suffix: str, names: Iterable[str]) -> set[str]:
    """Return those of `names` that an export can have written, besides its card and samples.

    Args:
        format, parts, suffix: as in `open_format`.
    """
    if format == "imagefolder":
        ids = {name: name.removeprefix("train/").removesuffix(suffix) for name in names}
        pictures = {
            name for name, id in ids.items() if is_safe_id(id) and name == f"train/{id}{suffix}"
        }
        return pictures | ({TABLE} & {*names})
    name_of = _tar_name if format == "webdataset" else partial(_parquet_name, parts)
    return {*names} & {*map(name_of, range(parts))}


def _tar_name(index: int) -> str:
    return f"train-{index:05d}.tar"


def _parquet_name(parts: int, index: int) -> str:
    return f"data/train-{index:05d}-of-{parts:05d}.parquet"


class Parquet:
    """`data/train-00000-of-00005.parquet`: one file per part, with a column `image`.

    Attributes:
        num_bytes: written so far.
        memory_bytes: size of the rows in Arrow's format, which Hugging Face calls the dataset size.
    """

    def __init__(self, destination: Storage, parts: int, suffix: str, schema: pa.Schema) -> None:
        if parts > MOST_PARQUET_FILES:
            raise SettingsError(
                f"Of {parts:,} Parquet files the library datasets would find only the first "
                f"{MOST_PARQUET_FILES:,}: give larger --rows-per-file."
            )
        self._destination = destination
        self._parts = parts
        self._suffix = suffix
        self.num_bytes = 0
        self.memory_bytes = 0
        image = pa.field(layout.IMAGE_COLUMN.name, layout.IMAGE_COLUMN.type)
        self.schema = pa.schema([image, *schema], metadata=layout.HUGGING_FACE)
        # Images are already compressed and unique: no compression or dictionary for them.
        others = [leaf for leaf in _leaves(self.schema) if leaf != f"{image.name}.bytes"]
        self._options = {"compression": dict.fromkeys(others, "zstd"), "use_dictionary": others}

    def write(self, part: Part) -> None:
        """Write a part. Memory holds its images twice: in the part and in the file."""
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, self.schema, write_page_index=True, **self._options) as file:
            for start in range(0, part.rows.num_rows, ROWS_A_GROUP):
                group = self._group(part, slice(start, start + ROWS_A_GROUP))
                file.write_table(group)
                self.memory_bytes += group.nbytes
        data = sink.getvalue()
        self._destination.write_bytes(_parquet_name(self._parts, part.index), data)
        self.num_bytes += len(data)

    def _group(self, part: Part, places: slice) -> pa.Table:
        rows = part.rows[places]
        cells = [
            {"bytes": picture, "path": f"{row_id}{self._suffix}"}
            for row_id, picture in zip(rows["id"].to_pylist(), part.pictures[places], strict=True)
        ]
        images = pa.array(cells, layout.IMAGE_COLUMN.type)
        return rows.add_column(0, layout.IMAGE_COLUMN.name, images)

    def close(self) -> None: ...


@dataclass
class WebDataset:
    """`train-00000.tar`: one file per part, with `<id>.png` and `<id>.json` for each row."""

    destination: Storage
    suffix: str

    def write(self, part: Part) -> None:
        data = tar_of(part.rows, part.pictures, self.suffix)
        self.destination.write_bytes(_tar_name(part.index), data)

    def close(self) -> None: ...


@dataclass
class ImageFolder:
    """`train/<id>.png`, and `train/metadata.parquet` with all rows, which stay in memory until `close`."""

    destination: Storage
    suffix: str
    rows: list[pa.Table] = field(default_factory=list)
    taken: dict[str, str] = field(default_factory=dict)

    def write(self, part: Part) -> None:
        """Write a part.

        Raises:
            OutputError: two images would be one file.
        """
        names = [f"{row_id}{self.suffix}" for row_id in part.rows["id"].to_pylist()]
        with ThreadPoolExecutor(THREADS) as pool:
            paths = [f"train/{name}" for name in names]
            list(pool.map(self.destination.write_bytes, paths, part.pictures))
        is_one = self.destination.exists(paths[0].upper())  # on a disk that does not tell case
        for name in names if is_one else ():
            if (other := self.taken.setdefault(name.lower(), name)) != name:
                raise OutputError(
                    f"{other} and {name} are one file on the disk of {self.destination.root}: choose another "
                    "format, or leave one out with --where."
                )
        self.rows.append(part.rows.add_column(0, "file_name", pa.array(names, pa.string())))

    def close(self) -> None:
        sink = io.BytesIO()
        rows = pa.concat_tables(self.rows)
        pq.write_table(rows, sink, row_group_size=10_000, compression="zstd", write_page_index=True)
        self.destination.write_bytes(TABLE, sink.getvalue())


def _leaves(schema: pa.Schema) -> list[str]:
    """Return Parquet's paths of the leaf columns of a schema, e.g. `subjects.list.element`."""
    sink = io.BytesIO()
    pq.write_table(schema.empty_table(), sink)
    written = pq.ParquetFile(sink).schema
    return [written.column(i).path for i in range(len(written))]
