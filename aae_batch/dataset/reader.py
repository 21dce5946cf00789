"""Open what a run wrote."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from aae_batch.dataset import layout
from aae_batch.dataset.storage import Storage, open_storage
from aae_batch.errors import OutputError


class Dataset:
    """A dataset at an output root, complete or not.

    Args:
        root: the output root, or its storage.
    """

    def __init__(self, root: str | os.PathLike[str] | Storage) -> None:
        is_path = isinstance(root, (str, PurePath))
        self.storage: Storage = open_storage(root) if is_path else root  # type: ignore[arg-type,assignment]

    @property
    def run(self) -> dict[str, Any] | None:
        """What `run.json` says; None where nothing was begun.

        Raises:
            OutputError: it is not readable.
        """
        return self._json(layout.RUN)

    @property
    def summary(self) -> dict[str, Any] | None:
        """What `summary.json` says; None while the dataset is not complete."""
        return self._json(layout.SUMMARY)

    def shards(self) -> list[int]:
        """The shards that are committed, in order."""
        found = (layout.shard_of(name) for name in self.storage.list(layout.METADATA))
        return sorted(shard for shard in found if shard is not None)

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The metadata of each committed shard, in order."""
        for shard in self.shards():
            yield self._table(layout.metadata_name(shard), columns)

    def metadata(self) -> pa.Table:
        """The metadata of all committed shards, in the manifest's order."""
        return pa.concat_tables(self.tables()) if self.shards() else pa.table({})

    def attention(self) -> pa.Table:
        """The attention rows of all committed shards."""
        names = (layout.attention_name(shard) for shard in self.shards())
        tables = [self._table(name) for name in names]
        return pa.concat_tables([layout.ATTENTION_SCHEMA.empty_table(), *tables])

    def image(self, file_name: str) -> Image.Image:
        """A picture, by the `file_name` of its metadata row."""
        return Image.open(io.BytesIO(self.storage.read_bytes(file_name)))

    def _table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return pq.read_table(pa.BufferReader(self.storage.read_bytes(name)), columns=columns)

    def _json(self, name: str) -> dict[str, Any] | None:
        if not self.storage.exists(name):
            return None
        try:
            return json.loads(self.storage.read_bytes(name))
        except ValueError as error:
            raise OutputError(f"{self.storage.place(name)} is not JSON: {error}.") from error


def attention_map(row: dict[str, Any]) -> np.ndarray:
    """The map of a row of the attention table as probabilities: float32 [height, width]."""
    values = np.frombuffer(row["map"], np.uint8).reshape(row["map_height"], row["map_width"])
    return values.astype(np.float32) * (row["map_scale"] / 255)
