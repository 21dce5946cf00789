"""What the fake engine draws: noise that the prompt and the seed alone decide. Known to the judge, too."""

from __future__ import annotations

import hashlib

SIDE = 16
"""Pixels, of a square."""


def pixels(prompt: str, seed: int) -> bytes:
    """RGB, row by row."""
    return hashlib.shake_256(f"{seed}\n{prompt}".encode()).digest(3 * SIDE * SIDE)
