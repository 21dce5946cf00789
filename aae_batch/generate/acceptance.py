"""What makes a picture good enough, and how often a row is tried."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from aae_batch.columns import MANIFEST_COLUMNS, OUTCOME_COLUMNS
from aae_batch.dataset.condition import Truth, Value
from aae_batch.errors import SettingsError
from aae_batch.evaluate.settings import METRICS
from aae_batch.ladder import Ladder

if TYPE_CHECKING:
    from aae_batch.evaluate.metric import Metric

Unaccepted = Literal["keep", "fail", "drop"]

TRIES = 8
"""The most tries of a row, if nothing else is said."""

_QUOTED = re.compile(r"'[^']*'")
_SCORE = re.compile(r"\b([A-Za-z_]\w*)\s*\.\s*[A-Za-z_]")
_SEEN_BY_ROW = ("prompt", "seed", "method", "num_refinements", "final_loss", "neglected")
_COLUMNS = [
    column for column in (*MANIFEST_COLUMNS, *OUTCOME_COLUMNS) if column.name in _SEEN_BY_ROW
]


@dataclass(frozen=True)
class Acceptance:
    """When a row is done, and with which of its pictures.

    Attributes:
        accept: the condition that a picture must meet; without one, none is judged.
        by: the number by which the best of several pictures is found, the larger the better.
        ladder: the tries of a row.
        all_tries: make every try, and keep the best; otherwise the first accepted picture is kept.
        unaccepted: what becomes of a row without an accepted picture.
        give_up_below: see `JobSettings.give_up_below`.
        keep_rejected: keep the other pictures too.
        metrics: the judges by name.
    """

    accept: str | None
    by: str
    ladder: Ladder
    all_tries: bool
    unaccepted: Unaccepted
    give_up_below: float | None
    keep_rejected: bool
    metrics: Mapping[str, Metric]

    def __str__(self) -> str:
        rungs = ", then ".join(
            f"{rung.method} up to {rung.tries} times" if rung.tries > 1 else rung.method
            for rung in self.ladder.rungs
        )
        until = f" until {self.accept}" if self.accept and not self.all_tries else ""
        named = ", ".join(self.metrics) or "none"
        return (
            f"tries: {'' if self.all_tries else 'up to '}{self.ladder.tries} a row by {rungs}{until}; the "
            f"best by {self.by}; judges: {named}"
        )

    def check(self) -> None:
        """Check the expressions against the columns that there will be.

        Raises:
            SettingsError: one of them does not fit.
        """
        self.judged([], {})

    def judged(
        self, rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which pictures are accepted, 1 or 0, and how good each is, NaN where that is unknown:
        two float64 [rows].

        Args:
            rows: rows of the metadata table.
            scores: metric -> its columns for every row.
        """
        columns = {c.name: pa.array([row.get(c.name) for row in rows], c.type) for c in _COLUMNS}
        for name, metric in self.metrics.items():
            columns[name] = _struct(metric, scores.get(name, ()))
        table = pa.table(columns)
        unknown = np.full(len(rows), np.nan)
        accepted = unknown if self._truth is None else self._truth.of(table)
        return accepted, self._value.of(table)

    @cached_property
    def _truth(self) -> Truth | None:
        return None if self.accept is None else Truth(self.accept, "--accept")

    @cached_property
    def _value(self) -> Value:
        return Value(self.by, "--by")


def _struct(metric: Metric, scores: Sequence[Mapping[str, Any]]) -> pa.StructArray:
    """Return scores as one column, whose fields have the short names too."""
    kinds = {column.name: column.type for column in metric.columns}
    names = {name: name for name in kinds} | dict(metric.short)
    fields = [pa.field(name, kinds[column]) for name, column in names.items()]
    rows = [{name: row[column] for name, column in names.items()} for row in scores]
    return pa.array(rows, pa.struct(fields))


def metrics_named(*expressions: str | None) -> list[str]:
    """Return the metrics whose columns expressions name, as in `detector.all_found`.

    Raises:
        SettingsError: there is no such metric.
    """
    named: list[str] = []
    for text in filter(None, expressions):
        named += _SCORE.findall(_QUOTED.sub("", text))
    for name in named:
        if name not in METRICS:
            near = get_close_matches(name, METRICS, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise SettingsError(
                f"There is no metric {name!r}{meant} Scores are written metric.column, with the metrics "
                f"{', '.join(METRICS)}."
            )
    return list(dict.fromkeys(named))
