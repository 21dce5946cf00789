"""Export an output: selected rows in another format, with a dataset card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import pyarrow as pa

from aae_batch.dataset.image_format import ImageFormat
from aae_batch.dataset.pictures import checked_bytes, read_pictures
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.run_record import own_columns
from aae_batch.dataset.webdataset import json_columns
from aae_batch.errors import OutputError
from aae_batch.export.card import Facts, dataset_card
from aae_batch.export.destination import Marker, replace, replaceable
from aae_batch.export.formats import CARD, SAMPLES, Part, open_format
from aae_batch.export.samples import SAMPLES_SHOWN, samples_page
from aae_batch.export.selection import Selection, choose
from aae_batch.export.settings import ExportSettings
from aae_batch.export.source import Source, exported, open_source
from aae_batch.store.base import Storage
from aae_batch.store.read_ahead import read_ahead

_FIGURES = ("final_loss", "neglected", "num_refinements", "forwards")

OnProgress = Callable[[int, int], None]


def export(
    dataset: Dataset,
    destination: Storage,
    settings: ExportSettings,
    choosing: OnProgress = lambda done, total: None,
    writing: OnProgress = lambda done, total: None,
) -> Selection:
    """Write the rows of `dataset` that `settings` select to `destination`.

    The card is written last: an export that has one is complete.

    Args:
        choosing, writing: called with (done, total) shards while selecting and while writing.

    Raises:
        OutputError: the output is incomplete or unreadable; the destination is not empty, cannot be
            written, or has another writer; or no row is selected.
        SettingsError: the settings do not fit the rows.
    """
    source = open_source(dataset, settings.partial)
    replaceable(destination, settings.force)  # fail before reading the tables
    selection = choose(source, settings.where, settings.best, settings.ids, choosing)
    if not len(selection):
        reasons = [f"{selection.failed} of {selection.rows} have no image"]
        if settings.where is not None:
            reasons.append(f"--where leaves out {selection.refused}")
        if settings.ids is not None:
            reasons.append(f"--ids leaves out {selection.unlisted}")
        raise OutputError(
            f"No row of {dataset.storage.root} is left to export: {', '.join(reasons)}."
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
    seen = _Seen(len(selection), source)
    for part in _parts(source, selection, settings.rows_per_file, on_progress):
        written.write(part)
        seen.add(part)
        del part  # so that memory never holds two parts
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
    """Return the columns that JSON can represent, and note the others in `selection`."""
    names = json_columns(schema)
    selection.notes += [
        f"The column {column.name} is left out, since JSON has no values of its type, {column.type}."
        for column in schema
        if column.name not in names
    ]
    return pa.schema([schema.field(name) for name in names])


def _locked(destination: Storage) -> AbstractContextManager[object]:
    """Lock the destination against other writers, except on the hub, where every renewal of the lock
    would be a commit."""
    is_hub = destination.root.startswith("hf://")
    return nullcontext() if is_hub else destination.writing()


def _parts(
    source: Source, selection: Selection, size: int, on_progress: OnProgress
) -> Iterator[Part]:
    """Yield the selected rows with their scores and images, `size` per part, fewer in the last."""
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
    """Collects what the card shows while rows pass by: the figures of all of them, and evenly spaced
    sample images."""

    def __init__(self, rows: int, source: Source) -> None:
        self.samples: list[tuple[dict, bytes]] = []
        self.figures: list[pa.Table] = []
        self._scored = source.scores.names
        self._own = own_columns(source.run, _FIGURES)
        self._places = np.unique(np.linspace(0, rows - 1, SAMPLES_SHOWN).round().astype(np.int64))
        self._rows = 0

    def add(self, part: Part) -> None:
        averaged = [name for name in self._scored if _has_mean(part.rows[name].type)]
        own = [name for name in self._own if name in part.rows.column_names]
        self.figures.append(part.rows.select(["method", *own, *averaged]))
        places = self._places - self._rows
        places = places[(places >= 0) & (places < part.rows.num_rows)]
        described = part.rows.select(["prompt", "method", "seed"]).take(places).to_pylist()
        self.samples += zip(described, (part.pictures[i] for i in places), strict=True)
        self._rows += part.rows.num_rows


def _has_mean(kind: pa.DataType) -> bool:
    return pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
