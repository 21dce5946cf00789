"""What a run says of its methods, and the order in which they are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aae_batch.methods import DEFAULT, METHODS


def method_order(method: str | None) -> tuple[int, str]:
    """Sorts methods: the baseline, the others as `METHODS` has them, what no version knows."""
    known = list(METHODS).index(method) if method in METHODS else len(METHODS)
    return known, method or ""


def thresholds_of(run: Mapping[str, Any]) -> dict[int, float]:
    """What the attention of a run's subjects is measured by, whatever their method: step -> threshold of
    Attend-and-Excite."""
    guidance = run["settings"]["guidance"]
    # Versions before there were several guided methods wrote its steering among the settings.
    thresholds = guidance.get("steering", {}).get(DEFAULT, guidance)["thresholds"]
    return {int(step): share for step, share in thresholds.items()}
