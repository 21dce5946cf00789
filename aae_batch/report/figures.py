"""The figures at the top of the page: counts and means over all rows of a dataset."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from aae_batch.dataset.methods import method_order
from aae_batch.report.metrics import Judged, Score

_OWN = ("final_loss", "neglected", "num_refinements", "seconds")


@dataclass
class Failures:
    """Rows that failed for one reason: how many, and the first of them."""

    count: int
    row: str
    error: str


@dataclass
class Figures:
    """Counts and sums that grow shard by shard.

    Attributes:
        rows, failed, neglected: how many.
        judged: pictures of which it is known whether a subject was neglected.
        images: pictures by method.
        failures: by `error_type`.
        scores: all scores that were seen, in their order.
        stale: scores that are left out.
    """

    rows: int = 0
    failed: int = 0
    neglected: int = 0
    judged: int = 0
    images: Counter[str] = field(default_factory=Counter)
    failures: dict[str, Failures] = field(default_factory=dict)
    scores: dict[Score, None] = field(default_factory=dict)
    stale: int = 0
    _sums: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    _counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, table: pa.Table, judged: Judged) -> None:
        """Take in a shard.

        Args:
            table: its metadata.
            judged: what metrics say of its rows.
        """
        self.stale += judged.stale
        self.scores.update(dict.fromkeys(judged.columns))
        ok = pc.equal(table["status"], "ok")
        self._add_failures(table.filter(pc.invert(ok)))
        part = table.select(["method", *_OWN])
        for score, values in judged.columns.items():
            if not score.is_text:
                part = part.append_column(score.name, _floats(values))
        names = part.column_names[1:]
        totals = (
            part.filter(ok)
            .group_by("method")
            .aggregate(
                [("method", "count"), *((name, how) for name in names for how in ("sum", "count"))]
            )
        )
        self.rows += table.num_rows
        for total in totals.to_pylist():
            method = total["method"]
            self.images[method] += total["method_count"]
            self.neglected += total["neglected_sum"] or 0
            self.judged += total["neglected_count"]
            for name in names:
                self._sums[method][name] += total[f"{name}_sum"] or 0
                self._counts[method][name] += total[f"{name}_count"]

    def methods(self) -> list[str]:
        """Those that have pictures, the baseline first."""
        return sorted(self.images, key=method_order)

    def telling(self) -> list[Score]:
        """The scores that a table of means has a use for: no words, nothing that no picture has, and
        no number that is zero throughout. A share of zero is a finding."""
        means = {
            score: [self.mean(method, score) for method in self.images]
            for score in self.scores
            if not score.is_text
        }
        return [
            score
            for score, values in means.items()
            if any(values) or (score.is_truth and 0 in values)
        ]

    def mean(self, method: str, of: str | Score) -> float | None:
        """The mean over a method's pictures of a metadata column or a score; None without values."""
        name = of.name if isinstance(of, Score) else of
        count = self._counts[method][name]
        return self._sums[method][name] / count if count else None

    def _add_failures(self, failed: pa.Table) -> None:
        self.failed += failed.num_rows
        for row in failed.select(["id", "error_type", "error"]).to_pylist():
            known = self.failures.get(row["error_type"])
            if known:
                known.count += 1
            else:
                self.failures[row["error_type"]] = Failures(1, row["id"], row["error"])


def _floats(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers and booleans as floats; NaN counts as missing."""
    floats = values.cast(pa.float64())
    return pc.if_else(pc.is_nan(floats), None, floats)
