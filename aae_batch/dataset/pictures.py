"""Read the encoded images of a shard's rows concurrently and check each against its SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from aae_batch.dataset.reader import Dataset
from aae_batch.errors import OutputError
from aae_batch.store.read_ahead import read_ahead

T = TypeVar("T")


def checked_bytes(dataset: Dataset, row: Mapping[str, Any]) -> bytes:
    """Return the encoded image of a metadata row, which needs `id`, `shard`, `file_name` and `sha256`.

    Raises:
        OutputError: the row has no image, or the image cannot be read or has another SHA-256.
    """
    data = dataset.image_bytes(row)
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise OutputError(
            f"The image of row {row['id']} in {dataset.storage.root} does not match the SHA-256 in its "
            "metadata: run `aae-batch verify --repair`, then generate it again."
        )
    return data


def read_pictures(
    rows: Sequence[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], T]
) -> Iterable[T]:
    """Call `read` on each of a shard's rows and return the results in order. Rows are read ahead if each
    image is an object of its own; an object with all images of the shard is held by the dataset anyway."""
    apart = all("#" not in (row["file_name"] or "#") for row in rows)
    return read_ahead(read, rows) if apart else map(read, rows)
