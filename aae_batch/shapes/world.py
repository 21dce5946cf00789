"""The world the embedded model was trained on: coloured shapes on a light ground, with captions.

Everything is a pure function of a `random.Random`, so a seed names a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (214, 40, 46),
    "green": (38, 158, 74),
    "blue": (42, 88, 208),
    "yellow": (246, 196, 32),
}
SIZE = 128
"""Height and width of a picture in pixels."""

RADII = (18.0, 26.0)
"""Smallest and largest radius of an object, in pixels: the radius of a circle of about its area."""

MARGIN = 6.0
"""Pixels left free at the border and between two objects, so that none is clipped or touches."""

MAX_ANGLE = 15.0
"""Objects are turned by up to this many degrees either way."""

_SUPERSAMPLING = 4
_REACH = 1.35  # no outline below reaches further from its centre, in radii


@dataclass(frozen=True)
class Thing:
    """What a caption can name: a shape in a colour."""

    shape: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


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


THINGS = tuple(Thing(shape, colour) for shape in SHAPES for colour in COLOURS)
PAIRS = tuple(
    (first, second)
    for first in THINGS
    for second in THINGS
    if first.shape != second.shape and first.colour != second.colour
)
"""Every ordered pair of things that differ in shape and in colour."""


def outline(shape: str, angle: float = 0.0) -> np.ndarray:
    """The corners of `shape` as `[corners, 2]` (x, y), in radii around its centre."""
    if shape == "circle":
        points = _ring(64, 1.0)
    elif shape == "square":
        points = _ring(4, 1.25, turn=45.0)
    elif shape == "triangle":
        points = _ring(3, 1.35, turn=-90.0)
    elif shape == "star":
        points = np.stack([_ring(5, 1.35, turn=-90.0), _ring(5, 0.58, turn=-54.0)], axis=1).reshape(
            -1, 2
        )
    elif shape == "cross":
        arm, tip = 0.40, 1.20
        quarter = np.array([(-arm, -tip), (arm, -tip), (arm, -arm)])
        turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]  # cosine and sine of a quarter turn each
        points = np.concatenate([quarter @ np.array([(c, s), (-s, c)]) for c, s in turns])
    else:
        raise ValueError(f"unknown shape {shape!r}; the world has {', '.join(SHAPES)}")
    turn = math.radians(angle)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return points @ rotation


def _ring(corners: int, radius: float, turn: float = 0.0) -> np.ndarray:
    angles = np.radians(turn) + np.arange(corners) * (2 * np.pi / corners)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


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


def caption(things: Sequence[Thing], coloured: bool = True) -> str:
    """`"a red circle and a blue square"`, or without the colours."""
    return " and ".join(f"a {thing if coloured else thing.shape}" for thing in things)


def _corners(placed: Placed, scale: int) -> list[tuple[float, float]]:
    centre = np.array([placed.x, placed.y])
    points = (centre + placed.radius * outline(placed.thing.shape, placed.angle)) * scale
    return [(x, y) for x, y in points.tolist()]
