"""Methods compared: the table of Attend-and-Excite's section 5, with intervals and differences.

A row for each method, a column for each set of prompts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aae_batch.evaluate.bootstrap import Estimate, estimate
from aae_batch.evaluate.pictures import MEASURES, SETS, Measure, Picture
from aae_batch.request import METHODS

BASELINE = "stable-diffusion"
"""The method that others are compared with; where it is not there, the first."""


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
        stale: scores that were left out since their picture is another by now.
    """

    groups: tuple[str, ...]
    lines: tuple[Line, ...]
    stale: int = 0


def make_table(pictures: Sequence[Picture], stale: int = 0) -> Table:
    """Every measure of every row in every column, and each row's difference to the baseline."""
    cells: dict[tuple[str, str], list[Picture]] = defaultdict(list)
    for picture in pictures:
        cells[picture.label, picture.group].append(picture)
    labels = _rows(pictures)
    groups = tuple(sorted({picture.group for picture in pictures}, key=_group_order))
    lines = []
    for measure in MEASURES:
        if not any(measure.name in picture.figures for picture in pictures):
            continue
        for label in labels:
            means = {group: _mean(cells[label, group], measure) for group in groups}
            lines.append(Line(measure, label, None, means))
        for label in labels[1:]:
            differences = {
                group: paired_difference(cells[label, group], cells[labels[0], group], measure)
                for group in groups
            }
            lines.append(Line(measure, label, labels[0], differences))
    return Table(groups, tuple(lines), stale)


def paired_difference(
    ours: Sequence[Picture], theirs: Sequence[Picture], measure: Measure
) -> Estimate | None:
    """Ours minus theirs, over the prompts and seeds that both have; None where there are none."""
    one, other = _by_pair(ours, measure), _by_pair(theirs, measure)
    both = [pair for pair in one if pair in other]
    return estimate([one[pair] - other[pair] for pair in both], [prompt for prompt, _ in both])


def _by_pair(pictures: Sequence[Picture], measure: Measure) -> dict[tuple[str, int], float]:
    """The measure by prompt and seed; the mean where a pair has several pictures."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for picture in pictures:
        if measure.name in picture.figures:
            found[picture.prompt, picture.seed].append(picture.figures[measure.name])
    return {pair: sum(values) / len(values) for pair, values in found.items()}


def _mean(pictures: Sequence[Picture], measure: Measure) -> Estimate | None:
    there = [picture for picture in pictures if measure.name in picture.figures]
    return estimate([p.figures[measure.name] for p in there], [p.prompt for p in there])


def _rows(pictures: Sequence[Picture]) -> list[str]:
    """The labels, the baseline's first, then in the order of methods."""
    methods = {picture.label: picture.method for picture in pictures}

    def order(label: str) -> tuple[bool, int, str]:
        method = methods[label]
        place = METHODS.index(method) if method in METHODS else len(METHODS)
        return method != BASELINE, place, label

    return sorted(methods, key=order)


def _group_order(group: str) -> tuple[int, str]:
    known = list(SETS.values())
    return (known.index(group) if group in known else len(known)), group
