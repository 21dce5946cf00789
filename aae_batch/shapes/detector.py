"""Detect shapes and their colours in images of the embedded model's world.

No learning: each pixel gets the colour with the nearest hue, connected pixels of one colour form an
object, and an object gets the shape whose outline overlaps it most after both are aligned in place
and area. Objects of different colours are separated even if they touch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from aae_batch.shapes.world import COLOURS, SHAPES, Thing, outline

SMALLEST = 80
"""Minimum area of an object in pixels. The smallest object of the world has 740."""

LIKENESS = 0.72
"""Minimum overlap with a shape (intersection over union) to count as one."""

_COLOURED = 0.45  # of the pure colour's chroma: where an antialiased edge is about half covered
_GRID = 40
_REACH = 1.9  # half the grid's side, in radii of a disc with the object's area
_ANGLES = range(-25, 26, 5)


@dataclass(frozen=True)
class Detection:
    """An object in an image.

    Attributes:
        shape: its shape; None if it resembles none (junk).
        colour: its colour.
        box: left, top, right, bottom in pixels.
        score: overlap with the best shape, in [0, 1].
    """

    shape: str | None
    colour: str
    box: tuple[int, int, int, int]
    score: float


@dataclass(frozen=True)
class Verdict:
    """How an image compares with the things its prompt names.

    Attributes:
        drawn: for each thing, whether its shape is there in any colour.
        bound: for each thing, whether its shape is there in its colour.
        junk: the number of objects that are none of the named shapes, or surplus ones.
        detections: all objects.
    """

    drawn: tuple[bool, ...]
    bound: tuple[bool, ...]
    junk: int
    detections: tuple[Detection, ...]


def detect(image: Image.Image) -> list[Detection]:
    """Return all objects in `image`, largest first."""
    found = []
    for colour, mask in zip(COLOURS, _colour_masks(image), strict=True):
        labels, _ = ndimage.label(mask)
        for index, place in enumerate(ndimage.find_objects(labels), start=1):
            part = labels[place] == index
            area = int(part.sum())
            if area < SMALLEST:
                continue
            shape, score = _classify(part, area)
            rows, columns = place
            box = (columns.start, rows.start, columns.stop, rows.stop)
            kind = shape if score >= LIKENESS else None
            found.append((area, Detection(kind, colour, box, score)))
    return [detection for _, detection in sorted(found, key=lambda entry: -entry[0])]


def judge(image: Image.Image, things: Sequence[Thing]) -> Verdict:
    """Compare the objects in `image` with the `things` that its prompt names."""
    detections = detect(image)
    rest = list(detections)
    drawn, bound = [], []
    for thing in things:
        alike = [d for d in rest if d.shape == thing.shape]
        exact = [d for d in alike if d.colour == thing.colour]
        drawn.append(bool(alike))
        bound.append(bool(exact))
        for detection in (exact or alike)[:1]:
            rest.remove(detection)
    return Verdict(tuple(drawn), tuple(bound), len(rest), tuple(detections))


def _colour_masks(image: Image.Image) -> np.ndarray:
    """Return [colours, height, width], True where a pixel is more coloured than grey, in its
    nearest hue."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    chroma = pixels - pixels.mean(axis=-1, keepdims=True)
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    palette -= palette.mean(axis=-1, keepdims=True)
    strength = np.linalg.norm(palette, axis=-1)
    along = chroma @ (palette / strength[:, None]).T
    nearest = along.argmax(axis=-1)
    coloured = np.take(strength, nearest) * _COLOURED < along.max(axis=-1)
    return np.stack([coloured & (nearest == index) for index in range(len(COLOURS))])


def _classify(part: np.ndarray, area: int) -> tuple[str, float]:
    """Return the shape that overlaps an object's mask most, and their overlap."""
    names, templates = _templates()
    mask = _in_frame(part, area).reshape(-1)
    common = (templates & mask).sum(axis=1)
    likeness = common / (templates | mask).sum(axis=1)
    best = int(likeness.argmax())
    return names[best], float(likeness[best])


def _in_frame(part: np.ndarray, area: int) -> np.ndarray:
    """Resample the mask to a grid around its centre of mass, scaled to its area: bool
    [_GRID, _GRID]."""
    rows, columns = np.nonzero(part)
    radius = np.sqrt(area / np.pi)
    offsets = (np.arange(_GRID) + 0.5) / _GRID * 2 - 1
    y = np.rint(rows.mean() + offsets * _REACH * radius).astype(int)
    x = np.rint(columns.mean() + offsets * _REACH * radius).astype(int)
    padded = np.pad(part, 1)  # positions outside read the empty margin
    height, width = padded.shape
    return padded[np.ix_(np.clip(y + 1, 0, height - 1), np.clip(x + 1, 0, width - 1))]


@lru_cache(maxsize=1)
def _templates() -> tuple[list[str], np.ndarray]:
    """Return every shape at every angle, in the frame of `_in_frame`: names and bool
    [templates, cells]."""
    side, names, frames = 256, [], []
    for shape in SHAPES:
        for angle in _ANGLES:
            canvas = Image.new("1", (side, side))
            corners = side / 2 + side / 3 * outline(shape, angle) / 1.35
            ImageDraw.Draw(canvas).polygon([(x, y) for x, y in corners.tolist()], fill=1)
            part = np.asarray(canvas)
            names.append(shape)
            frames.append(_in_frame(part, int(part.sum())).reshape(-1))
    return names, np.stack(frames)
