"""A dataset in a notebook: rows as tables, images by id, methods side by side."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from aae_batch.dataset.heatmap import heatmap
from aae_batch.dataset.reader import Dataset, attention_maps
from aae_batch.dataset.run_record import Shards
from aae_batch.errors import OutputError, shown
from aae_batch.store.open import open_storage

if TYPE_CHECKING:
    import numpy as np
    import pandas

_PLACE = ["id", "shard", "file_name", "status", "error"]
_INDEX = ["id", "prompt", "seed", "method", "status", "shard"]
_THUMBNAILS = 6
_THUMBNAIL_SIDE = 128
_NAMED = 10
"""Number of seeds or subjects that an error lists."""


def open_dataset(root: str | os.PathLike[str], s3_endpoint: str | None = None) -> OpenDataset:
    """Open a run's output, complete or not: a folder, `s3://bucket/prefix`, or another URL.

    Args:
        s3_endpoint: URL of an S3-compatible store. Default: `AWS_ENDPOINT_URL`, else AWS.

    Raises:
        OutputError: `root` contains no run, or cannot be read.
    """
    return OpenDataset(Dataset(open_storage(root, s3_endpoint)))


class OpenDataset:
    """The rows that were committed when the dataset was opened. Images are read on demand; the tables of
    the last shard used stay in memory.

    Args:
        dataset: also available as an attribute, for access by shard.

    Raises:
        OutputError: the dataset contains no run.
    """

    def __init__(self, dataset: Dataset) -> None:
        run = dataset.run
        if run is None:
            raise OutputError(f"There is no run in {dataset.storage.root}: check the path.")
        self.dataset = dataset
        self._planned = Shards.of(run)
        self._shards = dataset.shards()
        self._held: dict[str, tuple[int, pa.Table]] = {}

    def __len__(self) -> int:
        """Return the number of committed rows, computed from the shards without reading tables."""
        return sum(len(self._planned[shard]) for shard in self._shards)

    def rows(self, columns: list[str] | None = None) -> pa.Table:
        """Return the metadata of all rows in the manifest's order. Default: all columns except images."""
        return self.dataset.metadata(columns, self._shards)

    def to_pandas(self, columns: list[str] | None = None) -> pandas.DataFrame:
        """Return `rows` as a pandas DataFrame; pandas must be installed."""
        return self.rows(columns).to_pandas()

    def image(self, id: str) -> Image.Image:
        """Return the image of a row.

        Raises:
            OutputError: the row does not exist, has no image, or its image cannot be read.
        """
        row = self._row(id)
        if row["status"] == "failed":
            raise OutputError(f"Row {id} has no image: {row['error']}")
        return self.dataset.image(row)

    def attention(self, id: str) -> pa.Table:
        """Return the attention table of a row, with one row per subject.

        Raises:
            OutputError: the row does not exist.
        """
        table = self._of_shard("attention", self._shard_of(id))
        return table.filter(pc.equal(table["id"], id))

    def maps(self, id: str, subject: str | int) -> tuple[list[int], np.ndarray]:
        """Return the attention to a subject over time: the steps, counted from 0, and its map at each as
        probabilities, float32 [steps, height, width]. A run without `--attention-maps every:N` kept the
        last step's alone.

        Args:
            subject: its words (the first match if they repeat), or its index among the subjects, from 0.

        Raises:
            OutputError: the row or subject does not exist.
        """
        return attention_maps(self._seen(id, subject))

    def heatmap(self, id: str, subject: str | int, step: int | None = None) -> Image.Image:
        """Return the image overlaid with the attention to a subject, the largest in the lightest colour.

        Args:
            subject: as for `maps`.
            step: one of the steps of `maps`. Default: the last.

        Raises:
            OutputError: the row, subject or map does not exist, or the row has no image.
        """
        steps, maps = self.maps(id, subject)
        if step is None:
            step = steps[-1]
        if step not in steps:
            raise OutputError(
                f"Row {id} has no map of step {step}, only of {', '.join(map(str, steps))}: a run keeps "
                "more with --attention-maps every:N."
            )
        return heatmap(self.image(id), maps[steps.index(step)])

    def _seen(self, id: str, subject: str | int) -> dict[str, Any]:
        """Return a row of the attention table."""
        seen = self.attention(id).to_pylist()
        for place, row in enumerate(seen):
            if subject in (place, row["subject"]):
                return row
        subjects = [row["subject"] for row in seen[:_NAMED]]
        names = f"its subjects are {', '.join(map(repr, subjects))}" if seen else "it has none"
        raise OutputError(f"Row {id} has no subject {shown(subject)}: {names}.")

    def compare(self, prompt: str, seed: int) -> Comparison:
        """Return the images of a prompt from the same noise, one per method.

        Raises:
            OutputError: no row has this prompt and seed.
        """
        of_prompt = self._index.filter(pc.equal(self._index["prompt"], prompt))
        found = of_prompt.filter(pc.equal(of_prompt["seed"], seed)).to_pylist()
        if not found:
            seeds = of_prompt["seed"].unique().to_pylist()
            more = ", ..." if len(seeds) > _NAMED else ""
            raise OutputError(
                f"No row has the prompt {shown(prompt)} and the seed {seed}: its seeds are "
                f"{', '.join(map(str, seeds[:_NAMED]))}{more}."
                if seeds
                else f"No row has the prompt {shown(prompt)}: it must be the same to the letter."
            )
        times = Counter(row["method"] for row in found)
        comparison = Comparison(prompt, seed)
        for row in sorted(found, key=lambda row: (row["method"] or "", row["id"])):
            method = row["method"] or "unknown"
            label = method if times[row["method"]] == 1 else f"{method}, {row['id']}"
            if row["status"] == "failed":
                comparison.errors[label] = self._row(row["id"])["error"]
            else:
                comparison.images[label] = self.image(row["id"])
        return comparison

    def __repr__(self) -> str:
        return f"<{self.dataset.storage.root}: {len(self)} of {self._planned.rows} rows>"

    def _repr_html_(self) -> str:
        counts = self._index.group_by(["method", "status"]).aggregate([([], "count_all")])
        lines = sorted(
            (row["method"] or "", row["status"], row["count_all"]) for row in counts.to_pylist()
        )
        cells = "".join(
            f"<tr><td>{escape(method)}</td><td>{escape(status)}</td><td>{count}</td></tr>"
            for method, status, count in lines
        )
        return (
            f"<div><b>{escape(self.dataset.storage.root)}</b>, {len(self)} of {self._planned.rows} rows"
            f"<table><tr><th>method</th><th>status</th><th>rows</th></tr>{cells}</table>"
            f"{_figures(self._thumbnails())}</div>"
        )

    def _thumbnails(self) -> list[tuple[str, Image.Image]]:
        """Return prompts and thumbnails of the first images. All come from the first shard with images, so
        that only one shard is read; missing and damaged images are skipped."""
        ok = self._index.filter(pc.equal(self._index["status"], "ok"))
        rows = ok.slice(0, _THUMBNAILS).to_pylist()
        pictures = []
        for row in (row for row in rows if row["shard"] == rows[0]["shard"]):
            with suppress(OutputError):
                image = self.image(row["id"])
                image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
                pictures.append((row["prompt"], image))
        return pictures

    @cached_property
    def _index(self) -> pa.Table:
        """Id, prompt, seed, method, status and shard of all rows; reads every shard once."""
        return self.dataset.metadata(_INDEX, self._shards)

    def _shard_of(self, id: str) -> int:
        place = pc.index(self._index["id"], id).as_py()
        if place < 0:
            raise OutputError(
                f"There is no row {shown(id)} among the {len(self)} that are committed; "
                "rows(['id']) has their ids."
            )
        return self._index["shard"][place].as_py()

    def _row(self, id: str) -> dict[str, Any]:
        """Return the columns that locate a row's image, or say why it failed."""
        table = self._of_shard("metadata", self._shard_of(id))
        return table.slice(pc.index(table["id"], id).as_py(), 1).to_pylist()[0]

    def _of_shard(self, kind: str, shard: int) -> pa.Table:
        if kind not in self._held or self._held[kind][0] != shard:
            of = self.dataset
            read = of.attention_of(shard) if kind == "attention" else of.table(shard, _PLACE)
            self._held[kind] = (shard, read)
        return self._held[kind][1]


