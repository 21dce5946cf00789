"""Reads the images of several outputs with their scores into arrays."""

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
"""Titles of values of the manifest's column `set`, as in the paper; other values are shown unchanged."""

WITHOUT_SET = "all"

_FORM = ("height", "width", "num_inference_steps", "guidance_scale")
"""Columns, besides prompt and seed, that must be equal for two images to be compared as a pair."""

_COLUMNS = ["id", "sha256", "status", "method", "prompt", "seed", "first_seed", "set", *_FORM]


@dataclass(frozen=True)
class Measure:
    """A quantity shown in the table.

    Attributes:
        metric: the metric whose scores it uses.
        part, whole: the score column, and the column to divide it by, if any. The value is missing if
            either is null or `whole` is 0.
        percent: whether to show it as a percentage.
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
        """Return [rows], float64, with NaN for missing values."""
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
    Measure("detector", "other_objects", "Other objects", "other_objects"),
    _share("attention", "neglected", "Neglect rate", "neglected"),
    Measure("attention", "min_max_attention", "Worst subject's attention", "min_max_attention"),
    _share("attention", "thresholds_met", "Thresholds met", "thresholds_met", "num_thresholds"),
    Measure("attention", "num_refinements", "Refinements", "num_refinements"),
)


@dataclass(frozen=True)
class Variant:
    """A row of the table: a method, or a method in one output if several outputs have it.

    Attributes:
        label: its name in the table.
    """

    label: str
    method: str
    output: str


@dataclass(frozen=True)
class Pictures:
    """Images as arrays with one entry per image; a million images take about 110 MB.

    Attributes:
        variants: rows of the table, indexed by `variant`.
        groups: columns of the table, which are sets of prompts, indexed by `group`.
        prompt: number of the prompt.
        form: number of the combination of size, steps and guidance scale.
        figures: measure name -> values, NaN if missing.
        stale: number of scores left out; see `dataset.scores.ShardScores`.
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
    """Read all images of several outputs.

    Args:
        datasets: label -> output.
        without: metrics whose scores are left out.

    Raises:
        OutputError: a table cannot be read.
    """
    metrics = {measure.metric for measure in MEASURES}.difference(without)
    tables, stale = [_SCHEMA.empty_table()], 0
    for output, dataset in datasets.items():
        read = partial(_read_shard, dataset, output, Scores(dataset), metrics)
        for table, left_out in read_ahead(read, dataset.shards()):
            tables.append(table)
            stale += left_out
    whole = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    variants, groups, prompts = (
        whole[name].combine_chunks() for name in ("variant", "group", "prompt")
    )
    return Pictures(
        _variants(variants.dictionary.to_pylist()),
        (*groups.dictionary.to_pylist(),),
        variant=variants.indices.to_numpy(),
        group=groups.indices.to_numpy(),
        prompt=prompts.indices.to_numpy(),
        seed=whole["seed"].to_numpy(),
        form=numbered(*(whole[name].to_numpy() for name in _FORM)),
        figures={measure.name: whole[measure.name].to_numpy() for measure in MEASURES},
        stale=stale,
    )


_WORDS = pa.dictionary(pa.int32(), pa.string())
_SCHEMA = pa.schema(
    [
        *((name, _WORDS) for name in ("variant", "group", "prompt")),
        *((name, pa.int64()) for name in ("seed", "height", "width", "num_inference_steps")),
        *((name, pa.float64()) for name in ("guidance_scale", *(m.name for m in MEASURES))),
    ]
)


def _read_shard(
    dataset: Dataset, output: str, scores: Scores, metrics: Collection[str], shard: int
) -> tuple[pa.Table, int]:
    """Return the images of a shard in `_SCHEMA`, and the number of scores left out."""
    table = dataset.table(shard, _COLUMNS)
    table = table.filter(pc.equal(table["status"], "ok"))
    columns = {name: table[name] for name in ("prompt", "seed", *_FORM)}
    if (
        "first_seed" in table.column_names
    ):  # rows that were tried again are paired by where they began
        columns["seed"] = pc.coalesce(table["first_seed"], table["seed"])
    columns["variant"] = pc.binary_join_element_wise(table["method"], output, "\n")
    sets = table["set"].to_pylist() if "set" in table.column_names else [None] * table.num_rows
    words = [WITHOUT_SET if value is None else str(value) for value in sets]
    columns["group"] = [SETS.get(word, word) for word in words]
    columns |= {measure.name: np.full(table.num_rows, np.nan) for measure in MEASURES}
    stale = 0
    for metric in metrics:
        measures = [measure for measure in MEASURES if measure.metric == metric]
        names = dict.fromkeys(name for measure in measures for name in measure.columns)
        found = scores.of(metric, shard, table, [*names])
        stale += found.stale
        if found.columns is not None and found.columns.num_columns:
            columns |= {measure.name: measure.values(found.columns) for measure in measures}
    return pa.table({field.name: columns[field.name] for field in _SCHEMA}).cast(_SCHEMA), stale


def numbered(*columns: np.ndarray) -> np.ndarray:
    """Number the distinct combinations of values in the columns."""
    numbers = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        values, places = np.unique(column, return_inverse=True)
        _, numbers = np.unique(numbers * len(values) + places, return_inverse=True)
    return numbers


def _variants(names: Collection[str]) -> tuple[Variant, ...]:
    pairs = [name.split("\n", 1) for name in names]
    outputs_of: dict[str, set[str]] = defaultdict(set)
    for method, output in pairs:
        outputs_of[method].add(output)
    return tuple(
        Variant(f"{method} ({output})" if len(outputs_of[method]) > 1 else method, method, output)
        for method, output in pairs
    )
