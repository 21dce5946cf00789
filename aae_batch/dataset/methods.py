"""What a run says of its methods, and the order in which they are compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from aae_batch.methods import DEFAULT, METHODS, Steering

_NOT_SHOWN = {"by_method", *(field.name for field in fields(Steering))}
"""What `steering` has in it."""


def method_order(method: str | None) -> tuple[int, str]:
    """Sorts methods: the baseline, the others as `METHODS` has them, what no version knows."""
    known = list(METHODS).index(method) if method in METHODS else len(METHODS)
    return known, method or ""


def shown_settings(run: Mapping[str, Any], methods: Collection[str]) -> dict[str, Any]:
    """The settings of a run for a reader: of the steering, only that of methods which have rows."""
    settings = run["settings"]
    if "steering" not in settings:
        return settings
    guidance = {k: v for k, v in settings["guidance"].items() if k not in _NOT_SHOWN}
    steering = {m: s for m, s in settings["steering"].items() if m in methods}
    return settings | {"guidance": guidance, "steering": steering}


def thresholds_of(run: Mapping[str, Any]) -> dict[int, float]:
    """What the attention of a run's subjects is measured by, whatever their method: step -> threshold of
    Attend-and-Excite."""
    settings = run["settings"]
    # Versions before there were several guided methods had its steering among the guidance.
    thresholds = settings.get("steering", {}).get(DEFAULT, settings["guidance"])["thresholds"]
    return {int(step): share for step, share in thresholds.items()}
