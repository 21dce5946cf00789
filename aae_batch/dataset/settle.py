"""Create the parts of a shard that is not committed yet, without overwriting any.

A part may exist already: an earlier attempt died before its commit, or a worker that was given up still
writes. It has the same row, model and settings, so it is kept, and everything written after it, such as
the commit, describes the bytes that are stored. If the store can create conditionally (a folder, or S3's
`If-None-Match`), two writers cannot disagree on them. In other stores a writer checks first, and another
one can write between its check and its write.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from aae_batch.dataset.image_format import ImageFormat
from aae_batch.store.base import Storage


def is_picture(data: bytes, image_format: ImageFormat, size: tuple[int, int] | None = None) -> bool:
    """Return whether the bytes decode to a whole image of this format and, if given, of this (width,
    height)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            fits = size is None or image.size == size
            return fits and str(image.format).lower() == image_format.kind
    except Exception:  # Pillow's decoders raise errors of any class
        return False


ROUNDING = 16
"""Levels of 255 by which a pixel of two makings of one picture may differ."""


def alike(one: bytes, other: bytes) -> bool:
    """Return whether two encoded images of one size show the same, up to rounding."""
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int) for data in (one, other)]
    return int(np.abs(pixels[0] - pixels[1]).max()) <= ROUNDING


def settle(
    storage: Storage, name: str, data: bytes, fits: Callable[[bytes], bool], commit: str
) -> bytes | None:
    """Create an object of a shard that is not committed, and return the bytes that are stored.

    These are `data`, or bytes that another attempt stored first and that fit. Stored bytes that do not
    fit, from an attempt with another outcome for some row, are deleted and replaced.

    Args:
        fits: whether stored bytes fit what is going to be committed.
        commit: name of the object that commits the shard. Once it exists, nothing is deleted and None
            is returned.
    """
    while not storage.create_bytes(name, data):
        stored = storage.read_bytes(name)
        if stored == data or fits(stored):
            return stored
        if storage.exists(commit):
            return None
        storage.delete(name)
    return data
