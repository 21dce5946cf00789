"""A run's settings by method, and the order in which methods are compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from aae_batch.methods import DEFAULT, METHODS, Steering

_NOT_SHOWN = {"by_method", *(field.name for field in fields(Steering))}
"""Guidance settings that are left out, since `steering` contains them."""


def method_order(method: str | None) -> tuple[int, str]:
    """Return a sort key: the baseline first, then the other methods in the order of `METHODS`, then
    unknown ones by name."""
    known = list(METHODS).index(method) if method in METHODS else len(METHODS)
    return known, method or ""


def shown_settings(run: Mapping[str, Any], methods: Collection[str]) -> dict[str, Any]:
    """Return a run's settings for display, with the steering of only those methods that have rows."""
    settings = run["settings"]
    if "steering" not in settings:
        return settings
    guidance = {k: v for k, v in settings["guidance"].items() if k not in _NOT_SHOWN}
    steering = {m: s for m, s in settings["steering"].items() if m in methods}
    return settings | {"guidance": guidance, "steering": steering}


def thresholds_of(run: Mapping[str, Any]) -> dict[int, float]:
    """Return step -> threshold of Attend-and-Excite, by which attention is measured for every method."""
    settings = run["settings"]
    # Versions with only one guided method stored its steering in the guidance settings.
    thresholds = settings.get("steering", {}).get(DEFAULT, settings["guidance"])["thresholds"]
    return {int(step): share for step, share in thresholds.items()}
