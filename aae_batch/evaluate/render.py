"""Formats the table as text, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from itertools import groupby

from aae_batch.errors import counted
from aae_batch.evaluate.bootstrap import LEAST_PROMPTS, Estimate
from aae_batch.evaluate.pictures import WITHOUT_SET
from aae_batch.evaluate.table import Line, Table

CSV_COLUMNS = (
    *("metric", "measure", "method", "minus", "set"),
    *("mean", "low", "high", "pictures", "prompts"),
)


def as_text(table: Table) -> str:
    """Format for a terminal: a block per measure, then notes on how to read it."""
    rows = [_row(line, table) for line in table.lines]
    widths = [max(map(len, column)) for column in zip(["", *table.groups], *rows, strict=True)]
    text = []
    for measure, lines in groupby(table.lines, lambda line: line.measure):
        if measure in table.constant:  # the notes have it
            continue
        text.append(f"{measure.title} ({measure.metric})")
        if table.groups != (WITHOUT_SET,):
            text.append(_spread(["", *table.groups], widths))
        text += [_spread(_row(line, table), widths) for line in lines]
        text.append("")
    return "\n".join([*text, *_notes(table)])


def _notes(table: Table) -> list[str]:
    notes = []
    everything = [cell for line in table.lines for cell in line.cells.values() if cell is not None]
    if any(not math.isnan(cell.low) for cell in everything):
        notes.append("Mean with 95 % interval, by a bootstrap over prompts.")
    if any(math.isnan(cell.low) for cell in everything):
        notes.append(
            f"Without an interval: fewer than {LEAST_PROMPTS} prompts, or all prompts the same."
        )
    if any(line.minus for line in table.lines):
        notes.append(
            "minus: the paired difference, over the prompts and seeds that both have, at the same size, "
            "steps and guidance scale."
        )
    for group in table.groups:
        cells = [cell for line in table.lines if (cell := line.cells[group]) is not None]
        pictures = max((cell.pictures for cell in cells), default=0)
        prompts = max((cell.prompts for cell in cells), default=0)
        some = f"{counted(pictures, 'image')} of {counted(prompts, 'prompt')}"
        notes.append(f"{group}: up to {some} in a row.")
    for measure in table.constant:
        lines = [line for line in table.lines if line.measure == measure and line.minus is None]
        known = (cell for line in lines for cell in line.cells.values() if cell is not None)
        value = _mean(next(known), lines[0])
        whole = "" if all(any(line.cells.values()) for line in lines) else " with one"
        notes.append(f"{measure.title} ({measure.metric}): {value} in every image{whole}.")
    if table.stale:
        notes.append(
            f"{table.stale} scores are left out, since their images or the metric's settings have "
            "changed: score again."
        )
    return [*notes, *table.notes]


def as_csv(table: Table) -> str:
    """Format as CSV: a line per cell, in full precision.

    Shares are in [0, 1]; an interval that is not known is empty. A name that a spreadsheet would read as
    a formula is prefixed with an apostrophe.
    """
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for line in table.lines:
        for group, cell in line.cells.items():
            if cell is not None:
                names = (
                    line.measure.metric,
                    line.measure.name,
                    line.label,
                    line.minus or "",
                    group,
                )
                limits = ["" if math.isnan(end) else end for end in (cell.low, cell.high)]
                writer.writerow(
                    [*map(_not_a_formula, names), cell.mean, *limits, cell.pictures, cell.prompts]
                )
    return sink.getvalue()


def _not_a_formula(name: str) -> str:
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def as_latex(table: Table) -> str:
    r"""Format as a LaTeX `tabular` for `\input`; it needs the package booktabs."""
    width = 1 + len(table.groups)
    out = [rf"\begin{{tabular}}{{l{'c' * (width - 1)}}}", r"\toprule"]
    out.append(_latex_row(["", *table.groups]))
    for measure, lines in groupby(table.lines, lambda line: line.measure):
        out.append(r"\midrule")
        out.append(rf"\multicolumn{{{width}}}{{l}}{{\emph{{{_escaped(measure.title)}}}}} \\")
        out += [_latex_row(_row(line, table)) for line in lines]
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}", ""])


def _row(line: Line, table: Table) -> list[str]:
    name = line.label if line.minus is None else f"{line.label} minus {line.minus}"
    return [name, *(_cell(line.cells[group], line) for group in table.groups)]


def _cell(cell: Estimate | None, line: Line) -> str:
    if cell is None:
        return "-"
    mean = _mean(cell, line)
    if math.isnan(cell.low):
        return mean
    return f"{mean} [{_number(cell.low, line)}, {_number(cell.high, line)}]"


def _mean(cell: Estimate, line: Line) -> str:
    return _number(cell.mean, line) + (" %" if line.measure.percent else "")


def _number(value: float, line: Line) -> str:
    scale, digits = (100, 1) if line.measure.percent else (1, 3)
    return f"{scale * value:{'+' if line.minus else ''}.{digits}f}"


def _spread(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _latex_row(cells: Sequence[str]) -> str:
    first, *others = (_escaped(cell) for cell in cells)
    if first.startswith(("[", "*")):  # else it is read as an argument of the preceding \\
        first = f"{{{first[0]}}}{first[1:]}"
    return " & ".join([first, *others]) + r" \\"


_ESCAPES = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def _escaped(text: str) -> str:
    return "".join(_ESCAPES.get(character, character) for character in text)
