"""A finished output becomes a dataset for others: chosen rows, in their format, with a card."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from aae_batch.dataset.image_format import ImageFormat
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.webdataset import json_columns
from aae_batch.errors import OutputError, SettingsError
from aae_batch.export.card import Facts, check_features, dataset_card, require_datasets
from aae_batch.export.condition import Condition
from aae_batch.export.destination import Marker, replace, replaceable
from aae_batch.export.formats import CARD, FORMATS, SAMPLES, THREADS, Piece, open_format
from aae_batch.export.samples import SAMPLES_SHOWN, samples_page
from aae_batch.export.scores import Scores
from aae_batch.export.selection import Best, Selection, choose
from aae_batch.store.base import Storage
from aae_batch.store.read_ahead import read_ahead

ROWS_PER_FILE = 1000
"""Some 400 MB of 512 x 512 PNG: what the hub likes a file to be, and what memory has room for."""

_LEFT_OUT = frozenset(
    ["status", "error_type", "error", "file_name", "seconds", "shard", "fingerprint"]
)
"""Columns that tell of the job, or of the places in its output, and not of a picture."""

_FIGURES = ("final_loss", "neglected", "num_refinements")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportSettings:
    """What is exported, and how.

    Attributes:
        format: `hf`, `parquet`, `webdataset` or `imagefolder`.
        where: only rows that this is true of.
        best: of each prompt, only the best of these.
        partial: take what is committed of an output that is not complete.
        force: replace an earlier export in the destination.
        license: for the card, as the hub spells it; None: left to the user.
        rows_per_file: of a Parquet file or a tar; memory holds so many pictures, up to two and a half times.

    Raises:
        SettingsError: a value is unknown or out of range, or needs a package that is missing.
    """

    format: str = "hf"
    where: Condition | None = None
    best: Best | None = None
    partial: bool = False
    force: bool = False
    license: str | None = None
    rows_per_file: int = ROWS_PER_FILE

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise SettingsError(f"--format {self.format}: choose one of {', '.join(FORMATS)}.")
        if self.rows_per_file < 1:
            raise SettingsError(f"--rows-per-file {self.rows_per_file}: give at least 1.")
        if self.format == "hf":
            require_datasets()


def export(
    dataset: Dataset,
    destination: Storage,
    settings: ExportSettings,
    choosing: Progress = lambda done, total: None,
    writing: Progress = lambda done, total: None,
) -> Selection:
    """Write the rows of `dataset` that `settings` choose to `destination`, the card last: where it is,
    the export is whole.

    Args:
        choosing, writing: are told how many shards are looked through, and then written.

    Raises:
        OutputError: the output is not complete, or cannot be read; the destination is not empty, or
            cannot be written, or another process is writing to it; no row is left.
        SettingsError: the settings do not fit the rows.
    """
    source = _opened(dataset, settings.partial)
    if settings.format == "hf":
        check_features(source.schema)
    replaceable(destination, settings.force)  # before it is looked through what there is to export
    selection = choose(
        dataset, source.shards, source.scores, settings.where, settings.best, choosing
    )
    if not len(selection):
        raise OutputError(
            f"No row of {dataset.storage.root} is left to export: {selection.failed} of "
            f"{selection.rows} have no picture, and --where leaves out {selection.refused}."
        )
    with _locked(destination):
        _write(source, selection, destination, settings, writing)
    return selection


@dataclass(frozen=True)
class _Source:
    """An output as it was when it was opened; a job may commit more meanwhile.

    Attributes:
        shards: those that are committed.
        planned: how many there are going to be.
        schema: of the exported rows.
    """

    dataset: Dataset
    run: dict[str, Any]
    shards: list[int]
    planned: int
    scores: Scores
    schema: pa.Schema


def _opened(dataset: Dataset, partial: bool) -> _Source:
    run = dataset.run
    root = dataset.storage.root
    if run is None:
        raise OutputError(f"There is no run in {root}: check the path.")
    shards = dataset.shards()
    planned = -(-run["rows"] // run["shard_size"])
    there = f"{len(shards)} of {planned} shards are there"
    if not partial and (len(shards) < planned or dataset.summary is None):
        raise OutputError(
            f"{root} is not complete, {there}: finish it by the command that began it, or export what "
            "there is with --partial."
        )
    if not shards:
        raise OutputError(f"Nothing of {root} can be exported yet, {there}: wait for the first.")
    first = dataset.table(shards[0])
    scores = Scores(dataset, first.column_names)
    schema = _exported(scores.beside(first, shards[0])).schema
    return _Source(dataset, run, shards, planned, scores, schema)


def _write(
    source: _Source,
    selection: Selection,
    destination: Storage,
    settings: ExportSettings,
    progress: Progress,
) -> None:
    suffix = ImageFormat(**source.run["image_format"]).suffix
    pieces = -(-len(selection) // settings.rows_per_file)
    written = open_format(settings.format, destination, pieces, suffix, source.schema)
    earlier = replaceable(destination, settings.force)
    replace(destination, earlier, Marker(settings.format, pieces, suffix))
    seen = _Seen(len(selection), source.scores)
    for piece in _pieces(source, selection, settings.rows_per_file, progress):
        written.write(piece)
        seen.add(piece)
        del piece  # memory is for one piece, not for the next as well
    written.close()
    destination.write_bytes(SAMPLES, samples_page(seen.samples))
    described = source.schema
    if settings.format == "webdataset":
        described = _in_json(source.schema, selection)
    facts = Facts(
        title=destination.root.rstrip("/").rpartition("/")[2],
        run=source.run,
        shards=(len(source.shards), source.planned),
        selection=selection,
        schema=described,
        scored=source.scores.of_metrics,
        figures=pa.concat_tables(seen.figures),
    )
    card = dataset_card(facts, settings, written)
    destination.write_bytes(CARD, str(card).encode())


def _in_json(schema: pa.Schema, selection: Selection) -> pa.Schema:
    """The columns that JSON has values for; the others are noted."""
    names = json_columns(schema)
    selection.notes += [
        f"The column {column.name} is left out, since JSON has no values of its type, {column.type}."
        for column in schema
        if column.name not in names
    ]
    return pa.schema([schema.field(name) for name in names])


def _locked(destination: Storage) -> AbstractContextManager[object]:
    """The destination, with nobody else writing to it. That of the hub is not locked: each sign of
    life would be a commit."""
    is_hub = destination.root.startswith("hf://")
    return nullcontext() if is_hub else destination.writing()


def _pieces(
    source: _Source, selection: Selection, size: int, progress: Progress
) -> Iterator[Piece]:
    """The chosen rows with their scores and pictures, `size` a piece and fewer in the last."""
    held: list[pa.Table] = []
    pictures: list[bytes] = []
    index = 0
    chosen = {shard: places for shard, places in selection.places.items() if len(places)}

    def read(shard: int) -> pa.Table:
        rows = source.scores.beside(source.dataset.table(shard), shard)
        return rows.take(chosen[shard])

    for done, rows in enumerate(read_ahead(read, chosen)):
        start = 0
        while start < rows.num_rows:
            part = rows.slice(start, size - len(pictures))
            start += part.num_rows
            held.append(_exported(part))
            pictures += _pictures(source.dataset, part)
            if len(pictures) == size:
                yield Piece(index, pa.concat_tables(held).combine_chunks(), pictures)
                index += 1
                held, pictures = [], []
        progress(done + 1, len(chosen))
    if pictures:
        yield Piece(index, pa.concat_tables(held).combine_chunks(), pictures)


def _exported(rows: pa.Table) -> pa.Table:
    return rows.drop_columns([name for name in rows.column_names if name in _LEFT_OUT])


def _pictures(dataset: Dataset, rows: pa.Table) -> list[bytes]:
    """The pictures of rows of one shard, each held against its checksum."""
    described = rows.select(["id", "shard", "file_name", "sha256"]).to_pylist()
    if all(row["file_name"] is not None and "#" not in row["file_name"] for row in described):
        with ThreadPoolExecutor(THREADS) as pool:
            pictures = list(pool.map(dataset.image_bytes, described))
    else:
        pictures = [dataset.image_bytes(row) for row in described]
    for row, picture in zip(described, pictures, strict=True):
        if hashlib.sha256(picture).hexdigest() != row["sha256"]:
            raise OutputError(
                f"The picture of row {row['id']} is not the one that was made: see what "
                f"`aae-batch verify {dataset.storage.root}` says."
            )
    return pictures


class _Seen:
    """What the card shows of the rows that go by: the figures of all, and pictures that are evenly
    spaced over them."""

    def __init__(self, rows: int, scores: Scores) -> None:
        self.samples: list[tuple[dict, bytes]] = []
        self.figures: list[pa.Table] = []
        self._scores = scores
        self._places = np.unique(np.linspace(0, rows - 1, SAMPLES_SHOWN).round().astype(np.int64))
        self._rows = 0

    def add(self, piece: Piece) -> None:
        averaged = [name for name in self._scores.names if _has_mean(piece.rows[name].type)]
        self.figures.append(piece.rows.select(["method", *_FIGURES, *averaged]))
        places = self._places - self._rows
        places = places[(places >= 0) & (places < piece.rows.num_rows)]
        described = piece.rows.select(["prompt", "method", "seed"]).take(places).to_pylist()
        self.samples += zip(described, (piece.pictures[i] for i in places), strict=True)
        self._rows += piece.rows.num_rows


def _has_mean(kind: pa.DataType) -> bool:
    return pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
