"""Pictures made small enough to be part of a page."""

from __future__ import annotations

import base64
import io
import tarfile
from typing import Any

from aae_batch.dataset.reader import Dataset
from aae_batch.errors import OutputError

QUALITY = 82


class Thumbnails:
    """Pictures as WebP in base64, held in the order they were asked for.

    Args:
        side: pixels of the longer side, at most; a smaller picture keeps its size.

    Attributes:
        held: the pictures.
        unreadable: how many could not be read.
    """

    def __init__(self, dataset: Dataset, side: int) -> None:
        self._dataset = dataset
        self._side = side
        self.held: list[str] = []
        self.unreadable = 0

    def __call__(self, row: dict[str, Any]) -> int | None:
        """Hold a metadata row's picture; returns its place, None where it cannot be read."""
        try:
            image = self._dataset.image(row).convert("RGB")
        except (OutputError, OSError, tarfile.TarError):
            self.unreadable += 1
            return None
        image.thumbnail((self._side, self._side))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=QUALITY)
        self.held.append(base64.b64encode(buffer.getvalue()).decode())
        return len(self.held) - 1
