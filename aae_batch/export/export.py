"""A finished output becomes a dataset for others: chosen rows, in their format, with a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import pyarrow as pa

from aae_batch.dataset.image_format import ImageFormat
from aae_batch.dataset.pictures import checked_bytes, read_pictures
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.webdataset import json_columns
from aae_batch.errors import OutputError
from aae_batch.export.card import Facts, check_features, dataset_card
from aae_batch.export.destination import Marker, replace, replaceable
from aae_batch.export.formats import CARD, SAMPLES, Part, open_format
from aae_batch.export.samples import SAMPLES_SHOWN, samples_page
from aae_batch.export.selection import Selection, choose
from aae_batch.export.settings import ExportSettings
from aae_batch.export.source import Source, exported, open_source
from aae_batch.store.base import Storage
from aae_batch.store.read_ahead import read_ahead

_FIGURES = ("final_loss", "neglected", "num_refinements")

OnProgress = Callable[[int, int], None]


def export(
    dataset: Dataset,
    destination: Storage,
    settings: ExportSettings,
    choosing: OnProgress = lambda done, total: None,
    writing: OnProgress = lambda done, total: None,
) -> Selection:
    """Write the rows of `dataset` that `settings` choose to `destination`, the card last: where it is,
    the export is whole.

    Args:
        choosing, writing: get how many shards of how many are looked through, and then written.

    Raises:
        OutputError: the output is not complete, or cannot be read; the destination is not empty, or
            cannot be written, or another process is writing to it; no row is left.
        SettingsError: the settings do not fit the rows.
    """
    source = open_source(dataset, settings.partial)
    if settings.format == "hf":
        check_features(source.schema)
    replaceable(destination, settings.force)  # before it is looked through what there is to export
    selection = choose(source, settings.where, settings.best, choosing)
    if not len(selection):
        raise OutputError(
            f"No row of {dataset.storage.root} is left to export: {selection.failed} of "
            f"{selection.rows} have no picture, and --where leaves out {selection.refused}."
        )
    with _locked(destination):
        _write(source, selection, destination, settings, writing)
    return selection


def _write(
    source: Source,
    selection: Selection,
    destination: Storage,
    settings: ExportSettings,
    on_progress: OnProgress,
) -> None:
    suffix = ImageFormat(**source.run["image_format"]).suffix
    parts = -(-len(selection) // settings.rows_per_file)
    written = open_format(settings.format, destination, parts, suffix, source.schema)
    earlier = replaceable(destination, settings.force)
    replace(destination, earlier, Marker(settings.format, parts, suffix))
    seen = _Seen(len(selection), source.scores.names)
    for part in _parts(source, selection, settings.rows_per_file, on_progress):
        written.write(part)
        seen.add(part)
        del part  # memory is for one part, not for the next as well
    written.close()
    destination.write_bytes(SAMPLES, samples_page(seen.samples))
    schema = source.schema
    if settings.format == "webdataset":
        schema = _in_json(schema, selection)
    title = destination.root.rstrip("/").rpartition("/")[2]
    facts = Facts(title, source, selection, schema, pa.concat_tables(seen.figures))
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


def _parts(
    source: Source, selection: Selection, size: int, on_progress: OnProgress
) -> Iterator[Part]:
    """The chosen rows with their scores and pictures, `size` a part and fewer in the last."""
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
            rest = rows.slice(start, size - len(pictures))
            start += rest.num_rows
            held.append(exported(rest))
            described = rest.select(["id", "shard", "file_name", "sha256"]).to_pylist()
            pictures += read_pictures(described, partial(checked_bytes, source.dataset))
            if len(pictures) == size:
                yield Part(index, pa.concat_tables(held).combine_chunks(), pictures)
                index += 1
                held, pictures = [], []
        on_progress(done + 1, len(chosen))
    if pictures:
        yield Part(index, pa.concat_tables(held).combine_chunks(), pictures)


class _Seen:
    """What the card shows of the rows that go by: the figures of all, and pictures that are evenly
    spaced over them."""

    def __init__(self, rows: int, scored: Sequence[str]) -> None:
        self.samples: list[tuple[dict, bytes]] = []
        self.figures: list[pa.Table] = []
        self._scored = scored
        self._places = np.unique(np.linspace(0, rows - 1, SAMPLES_SHOWN).round().astype(np.int64))
        self._rows = 0

    def add(self, part: Part) -> None:
        averaged = [name for name in self._scored if _has_mean(part.rows[name].type)]
        self.figures.append(part.rows.select(["method", *_FIGURES, *averaged]))
        places = self._places - self._rows
        places = places[(places >= 0) & (places < part.rows.num_rows)]
        described = part.rows.select(["prompt", "method", "seed"]).take(places).to_pylist()
        self.samples += zip(described, (part.pictures[i] for i in places), strict=True)
        self._rows += part.rows.num_rows


def _has_mean(kind: pa.DataType) -> bool:
    return pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
