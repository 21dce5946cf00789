"""The pictures of outputs, with the figures that metrics give them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.scores import Scores
from aae_batch.store.read_ahead import read_ahead

SETS = {
    "animals": "Animal-Animal",
    "animals-objects": "Animal-Object",
    "objects": "Object-Object",
}
"""Values of the manifest's column `set` that the paper has names for; others are their own."""

WITHOUT_SET = "all"

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
        return [self.part] if self.whole is None else [self.part, self.whole]

    def values(self, scores: pa.Table) -> np.ndarray:
        """[rows], float64: NaN where there is none."""
        if not {*self.columns} <= {*scores.column_names}:
            return np.full(scores.num_rows, np.nan)
        part, *rest = (pc.cast(scores[name], pa.float64()).to_numpy() for name in self.columns)
        for whole in rest:
            part = part / np.where(whole > 0, whole, np.nan)
        return part


def _share(metric: str, name: str, title: str, part: str, whole: str | None = None) -> Measure:
    return Measure(metric, name, title, part, whole, percent=True)


MEASURES = (
    Measure("clip", "clip_full", "Full prompt similarity", "clip_full"),
    Measure("clip", "clip_min_subject", "Minimum subject similarity", "clip_min_subject"),
    Measure("captions", "clip_caption", "Text-text similarity", "clip_caption"),
    _share("detector", "all_found", "All subjects found", "all_found"),
    _share("detector", "share_found", "Subjects found", "subjects_found", "subjects_named"),
    _share("detector", "all_bound", "All in their colours", "all_bound"),
    _share("attention", "neglected", "Neglect rate", "neglected"),
    Measure("attention", "min_max_attention", "Worst subject's attention", "min_max_attention"),
    _share("attention", "thresholds_met", "Thresholds met", "thresholds_met", "num_thresholds"),
    Measure("attention", "num_refinements", "Refinements", "num_refinements"),
)


_OWN = ("variant", "group", "prompt", "seed")
_FIGURES = tuple(measure.name for measure in MEASURES)


@dataclass(frozen=True)
class Variant:
    """What the table compares, a row each: a method, or, where several outputs have pictures by it, a
    method in one output.

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
        variants: the table's rows; `variant` says which of them a picture belongs to.
        groups: the table's columns, sets of prompts; `group` says which.
        prompt: the same number for the same prompt.
        form: the same number for the same size, steps and guidance scale.
        figures: by the names of measures; NaN where a picture has none.
        stale: scores that were left out, since they are of another picture or of other settings than
            those that are there by now.
    """

    variants: tuple[Variant, ...]
    groups: tuple[str, ...]
    variant: np.ndarray
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
    prompts, groups, variants = _Numbers(), _Numbers(), _Numbers()
    stale = 0
    metrics = {measure.metric for measure in MEASURES}.difference(without)
    for output, dataset in datasets.items():
        read = partial(_figures_of, dataset, Scores(dataset), metrics)
        for table, figures, left_out in read_ahead(read, dataset.shards()):
            stale += left_out
            methods = pc.binary_join_element_wise(table["method"], output, "\n")
            parts["variant"].append(variants.of(methods))
            parts["group"].append(groups.of(_groups(table)))
            parts["prompt"].append(prompts.of(table["prompt"]))
            for name in ("seed", *_FORM):
                parts[name].append(table[name].to_numpy())
            for name, values in figures.items():
                parts[name].append(values)
    none = [np.empty(0)]
    whole = {name: np.concatenate(parts.pop(name, none)) for name in (*_OWN, *_FORM, *_FIGURES)}
    return Pictures(
        _variants(variants.known),
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


def _variants(known: Collection[str]) -> tuple[Variant, ...]:
    pairs = [name.split("\n", 1) for name in known]
    outputs_of: dict[str, set[str]] = defaultdict(set)
    for method, output in pairs:
        outputs_of[method].add(output)
    return tuple(
        Variant(f"{method} ({output})" if len(outputs_of[method]) > 1 else method, method, output)
        for method, output in pairs
    )


def _groups(table: pa.Table) -> pa.ChunkedArray:
    if "set" not in table.column_names:
        return pa.chunked_array([[WITHOUT_SET] * table.num_rows], pa.string())
    words = (WITHOUT_SET if value is None else str(value) for value in table["set"].to_pylist())
    return pa.chunked_array([[SETS.get(word, word) for word in words]], pa.string())


def _figures_of(
    dataset: Dataset, scores: Scores, metrics: Collection[str], shard: int
) -> tuple[pa.Table, dict[str, np.ndarray], int]:
    """A shard's pictures, their figures by measure, and how many scores were left out."""
    table = dataset.table(shard, _COLUMNS)
    table = table.filter(pc.equal(table["status"], "ok"))
    figures = {measure.name: np.full(table.num_rows, np.nan) for measure in MEASURES}
    stale = 0
    for metric in metrics:
        measures = [measure for measure in MEASURES if measure.metric == metric]
        names = dict.fromkeys(name for measure in measures for name in measure.columns)
        found = scores.of(metric, shard, table, [*names])
        stale += found.stale
        if found.columns is not None:
            figures |= {measure.name: measure.values(found.columns) for measure in measures}
    return table, figures, stale
