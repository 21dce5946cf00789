"""The pictures of outputs, with the figures that metrics give them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aae_batch.dataset import layout
from aae_batch.dataset.reader import Dataset

SETS = {
    "animals": "Animal-Animal",
    "animals-objects": "Animal-Object",
    "objects": "Object-Object",
}
"""Values of the manifest's column `set` that the paper has names for; others are their own."""

WITHOUT_SET = "all"

READERS = 8
"""Shards that are read at a time."""

_FORM = ("height", "width", "num_inference_steps", "guidance_scale")
"""What besides prompt and seed has to be the same in two pictures that are compared as a pair."""

_COLUMNS = ["id", "sha256", "status", "method", "prompt", "seed", "set", *_FORM]


@dataclass(frozen=True)
class Measure:
    """A figure of the table.

    Attributes:
        metric: whose scores it is made from.
        part, whole: the column of its values, and the one that they are divided by, if any. Where
            either is null, or `whole` is 0, a picture has none.
        percent: it is a share.
    """

    metric: str
    name: str
    title: str
    part: str
    whole: str | None = None
    percent: bool = False

    @property
    def columns(self) -> list[str]:
        return [name for name in (self.part, self.whole) if name is not None]

    def values(self, scores: pa.Table) -> np.ndarray:
        """[rows], float64: NaN where there is none."""
        if not {*self.columns} <= {*scores.column_names}:
            return np.full(scores.num_rows, np.nan)
        part, *rest = (_floats(scores[name]) for name in self.columns)
        for whole in rest:
            part = part / np.where(whole > 0, whole, np.nan)
        return part


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return pc.cast(column, pa.float64()).to_numpy()


MEASURES = (
    Measure("clip", "clip_full", "Full prompt similarity", "clip_full"),
    Measure("clip", "clip_min_subject", "Minimum subject similarity", "clip_min_subject"),
    Measure("captions", "clip_caption", "Text-text similarity", "clip_caption"),
    Measure("detector", "all_found", "All subjects found", "all_found", percent=True),
    Measure(
        "detector",
        "share_found",
        "Subjects found",
        "subjects_found",
        "subjects_named",
        percent=True,
    ),
    Measure("detector", "all_bound", "All in their colours", "all_bound", percent=True),
    Measure("attention", "neglected", "Neglect rate", "neglected", percent=True),
    Measure("attention", "min_max_attention", "Worst subject's attention", "min_max_attention"),
    Measure(
        "attention",
        "thresholds_met",
        "Thresholds met",
        "thresholds_met",
        "num_thresholds",
        percent=True,
    ),
    Measure("attention", "num_refinements", "Refinements", "num_refinements"),
)


_OWN = ("row", "group", "prompt", "seed")
_FIGURES = tuple(measure.name for measure in MEASURES)


@dataclass(frozen=True)
class Row:
    """A row of the table: a method, and, where several outputs have pictures of it, its output.

    Attributes:
        label: what the table calls it.
    """

    label: str
    method: str
    output: str


@dataclass(frozen=True)
class Pictures:
    """Pictures in columns, which have an entry for each: a million of them are about 110 MB.

    Attributes:
        rows: of the table; `row` says which of them a picture belongs to.
        groups: the table's columns, sets of prompts; `group` says which.
        prompt: the same number for the same prompt.
        form: the same number for the same size, steps and guidance scale.
        figures: by the names of measures; NaN where a picture has none.
        stale: scores that were left out, since they are of another picture or of other settings than
            those that are there by now.
    """

    rows: tuple[Row, ...]
    groups: tuple[str, ...]
    row: np.ndarray
    group: np.ndarray
    prompt: np.ndarray
    seed: np.ndarray
    form: np.ndarray
    figures: Mapping[str, np.ndarray]
    stale: int = 0


