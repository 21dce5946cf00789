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


def attention_compares(method: str | None) -> bool:
    """Return whether a method's attention can be compared with that of others: not if a subject competes
    only with the words of its own conjunct (see `layout.ATTENTION_SCHEMA`)."""
    return method not in METHODS or METHODS[method].texts != "conjuncts"


def losses_compare(methods: Collection[str]) -> bool:
    """Return whether `final_loss` is the same quantity for all of these methods."""
    unguided = METHODS[DEFAULT].objective

    def loss(method: str) -> Any:
        if method not in METHODS or not attention_compares(method):
            return method
        return METHODS[method].objective or unguided

    return len({loss(method) for method in methods}) == 1


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
