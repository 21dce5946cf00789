"""What a metric is, and how the pictures of a shard are scored by one."""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from aae_batch.dataset import layout
from aae_batch.dataset.reader import Dataset
from aae_batch.errors import OutputError
from aae_batch.store.base import Storage

READERS = 8
"""Pictures of a batch that are read at a time."""


@dataclass(frozen=True)
class Loaded:
    """Where a metric's models are, and in which precision, e.g. `cuda` and `float16`; no precision
    where there are no models."""

    device: str = "cpu"
    dtype: str | None = None

    @classmethod
    def of(cls, model: Any) -> Loaded:
        """As a model of torch says it."""
        return cls(str(model.device.type), str(model.dtype).removeprefix("torch."))


Row = Mapping[str, Any]
Attention = Mapping[str, Sequence[Row]]
"""Of each row's id: its rows of the attention table, with the columns that the metric names."""


class Metric(Protocol):
    """Scores pictures. Instances travel to the actors by pickling, before they are loaded."""

    @property
    def columns(self) -> tuple[pa.Field, ...]:
        """Of its table, after `id` and `sha256`."""

    @property
    def sees_images(self) -> bool:
        """Whether it needs the pictures, and not only the tables."""

    @property
    def attention_columns(self) -> tuple[str, ...]:
        """Of the attention table, those that it needs besides `id`; none where it does not need it."""

    @property
    def models(self) -> tuple[str, ...]:
        """The models that it loads, as a person names them."""

    def settings(self) -> dict[str, Any]:
        """What its scores depend on besides the pictures, the models' weights and the precision."""

    def load(self, device: str, dtype: str) -> Loaded:
        """Load its models.

        Raises:
            ModelError: there is no such model, or it is of another kind.
            SettingsError: device or dtype is unknown or not available.
        """

    def score(
        self, rows: Sequence[Row], images: Sequence[Image.Image], attention: Attention
    ) -> list[dict[str, Any]]:
        """The values of its columns for each row.

        Args:
            rows: of the metadata table, all of pictures that are there.
            images: theirs, in RGB; none where the metric does not see them.
        """


def column(name: str, kind: pa.DataType, description: str) -> pa.Field:
    """A column of a metric's table."""
    return pa.field(name, kind, metadata={"description": description})


def schema(metric: Metric) -> pa.Schema:
    """Of the metric's tables."""
    return pa.schema([*layout.SCORED_COLUMNS, *metric.columns])


def score_rows(
    dataset: Dataset,
    shard: int,
    places: range,
    metric: Metric,
    batch_size: int,
    turn: AbstractContextManager[Any] | None = None,
    said: Callable[[int], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Score the pictures of some rows of a shard, which rows without one are left out of.

    Args:
        places: of the rows in the shard.
        turn: held while the metric is at work, so that others read meanwhile.
        said: is told after each batch how many rows that were.

    Raises:
        OutputError: a picture cannot be read, or is another than its row says.
    """
    table = dataset.table(shard).slice(places.start, len(places))
    attention = _attention(dataset, shard, metric)
    rows = [row for row in table.to_pylist() if row["status"] == "ok"]
    said(table.num_rows - len(rows))
    scored: list[dict[str, Any]] = []
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            images = _images(dataset, batch, pool) if metric.sees_images else []
            with turn or nullcontext():
                scores = metric.score(batch, images, attention)
            scored += [_named(row) | score for row, score in zip(batch, scores, strict=True)]
            said(len(batch))
    return scored


def unscored(dataset: Dataset, shard: int, place: int, metric: Metric) -> list[dict[str, Any]]:
    """The row of a picture that could not be scored: all null."""
    (row,) = dataset.table(shard, ["id", "sha256", "status"]).slice(place, 1).to_pylist()
    if row["status"] != "ok":
        return []
    return [_named(row) | {column.name: None for column in metric.columns}]


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
        fingerprint: of the metric's run.
        unscored: ids of those that could not be scored.
    """
    sink = io.BytesIO()
    marks = {
        layout.SCORES_FINGERPRINT: fingerprint,
        layout.SCORES_UNSCORED: json.dumps([*unscored]),
    }
    table = pa.Table.from_pylist(list(rows), schema=schema(metric).with_metadata(marks))
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    storage.write_bytes(layout.metric_name(name, shard), sink.getvalue())


def _attention(dataset: Dataset, shard: int, metric: Metric) -> Attention:
    seen: dict[str, list[Row]] = defaultdict(list)
    if metric.attention_columns:
        table = dataset.attention_of(shard, ["id", *metric.attention_columns])
        for entry in table.to_pylist():
            seen[entry["id"]].append(entry)
    return seen


def _named(row: Row) -> dict[str, Any]:
    return {column.name: row[column.name] for column in layout.SCORED_COLUMNS}


def _images(dataset: Dataset, rows: Sequence[Row], pool: ThreadPoolExecutor) -> list[Image.Image]:
    apart = all("#" not in (row["file_name"] or "#") for row in rows)
    read = pool.map if apart else map  # of a shard's one object, the dataset holds all pictures
    return list(read(lambda row: _image(dataset, row), rows))


def _image(dataset: Dataset, row: Row) -> Image.Image:
    data = dataset.image_bytes(row)
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise OutputError(
            f"The picture of row {row['id']} in {dataset.storage.root} is not the one that its "
            "metadata has the SHA-256 of: run `aae-batch verify --repair`, then generate it again."
        )
    return Image.open(io.BytesIO(data)).convert("RGB")