def read_pictures(datasets: Mapping[str, Dataset], without: Collection[str] = ()) -> Pictures:
    """All pictures of some outputs.

    Args:
        datasets: outputs by the names that tell them apart.
        without: metrics whose scores are left out.

    Raises:
        OutputError: a table cannot be read.
    """
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    prompts, groups, rows = _Numbers(), _Numbers(), _Numbers()
    stale = 0
    for output, dataset in datasets.items():
        for table, scores, old in _shards(dataset, without):
            stale += old
            methods = pc.binary_join_element_wise(table["method"], output, "\n")
            parts["row"].append(rows.of(methods))
            parts["group"].append(groups.of(_groups(table)))
            parts["prompt"].append(prompts.of(table["prompt"]))
            for name in ("seed", *_FORM):
                parts[name].append(table[name].to_numpy())
            for name, values in scores.items():
                parts[name].append(values)
    none = [np.empty(0)]
    whole = {name: np.concatenate(parts.pop(name, none)) for name in (*_OWN, *_FORM, *_FIGURES)}
    return Pictures(
        _rows(rows.known),
        (*groups.known,),
        **{name: whole[name] for name in _OWN},
        form=numbered(*(whole.pop(name) for name in _FORM)),
        figures={name: whole[name] for name in _FIGURES},
        stale=stale,
    )


def numbered(*columns: np.ndarray) -> np.ndarray:
    """Numbers that are the same where all of the columns are."""
    numbers = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        values, places = np.unique(column, return_inverse=True)
        _, numbers = np.unique(numbers * len(values) + places, return_inverse=True)
    return numbers


class _Numbers:
    """Words as numbers, in the order in which they came first."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def of(self, words: pa.ChunkedArray) -> np.ndarray:
        encoded = words.combine_chunks().dictionary_encode()
        numbers = [
            self.known.setdefault(word, len(self.known)) for word in encoded.dictionary.to_pylist()
        ]
        return np.array(numbers, np.int32)[encoded.indices.to_numpy()]


def _rows(known: Collection[str]) -> tuple[Row, ...]:
    pairs = [name.split("\n", 1) for name in known]
    outputs_of: dict[str, set[str]] = defaultdict(set)
    for method, output in pairs:
        outputs_of[method].add(output)
    return tuple(
        Row(f"{method} ({output})" if len(outputs_of[method]) > 1 else method, method, output)
        for method, output in pairs
    )


def _groups(table: pa.Table) -> pa.ChunkedArray:
    if "set" not in table.column_names:
        return pa.chunked_array([[WITHOUT_SET] * table.num_rows], pa.string())
    words = (WITHOUT_SET if value is None else str(value) for value in table["set"].to_pylist())
    return pa.chunked_array([[SETS.get(word, word) for word in words]], pa.string())


# --- one output ---

Shard = tuple[pa.Table, dict[str, np.ndarray], int]
"""Its pictures, their figures by measure, and how many scores were left out."""


def _shards(dataset: Dataset, without: Collection[str]) -> Iterator[Shard]:
    metrics = {measure.metric for measure in MEASURES}.difference(without)
    scored = {metric: {*dataset.scored_shards(metric)} for metric in metrics}
    runs = {metric: dataset.metric_fingerprint(metric) for metric, there in scored.items() if there}

    def read(shard: int) -> Shard:
        table = dataset.table(shard, _COLUMNS)
        table = table.filter(pc.equal(table["status"], "ok"))
        figures = {m.name: np.full(table.num_rows, np.nan) for m in MEASURES}
        stale = 0
        for metric, run in runs.items():
            if shard in scored[metric]:
                found, old = _figures(dataset, table, metric, run, shard)
                figures |= found
                stale += old
        return table, figures, stale

    shards = dataset.shards()
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(shards), 8 * READERS):  # those that are read wait in memory
            yield from pool.map(read, shards[start : start + 8 * READERS])


def _figures(
    dataset: Dataset, pictures: pa.Table, metric: str, run: str | None, shard: int
) -> tuple[dict[str, np.ndarray], int]:
    """What the scores of a metric's run make of a shard's pictures, and how many scores are of others."""
    measures = [measure for measure in MEASURES if measure.metric == metric]
    names = dict.fromkeys(name for measure in measures for name in measure.columns)
    table, marks = dataset.marked_scores_of(metric, shard, ["id", "sha256", *names])
    scored = pc.index_in(pictures["id"].combine_chunks(), value_set=table["id"].combine_chunks())
    there = table["sha256"].combine_chunks().take(scored)
    same = pc.fill_null(pc.equal(pictures["sha256"].combine_chunks(), there), False)
    if marks.get(layout.SCORES_FINGERPRINT) != run:
        same = pc.and_(same, False)
    fresh = pc.if_else(same, scored, None)
    scores = table.take(fresh)
    stale = fresh.null_count - scored.null_count
    return {measure.name: measure.values(scores) for measure in measures}, stale
