"""The pictures of outputs, with the figures that metrics give them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from aae_batch.dataset import layout
from aae_batch.dataset.reader import Dataset

SETS = {
    "animals": "Animal-Animal",
    "animals-objects": "Animal-Object",
    "objects": "Object-Object",
}
"""Values of the manifest's column `set` that the paper has names for; others are their own."""

WITHOUT_SET = "all"

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """A figure of the table.

    Attributes:
        metric: whose scores it is made from.
        value: a picture's, given its scores; None where it has none.
        percent: it is a share.
    """

    metric: str
    name: str
    title: str
    value: Callable[[Values], float | None]
    percent: bool = False


def _column(name: str) -> Callable[[Values], float | None]:
    return lambda scores: None if scores.get(name) is None else float(scores[name])


def _share(part: str, whole: str) -> Callable[[Values], float | None]:
    return lambda scores: scores[part] / scores[whole] if scores.get(whole) else None


MEASURES = (
    Measure("clip", "clip_full", "Full prompt similarity", _column("clip_full")),
    Measure("clip", "clip_min_subject", "Minimum subject similarity", _column("clip_min_subject")),
    Measure("captions", "clip_caption", "Text-text similarity", _column("clip_caption")),
    Measure("detector", "all_found", "All subjects found", _column("all_found"), percent=True),
    Measure(
        "detector",
        "share_found",
        "Subjects found",
        _share("subjects_found", "subjects_named"),
        percent=True,
    ),
    Measure("detector", "all_bound", "All in their colours", _column("all_bound"), percent=True),
    Measure("attention", "neglected", "Neglect rate", _column("neglected"), percent=True),
    Measure(
        "attention", "min_max_attention", "Worst subject's attention", _column("min_max_attention")
    ),
    Measure(
        "attention",
        "thresholds_met",
        "Thresholds met",
        _share("thresholds_met", "num_thresholds"),
        percent=True,
    ),
    Measure("attention", "num_refinements", "Refinements", _column("num_refinements")),
)


@dataclass(frozen=True)
class Picture:
    """One picture with its figures.

    Attributes:
        label: the row of the table that it belongs to: its method, and, where several outputs have
            pictures of that method, its output.
        group: the column of the table: its set of prompts.
        figures: by the names of measures; those that it has.
    """

    method: str
    label: str
    group: str
    prompt: str
    seed: int
    figures: Mapping[str, float]


def read_pictures(datasets: Mapping[str, Dataset]) -> tuple[list[Picture], int]:
    """All pictures of some outputs, and how many scores were left out since their picture is
    another by now.

    Args:
        datasets: outputs by the names that tell them apart.
    """
    found: list[tuple[str, Picture]] = []
    outputs_of: dict[str, set[str]] = defaultdict(set)
    stale = 0
    for name, dataset in datasets.items():
        for picture, old in _pictures(dataset):
            found.append((name, picture))
            outputs_of[picture.method].add(name)
            stale += old
    pictures = [
        replace(picture, label=f"{picture.method} ({name})")
        if len(outputs_of[picture.method]) > 1
        else picture
        for name, picture in found
    ]
    return pictures, stale


def _pictures(dataset: Dataset) -> Iterator[tuple[Picture, int]]:
    """Each picture of an output, and how many of its scores are of an earlier one."""
    scored = {metric: set(dataset.scored_shards(metric)) for metric in dataset.metrics()}
    runs = {metric: dataset.metric_fingerprint(metric) for metric in scored}
    columns = ["id", "sha256", "status", "method", "prompt", "seed", "set"]
    for shard in dataset.shards():
        tables: dict[str, dict[str, Values]] = {}
        for metric, there in scored.items():
            if shard in there:
                table, marks = dataset.marked_scores_of(metric, shard)
                same_run = marks.get(layout.SCORES_FINGERPRINT) == runs[metric]
                # Of another run's scores, it only counts how many there are.
                of_run = (
                    table.to_pylist()
                    if same_run
                    else [row | {"sha256": None} for row in table.to_pylist()]
                )
                tables[metric] = {row["id"]: row for row in of_run}
        for row in dataset.table(shard, columns).to_pylist():
            if row["status"] != "ok":
                continue
            scores = {
                metric: rows[row["id"]] for metric, rows in tables.items() if row["id"] in rows
            }
            fresh = {m: score for m, score in scores.items() if score["sha256"] == row["sha256"]}
            yield _picture(row, fresh), len(scores) - len(fresh)


def _picture(row: Mapping[str, Any], scores: Mapping[str, Values]) -> Picture:
    group = WITHOUT_SET if row.get("set") is None else str(row["set"])
    given = {m.name: m.value(scores[m.metric]) for m in MEASURES if m.metric in scores}
    return Picture(
        method=row["method"],
        label=row["method"],
        group=SETS.get(group, group),
        prompt=row["prompt"],
        seed=row["seed"],
        figures={name: value for name, value in given.items() if value is not None},
    )
