"""The table that compares methods, as in section 5 of Attend-and-Excite, with intervals and differences.

It has a row per method and a column per set of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aae_batch.dataset.methods import method_order
from aae_batch.evaluate.bootstrap import Estimate, estimate
from aae_batch.evaluate.pictures import MEASURES, SETS, Measure, Pictures, Variant, numbered
from aae_batch.methods import BASELINE


@dataclass(frozen=True)
class Line:
    """A row of the table. For a difference, `minus` is the label of the row subtracted."""

    measure: Measure
    label: str
    minus: str | None
    cells: Mapping[str, Estimate | None]


@dataclass(frozen=True)
class Table:
    """All measures that have values.

    Attributes:
        groups: titles of the columns.
        stale: number of scores left out; see `Pictures`.
        notes: explanations of what is missing.
        constant: measures with one value in all images.
    """

    groups: tuple[str, ...]
    lines: tuple[Line, ...]
    stale: int = 0
    notes: tuple[str, ...] = ()
    constant: tuple[Measure, ...] = ()


def make_table(pictures: Pictures, notes: Sequence[str] = ()) -> Table:
    """Estimate every measure of every variant in every column, and the differences to the baselines."""
    variants, groups, prompts = pictures.variants, pictures.groups, pictures.prompt
    rows = sorted(
        range(len(variants)), key=lambda i: (method_order(variants[i].method), variants[i].label)
    )
    columns = sorted(range(len(groups)), key=lambda column: _group_order(groups[column]))
    places = {
        (row, column): np.flatnonzero((pictures.variant == row) & (pictures.group == column))
        for row in rows
        for column in columns
    }
    baselines = _baselines(variants, rows)
    pairs = numbered(prompts, pictures.form, pictures.seed)
    lines, constant = [], []
    for measure in MEASURES:
        values = pictures.figures[measure.name]
        if np.isnan(values).all():
            continue
        if len(np.unique(values[~np.isnan(values)])) == 1:
            constant.append(measure)
        for row in rows:
            means = {
                groups[column]: estimate(*(of[places[row, column]] for of in (values, prompts)))
                for column in columns
            }
            lines.append(Line(measure, variants[row].label, None, means))
        for row, other in baselines.items():
            differences = {
                groups[column]: paired_difference(
                    values, prompts, pairs, places[row, column], places[other, column]
                )
                for column in columns
            }
            lines.append(Line(measure, variants[row].label, variants[other].label, differences))
    unpaired = [_unpaired(pictures, pairs, *pair) for pair in baselines.items()] if lines else []
    notes = (*notes, *filter(None, unpaired))
    titles = tuple(groups[column] for column in columns)
    return Table(titles, (*lines,), pictures.stale, notes, (*constant,))


def paired_difference(
    values: np.ndarray, prompts: np.ndarray, pairs: np.ndarray, ours: np.ndarray, theirs: np.ndarray
) -> Estimate | None:
    """Estimate the mean of ours minus theirs over the pairs that both have, or return None without pairs.
    Several images of a side in one pair count as their mean.

    Args:
        values, prompts, pairs: [images]; images of one pair have the same number in `pairs`.
        ours, theirs: indices of the images on each side.
    """
    (our_pairs, our_means, first), (their_pairs, their_means, _) = (
        _by_pair(values, pairs, places) for places in (ours, theirs)
    )
    _, i, j = np.intersect1d(our_pairs, their_pairs, assume_unique=True, return_indices=True)
    return estimate(our_means[i] - their_means[j], prompts[first[i]])


def _by_pair(
    values: np.ndarray, pairs: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pair numbers, the mean value of each pair, and the index of its first image."""
    there = places[~np.isnan(values[places])]
    known, first, which = np.unique(pairs[there], return_index=True, return_inverse=True)
    means = np.bincount(which, weights=values[there]) / np.bincount(which)
    return known, means, there[first]


def _baselines(variants: Sequence[Variant], order: Sequence[int]) -> dict[int, int]:
    """Return the row to subtract from each row but the first: plain sampling in the same output, else the
    first row."""
    plain = {variants[row].output: row for row in order if variants[row].method == BASELINE}
    found = {}
    for row in order[1:]:
        own = plain.get(variants[row].output, row)
        found[row] = order[0] if own == row else own
    return found


def _unpaired(pictures: Pictures, pairs: np.ndarray, row: int, other: int) -> str | None:
    """Return why two rows that share prompts have no pairs; None if they have pairs or share no prompts."""
    ours, theirs = pictures.variant == row, pictures.variant == other

    def shared(numbers: np.ndarray) -> bool:
        return len(np.intersect1d(numbers[ours], numbers[theirs])) > 0

    if shared(pairs) or not shared(pictures.prompt):
        return None
    names = f"{pictures.variants[row].label} and {pictures.variants[other].label} have no pairs"
    if shared(numbered(pictures.prompt, pictures.seed)):
        return f"{names}: their sizes, steps or guidance_scale differ."
    return (
        f"{names}: their seeds differ; give the manifest a column seed, the same for each method."
    )


def _group_order(group: str) -> tuple[int, str]:
    known = list(SETS.values())
    return (known.index(group) if group in known else len(known)), group
