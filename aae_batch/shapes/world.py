"""The embedded model's world: coloured shapes, their captions and outlines.

`training/pictures.py` draws the images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (214, 40, 46),
    "green": (38, 158, 74),
    "blue": (42, 88, 208),
    "yellow": (246, 196, 32),
}
SIZE = 128
"""Height and width of an image in pixels."""


@dataclass(frozen=True)
class Thing:
    """A coloured shape, as a caption names it."""

    shape: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


THINGS = tuple(Thing(shape, colour) for shape in SHAPES for colour in COLOURS)
PAIRS = tuple(
    (first, second)
    for first in THINGS
    for second in THINGS
    if first.shape != second.shape and first.colour != second.colour
)
"""Every ordered pair of things that differ in shape and in colour."""


def caption(things: Sequence[Thing], coloured: bool = True) -> str:
    """Return `"a red circle and a blue square"`, or the same without colours."""
    return " and ".join(f"a {thing if coloured else thing.shape}" for thing in things)


def outline(shape: str, angle: float = 0.0) -> np.ndarray:
    """Return the corners of `shape` as `[corners, 2]` (x, y), in radii from its centre."""
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
