"""What is created and never overwritten: the parts of a shard that is not committed yet.

A part may be there already: an earlier attempt died before its commit, or a worker that was given up
still writes. It is of the same row, model and settings, so it is taken as it is, and what is written
after it, the commit above all, speaks of the bytes that are there. Where the store creates on condition
(a folder; S3's `If-None-Match`) no two writers can disagree on them; elsewhere a writer looks first, and
two of them can pass each other between look and write.
"""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image

from aae_batch.dataset.image_format import ImageFormat
from aae_batch.store.base import Storage


def is_picture(data: bytes, image_format: ImageFormat, size: tuple[int, int] | None = None) -> bool:
    """Whether it is a whole picture in that format, of that width and height, or of any."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            fits = size is None or image.size == size
            return fits and str(image.format).lower() == image_format.kind
    except Exception:  # Pillow's decoders raise whatever they stumble over
        return False


def settle(
    storage: Storage, name: str, data: bytes, fits: Callable[[bytes], bool], commit: str
) -> bytes | None:
    """Create an object of a shard that is not committed. Returns the bytes that are there: these, or
    those that came first and fit what is going to be committed. Others, of an attempt that came to
    something else for some row, make way.

    Args:
        commit: the object with which the shard is committed: None is returned, and nothing makes way, as
            soon as that is there.
    """
    while not storage.create_bytes(name, data):
        stored = storage.read_bytes(name)
        if stored == data or fits(stored):
            return stored
        if storage.exists(commit):
            return None
        storage.delete(name)
    return data
