"""The order in which methods are compared."""

from __future__ import annotations

from aae_batch.request import METHODS

BASELINE = METHODS[0]
"""Plain sampling, which the others are compared with."""


def method_order(method: str | None) -> tuple[int, str]:
    """Sorts methods: the baseline, the others as `METHODS` has them, what no version knows."""
    known = METHODS.index(method) if method in METHODS else len(METHODS)
    return known, method or ""
