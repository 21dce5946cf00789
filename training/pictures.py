"""Pictures of the world: coloured shapes on a light ground.

Everything is a pure function of a `random.Random`, so a seed names a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from aae_batch.shapes.world import COLOURS, SIZE, Thing, outline

RADII = (18.0, 26.0)
"""Smallest and largest radius of an object, in pixels: the radius of a circle of about its area."""

MARGIN = 6.0
"""Pixels left free at the border and between two objects, so that none is clipped or touches."""

MAX_ANGLE = 15.0
"""Objects are turned by up to this many degrees either way."""

_SUPERSAMPLING = 4
_REACH = 1.35  # no outline below reaches further from its centre, in radii


@dataclass(frozen=True)
class Placed:
    """A thing in a picture. Centre and radius in pixels, angle in degrees."""

    thing: Thing
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """All that a picture shows. `ground` is the grey level of its background, 0 to 255."""

    objects: tuple[Placed, ...]
    ground: int


def place(things: Sequence[Thing], random: Random) -> Scene:
    """Lay `things` out at random, clear of the border and of each other."""
    while True:
        objects: list[Placed] = []
        for thing in things:
            radius = random.uniform(*RADII)
            low, high = radius * _REACH + MARGIN, SIZE - radius * _REACH - MARGIN
            objects.append(
                Placed(
                    thing,
                    x=random.uniform(low, high),
                    y=random.uniform(low, high),
                    radius=radius,
                    angle=random.uniform(-MAX_ANGLE, MAX_ANGLE),
                )
            )
        apart = all(
            math.hypot(a.x - b.x, a.y - b.y) > (a.radius + b.radius) * _REACH + MARGIN
            for i, a in enumerate(objects)
            for b in objects[:i]
        )
        if apart:
            return Scene(tuple(objects), ground=random.randint(222, 246))


def render(scene: Scene) -> Image.Image:
    """Draw `scene` as an RGB picture of `SIZE` x `SIZE`, antialiased."""
    side = SIZE * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), (scene.ground,) * 3)
    draw = ImageDraw.Draw(image)
    for placed in scene.objects:
        draw.polygon(_corners(placed, _SUPERSAMPLING), fill=COLOURS[placed.thing.colour])
    return image.reduce(_SUPERSAMPLING)


def coverage(placed: Placed, grid: int) -> np.ndarray:
    """The share of each cell that an object covers, on a `grid` x `grid` raster: float32 in [0, 1]."""
    mask = Image.new("L", (SIZE, SIZE), 0)
    ImageDraw.Draw(mask).polygon(_corners(placed, 1), fill=255)
    return np.asarray(mask.reduce(SIZE // grid), dtype=np.float32) / 255


def _corners(placed: Placed, scale: int) -> list[tuple[float, float]]:
    centre = np.array([placed.x, placed.y])
    points = (centre + placed.radius * outline(placed.thing.shape, placed.angle)) * scale
    return [(x, y) for x, y in points.tolist()]
