"""Methods compared: the table of Attend-and-Excite's section 5, with intervals and differences.

A row for each method, a column for each set of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aae_batch.evaluate.bootstrap import Estimate, estimate
from aae_batch.evaluate.pictures import MEASURES, SETS, Measure, Pictures, Row, numbered
from aae_batch.request import METHODS

BASELINE = "stable-diffusion"
"""The method that others are compared with, in their own output; where it has none, with the first row."""


@dataclass(frozen=True)
class Line:
    """A row of the table. `minus` names the other row where this is the difference to it."""

    measure: Measure
    label: str
    minus: str | None
    cells: Mapping[str, Estimate | None]


@dataclass(frozen=True)
class Table:
    """All measures of which there are figures; `groups` are the columns.

    Attributes:
        stale: scores that were left out; see `Pictures`.
        notes: what a reader should know about what is missing in it.
    """

    groups: tuple[str, ...]
    lines: tuple[Line, ...]
    stale: int = 0
    notes: tuple[str, ...] = ()


def make_table(pictures: Pictures, notes: Sequence[str] = ()) -> Table:
    """Every measure of every row in every column, and each row's difference to the baseline."""
    rows = sorted(range(len(pictures.rows)), key=lambda row: _order(pictures.rows[row]))
    labels = [row.label for row in pictures.rows]
    order = sorted(range(len(pictures.groups)), key=lambda g: _group_order(pictures.groups[g]))
    groups = {group: pictures.groups[group] for group in order}
    places = {
        (row, group): np.flatnonzero((pictures.row == row) & (pictures.group == group))
        for row in rows
        for group in groups
    }
    baselines = _baselines(pictures.rows, rows)
    pairs = numbered(pictures.prompt, pictures.form, pictures.seed)
    lines = []
    for measure in MEASURES:
        values = pictures.figures[measure.name]
        if np.isnan(values).all():
            continue
        for row in rows:
            means = {
                name: _mean(values, pictures.prompt, places[row, group])
                for group, name in groups.items()
            }
            lines.append(Line(measure, labels[row], None, means))
        for row, other in baselines.items():
            differences = {
                name: paired_difference(
                    values, pictures.prompt, pairs, places[row, group], places[other, group]
                )
                for group, name in groups.items()
            }
            lines.append(Line(measure, labels[row], labels[other], differences))
    unpaired = [_unpaired(pictures, pairs, *pair) for pair in baselines.items()] if lines else []
    notes = (*notes, *(note for note in unpaired if note is not None))
    return Table((*groups.values(),), (*lines,), pictures.stale, notes)


def paired_difference(
    values: np.ndarray, prompts: np.ndarray, pairs: np.ndarray, ours: np.ndarray, theirs: np.ndarray
) -> Estimate | None:
    """Ours minus theirs, over the pairs that both have; None where there are none. Where one has
    several pictures of a pair, their mean counts.

    Args:
        values, prompts, pairs: [pictures]; pictures of one pair have the same number in `pairs`.
        ours, theirs: which of the pictures.
    """
    one, other = (_by_pair(values, pairs, places) for places in (ours, theirs))
    _, mine, its = np.intersect1d(one.pairs, other.pairs, assume_unique=True, return_indices=True)
    return estimate(one.means[mine] - other.means[its], prompts[one.first[mine]])


@dataclass(frozen=True)
class _Paired:
    """Numbers of pairs, each with the mean of its pictures and the place of its first one."""

    pairs: np.ndarray
    means: np.ndarray
    first: np.ndarray


def _by_pair(values: np.ndarray, pairs: np.ndarray, places: np.ndarray) -> _Paired:
    there = places[~np.isnan(values[places])]
    known, first, which = np.unique(pairs[there], return_index=True, return_inverse=True)
    means = np.bincount(which, weights=values[there]) / np.bincount(which)
    return _Paired(known, means, there[first])


def _mean(values: np.ndarray, prompts: np.ndarray, places: np.ndarray) -> Estimate | None:
    there = places[~np.isnan(values[places])]
    return estimate(values[there], prompts[there])


def _baselines(rows: Sequence[Row], order: Sequence[int]) -> dict[int, int]:
    """Of every row but the first, the one that it is compared with: plain sampling of the same output,
    else the first."""
    plain = {rows[row].output: row for row in order if rows[row].method == BASELINE}
    found = {}
    for row in order[1:]:
        own = plain.get(rows[row].output, row)
        found[row] = order[0] if own == row else own
    return found


def _unpaired(pictures: Pictures, pairs: np.ndarray, row: int, other: int) -> str | None:
    """Why two rows have no pairs though they have prompts in common; None where they have some."""
    ours, theirs = pictures.row == row, pictures.row == other

    def shared(numbers: np.ndarray) -> bool:
        return len(np.intersect1d(numbers[ours], numbers[theirs])) > 0

    if shared(pairs) or not shared(pictures.prompt):
        return None
    names = f"{pictures.rows[row].label} and {pictures.rows[other].label} have no pairs"
    if shared(numbered(pictures.prompt, pictures.seed)):
        return f"{names}: their sizes, steps or guidance_scale differ."
    return (
        f"{names}: their seeds differ; give the manifest a column seed, the same for each method."
    )


def _order(row: Row) -> tuple[bool, int, str]:
    """The baseline first, then in the order of methods."""
    place = METHODS.index(row.method) if row.method in METHODS else len(METHODS)
    return row.method != BASELINE, place, row.label


def _group_order(group: str) -> tuple[int, str]:
    known = list(SETS.values())
    return (known.index(group) if group in known else len(known)), group
