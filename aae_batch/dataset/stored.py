"""A committed shard as the outcomes that it was written from, so that some of its rows can be replaced."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from aae_batch.dataset.forms import Form
from aae_batch.dataset.layout import MANIFEST_COLUMNS, OUTCOME_COLUMNS
from aae_batch.dataset.outcome import Outcome
from aae_batch.dataset.reader import Dataset

_COLUMNS = [column.name for column in (*MANIFEST_COLUMNS, *OUTCOME_COLUMNS)]


def stored_outcomes(dataset: Dataset, shard: int, start: int, form: Form) -> list[Outcome]:
    """The outcomes of a shard whose first row is row `start` of the manifest.

    Raises:
        OutputError: a part of it cannot be read.
    """
    attention: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in dataset.attention_of(shard).to_pylist():
        attention[row["id"]].append(row)
    return [
        Outcome(
            start + i,
            row,
            attention[row["id"]] if row["status"] == "ok" else [],
            image=None if form.at_once or row["status"] != "ok" else dataset.image_bytes(row),
        )
        for i, row in enumerate(dataset.table(shard, _COLUMNS).to_pylist())
    ]
