"""Images scaled down for embedding in a page."""

from __future__ import annotations

import base64
import io
import tarfile
from typing import Any

from PIL import Image

from aae_batch.dataset.reader import Dataset
from aae_batch.errors import OutputError

QUALITY = 82


class Thumbnails:
    """Images as WebP in base64, in the order of the calls.

    Args:
        side: largest longer side in pixels; smaller images keep their size.

    Attributes:
        held: the images.
        unreadable: number of images that could not be read.
    """

    def __init__(self, dataset: Dataset, side: int) -> None:
        self._dataset = dataset
        self._side = side
        self.held: list[str] = []
        self.unreadable = 0

    def __call__(self, row: dict[str, Any]) -> int | None:
        """Add the image of a metadata row. Returns its index, or None if it cannot be read."""
        try:
            image = self._dataset.image(row).convert("RGB")
        except (OutputError, OSError, tarfile.TarError):
            self.unreadable += 1
            return None
        return self._hold(image, self._side)

    def of_bytes(self, data: bytes, side: int) -> int | None:
        """Add an encoded image, as `__call__` does, no larger than `side`."""
        try:
            image = Image.open(io.BytesIO(data)).convert("RGB")
        except (OSError, SyntaxError, ValueError):  # Pillow's errors for damaged files
            self.unreadable += 1
            return None
        return self._hold(image, min(side, self._side))

    def _hold(self, image: Image.Image, side: int) -> int:
        image.thumbnail((side, side))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=QUALITY)
        self.held.append(base64.b64encode(buffer.getvalue()).decode())
        return len(self.held) - 1