@dataclass(frozen=True)
class Comparison:
    """Images of one prompt from the same noise.

    Attributes:
        images: by method, or by "method, id" if a method has several rows.
        errors: the errors of failed rows, with the same keys.
    """

    prompt: str
    seed: int
    images: dict[str, Image.Image] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        errors = self.errors.items()
        failed = "".join(f"<p>{escape(label)} failed: {escape(why)}</p>" for label, why in errors)
        figures = _figures(self.images.items())
        return f"<div><b>{escape(self.prompt)}</b>, seed {self.seed}{figures}{failed}</div>"

    def _repr_png_(self) -> bytes | None:
        """Return the images side by side, in the order of `images`, as a PNG; None without images."""
        images = list(self.images.values())
        if not images:
            return None
        size = (sum(image.width for image in images), max(image.height for image in images))
        row = Image.new("RGB", size, "white")
        left = 0
        for image in images:
            row.paste(image, (left, 0))
            left += image.width
        return _png(row)


def _figures(pictures: Iterable[tuple[str, Image.Image]]) -> str:
    figures = "".join(
        '<figure style="display: inline-block; margin: 4px; vertical-align: top">'
        f'<img src="data:image/png;base64,{base64.b64encode(_png(image)).decode()}">'
        f'<figcaption style="max-width: {image.width}px">{escape(label)}</figcaption></figure>'
        for label, image in pictures
    )
    return f"<div>{figures}</div>"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
