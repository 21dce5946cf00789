"""Encoded pictures of a shard's rows, several read at once, each checked against its SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from aae_batch.dataset.reader import Dataset
from aae_batch.errors import OutputError
from aae_batch.store.read_ahead import read_ahead

T = TypeVar("T")


def checked_bytes(dataset: Dataset, row: Mapping[str, Any]) -> bytes:
    """The picture of a metadata row, of which `id`, `shard`, `file_name` and `sha256` are used.

    Raises:
        OutputError: the row has none, or it cannot be read, or it is not the one that was made.
    """
    data = dataset.image_bytes(row)
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise OutputError(
            f"The picture of row {row['id']} in {dataset.storage.root} is not the one that its "
            "metadata has the SHA-256 of: run `aae-batch verify --repair`, then generate it again."
        )
    return data


def read_pictures(
    rows: Sequence[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], T]
) -> Iterable[T]:
    """What `read` makes of each of a shard's rows, in their order; some are read ahead where each
    picture is an object of its own. Of a shard's one object, the dataset holds all pictures."""
    apart = all("#" not in (row["file_name"] or "#") for row in rows)
    return read_ahead(read, rows) if apart else map(read, rows)
