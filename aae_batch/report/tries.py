"""The tries of rows: what they add up to, which subjects they miss, and those of the rows shown."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from aae_batch.dataset.methods import method_order
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.tries import OF_TRIES, WORDS, TryCounts
from aae_batch.report.metrics import BOUND, FOUND
from aae_batch.report.thumbnails import Thumbnails

OF_ROWS = ["tries", "accepted"]
"""Metadata columns to read beside the page's others, in a run with several tries a row."""

TRIES = [*OF_TRIES, "id", "try", "seed", "error", "value", "scores"]
HARDEST = 20
SIDE = 128
"""Longer side of the picture of a try in pixels: a row may have many."""


@dataclass
class TryFigures:
    """Figures of all tries, accumulated shard by shard.

    Attributes:
        rule: `settings.acceptance` of `run.json`.
        tally: counts by method.
        subjects: subject -> the `tries` in which a detector looked for it, those that `missed` it, and those
            of them that have it in an `other_colour`.
    """

    rule: Mapping[str, Any]
    tally: TryCounts = field(default_factory=TryCounts)
    subjects: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, table: pa.Table, tries: pa.Table) -> None:
        """Add a shard.

        Args:
            table: metadata of its rows.
            tries: its tries, with the columns of `TRIES`.
        """
        self.tally.add(table, tries)
        rows = table.select(["id", "subjects", "tries"]).to_pylist()
        subjects = {row["id"]: row["subjects"] for row in rows if row["tries"]}
        for made in tries.select(["id", "scores"]).to_pylist():
            self._add_subjects(subjects.get(made["id"]) or (), json.loads(made["scores"] or "{}"))

    def _add_subjects(self, subjects: Sequence[str], scores: Mapping[str, Mapping]) -> None:
        """Count a try. A subject found in another colour counts as missed, as under the images."""
        for columns in scores.values():
            found = columns.get(FOUND) or ()
            bound = columns.get(BOUND) or [None] * len(found)
            if len(found) != len(subjects):
                continue
            seen = list(zip(subjects, found, bound, strict=True))
            missed = {subject for subject, is_found, _ in seen if not is_found}
            other = {subject for subject, _, is_bound in seen if is_bound is False} - missed
            for subject in set(subjects):
                self.subjects[subject] += Counter(
                    tries=1, missed=subject in missed | other, other_colour=subject in other
                )

    def outcomes(self) -> list[tuple[str, int]]:
        """Return what became of the rows that did not fail: words and numbers."""
        counts = [(word, self.tally.rows[word]) for word in (*WORDS.values(), "dropped")]
        return [(word, rows) for word, rows in counts if rows or word == WORDS[True]]

    def methods(self) -> list[str]:
        """Return the methods that were tried, in the order of the ladder; then those that rows name."""
        ladder = [rung.partition(":")[0] for rung in self.rule["ladder"]]

        def order(method: str) -> tuple:
            return ladder.index(method) if method in ladder else len(ladder), method_order(method)

        return sorted(self.tally.rungs, key=order)

    def hardest(self) -> list[tuple[str, Counter[str]]]:
        """Return the subjects that the largest share of tries misses, and their counts."""

        def order(item: tuple[str, Counter[str]]) -> tuple:
            subject, counts = item
            return -counts["missed"] / counts["tries"], -counts["tries"], subject

        return sorted(self.subjects.items(), key=order)[:HARDEST]


def tries_by_row(
    dataset: Dataset, shard: int, shown: pa.Table, tries: pa.Table, thumbnails: Thumbnails
) -> dict[str, list[dict[str, Any]]]:
    """Return row id -> its tries, each with the index of its `picture` among the embedded images, or None.

    Args:
        shown: metadata of the shard's rows that are shown.
        tries: of the whole shard, with the columns of `TRIES`.
    """
    pictures = {}
    shown_ids = set(shown["id"].to_pylist())
    for row_id, number, data in dataset.pictures_of_tries(shard):
        if row_id in shown_ids:
            pictures[row_id, number] = thumbnails.of_bytes(data, SIDE)
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for made in tries.to_pylist():
        made["picture"] = pictures.get((made["id"], made["try"]))
        found[made["id"]].append(made)
    return found
