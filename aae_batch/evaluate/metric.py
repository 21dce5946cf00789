"""The metric interface, and scoring the images of a shard."""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from aae_batch.dataset import layout
from aae_batch.dataset.pictures import checked_bytes, read_pictures
from aae_batch.dataset.reader import Dataset
from aae_batch.job.records import Loaded
from aae_batch.store.base import Storage

MetadataRow = Mapping[str, Any]
Attention = Mapping[str, Sequence[Mapping[str, Any]]]
"""Row id -> its rows of the attention table, with the metric's `attention_columns`."""


class Metric(ABC):
    """Scores images. Instances are pickled to the workers before `load`.

    Attributes:
        columns: columns of its table, after `id` and `sha256`.
        sees_images: whether it needs the images, not only the tables.
        attention_columns: columns of the attention table that it needs, besides `id`.
        short: other names of columns in expressions, where the metric's name stands before them:
            `clip.min_subject`.
        best_by: the column by which one picture is better than another.
    """

    columns: ClassVar[tuple[pa.Field, ...]]
    sees_images: ClassVar[bool] = True
    attention_columns: ClassVar[tuple[str, ...]] = ()
    short: ClassVar[Mapping[str, str]] = {}
    best_by: ClassVar[str]

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that it loads, as given in the settings."""
        return ()

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what scores depend on, besides the images, the models' weights and the precision."""

    def load(self, device: str, dtype: str) -> Loaded:
        """Load the models.

        Raises:
            ModelError: a model does not exist or is of the wrong kind.
            SettingsError: device or dtype is unknown or not available.
        """
        return Loaded()

    @abstractmethod
    def score(
        self, rows: Sequence[MetadataRow], images: Sequence[Image.Image], attention: Attention
    ) -> list[dict[str, Any]]:
        """Return the values of the metric's columns for each row.

        Args:
            rows: rows of the metadata table with status ok.
            images: their images, in RGB; empty if `sees_images` is False.
        """


def score_rows(
    dataset: Dataset,
    shard: int,
    places: range,
    metric: Metric,
    batch_size: int,
    turn: AbstractContextManager[Any] | None = None,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Score the images of some rows of a shard, skipping rows without an image.

    Args:
        places: positions of the rows in the shard.
        turn: a lock held while the metric runs, so that other threads can read images meanwhile.
        on_progress: called after each batch with its number of rows.

    Raises:
        OutputError: an image cannot be read, or does not match its row's SHA-256.
    """
    table = dataset.table(shard).slice(places.start, len(places))
    attention = _attention(dataset, shard, metric)
    rows = [row for row in table.to_pylist() if row["status"] == "ok"]

    def read(row: MetadataRow) -> Image.Image:
        return Image.open(io.BytesIO(checked_bytes(dataset, row))).convert("RGB")

    on_progress(table.num_rows - len(rows))
    scored: list[dict[str, Any]] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        images = list(read_pictures(batch, read)) if metric.sees_images else []
        with turn or nullcontext():
            scores = metric.score(batch, images, attention)
        scored += [_key(row) | score for row, score in zip(batch, scores, strict=True)]
        on_progress(len(batch))
    return scored


def unscored(dataset: Dataset, shard: int, place: int, metric: Metric) -> list[dict[str, Any]]:
    """Return the all-null scores of an image that could not be scored, or no row if it has no image."""
    (row,) = dataset.table(shard, ["id", "sha256", "status"]).slice(place, 1).to_pylist()
    if row["status"] != "ok":
        return []
    return [_key(row) | {column.name: None for column in metric.columns}]


def write_scores(
    storage: Storage,
    name: str,
    metric: Metric,
    shard: int,
    rows: Sequence[dict[str, Any]],
    fingerprint: str,
    unscored: Sequence[str] = (),
) -> None:
    """Write the scores of a whole shard, in the order of its metadata.

    Args:
        fingerprint: fingerprint of the metric's run.
        unscored: ids of images that could not be scored.
    """
    sink = io.BytesIO()
    marks = {
        layout.SCORES_FINGERPRINT: fingerprint,
        layout.SCORES_UNSCORED: json.dumps([*unscored]),
    }
    schema = pa.schema([*layout.SCORED_COLUMNS, *metric.columns], metadata=marks)
    table = pa.Table.from_pylist(list(rows), schema=schema)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    storage.write_bytes(layout.metric_name(name, shard), sink.getvalue())


def _attention(dataset: Dataset, shard: int, metric: Metric) -> Attention:
    seen: dict[str, list[dict[str, Any]]] = defaultdict(list)
    if metric.attention_columns:
        table = dataset.attention_of(shard, ["id", *metric.attention_columns])
        for entry in table.to_pylist():
            seen[entry["id"]].append(entry)
    return seen


def _key(row: MetadataRow) -> dict[str, Any]:
    return {column.name: row[column.name] for column in layout.SCORED_COLUMNS}
