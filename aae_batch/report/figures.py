"""The figures at the top of the page: counts and means over all rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from aae_batch.dataset.methods import attention_compares, losses_compare, method_order
from aae_batch.report.metrics import Judged, Score
from aae_batch.report.tries import TryFigures

_OWN = ("final_loss", "neglected", "num_refinements", "forwards", "seconds")
_OF_ATTENTION = ("final_loss", "neglected")


@dataclass
class Failures:
    """Rows that failed for one reason: their number, and the id and error of the first."""

    count: int
    row: str
    error: str


@dataclass
class Figures:
    """Counts and sums, accumulated shard by shard.

    Attributes:
        rows, failed: numbers of rows.
        failures: by `error_type`.
        scores: all scores seen, in order.
        stale: number of scores left out; see `dataset.scores.ShardScores`.
        tries: None in a run that makes one picture a row.
    """

    rows: int = 0
    failed: int = 0
    failures: dict[str, Failures] = field(default_factory=dict)
    scores: dict[Score, None] = field(default_factory=dict)
    stale: int = 0
    tries: TryFigures | None = None
    _totals: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Per method: `method_count`, and `<name>_sum` and `<name>_count` of each column."""
    _ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """The least and the largest value of each column over all images with one."""

    def add(self, table: pa.Table, judged: Judged, tries: pa.Table | None = None) -> None:
        """Add a shard.

        Args:
            table: its metadata.
            judged: the scores of its rows.
            tries: as for `TryFigures.add`, in a run with several tries a row.
        """
        if self.tries is not None and tries is not None:
            self.tries.add(table, tries)
        self.rows += table.num_rows
        self.stale += judged.stale
        self.scores.update(dict.fromkeys(judged.columns))
        ok = pc.equal(table["status"], "ok")
        self._add_failures(table.filter(pc.invert(ok)))
        own = [name for name in _OWN if name in table.column_names]
        part = table.select(["method", *own]).filter(ok)
        for score, values in judged.columns.items():
            if not score.is_text:
                part = part.append_column(score.name, _floats(values).filter(ok))
        for name in part.column_names[1:]:
            self._widen(name, pc.min_max(part[name].cast(pa.float64())).as_py())
        sums = [(name, how) for name in part.column_names[1:] for how in ("sum", "count")]
        totals = part.group_by("method").aggregate([("method", "count"), *sums])
        for total in totals.to_pylist():
            of_method = self._totals[total.pop("method")]
            of_method.update({name: value or 0 for name, value in total.items()})

    @property
    def images(self) -> dict[str, int]:
        """Number of images per method."""
        return {method: total["method_count"] for method, total in self._totals.items()}

    @property
    def neglected(self) -> int:
        return sum(total["neglected_sum"] for total in self._comparable())

    @property
    def judged(self) -> int:
        """Number of images for which `neglected` is known."""
        return sum(total["neglected_count"] for total in self._comparable())

    def _comparable(self) -> list[Counter[str]]:
        apart = self.apart()
        return [total for method, total in self._totals.items() if method not in apart]

    def methods(self) -> list[str]:
        """Return the methods that have images, the baseline first."""
        return sorted(self._totals, key=method_order)

    def apart(self) -> list[str]:
        """Return the methods whose attention does not compare with that of the others here."""
        apart = [method for method in self.methods() if not attention_compares(method)]
        return apart if len(self._totals) > 1 else []

    def telling(self) -> list[str | Score]:
        """Return the metadata columns and scores worth a column of means: no text, nothing without
        values, no number that is zero throughout, no count that is the same for every image, and no
        loss that the methods define differently. A share of 0 or 100 % is informative and stays."""
        columns: list[str | Score] = [
            name for name in _OWN if name != "final_loss" or losses_compare(self._totals)
        ]
        return [of for of in [*columns, *self.scores] if self._tells(of)]

    def _tells(self, of: str | Score) -> bool:
        if (span := self._ranges.get(_name(of))) is None:
            return False
        is_count = of.is_count if isinstance(of, Score) else of == "num_refinements"
        return is_share(of) or span[0] < span[1] or not (is_count or span[0] == 0)

    def mean(self, method: str, of: str | Score) -> float | None:
        """Return the mean of a metadata column or score over a method's images; None without values, and
        for attention that does not compare with that of the other methods."""
        name = _name(of)
        if name in _OF_ATTENTION and method in self.apart():
            return None
        total = self._totals[method]
        count = total[f"{name}_count"]
        return total[f"{name}_sum"] / count if count else None

    def _widen(self, name: str, span: dict[str, float | None]) -> None:
        if span["min"] is not None and span["max"] is not None:
            low, high = self._ranges.get(name, (span["min"], span["max"]))
            self._ranges[name] = min(low, span["min"]), max(high, span["max"])

    def _add_failures(self, failed: pa.Table) -> None:
        self.failed += failed.num_rows
        for row in failed.select(["id", "error_type", "error"]).to_pylist():
            kind = self.failures.setdefault(row["error_type"], Failures(0, row["id"], row["error"]))
            kind.count += 1


def is_share(of: str | Score) -> bool:
    """Return whether a column's mean is a share of the images."""
    return of.is_truth if isinstance(of, Score) else of == "neglected"


def _name(of: str | Score) -> str:
    return of.name if isinstance(of, Score) else of


def _floats(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers and booleans as floats; NaN counts as missing."""
    floats = values.cast(pa.float64())
    return pc.if_else(pc.is_nan(floats), None, floats)
