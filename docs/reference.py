"""Writes `docs/reference.md` from the code: `make reference`. A test compares the two."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
from typer.models import OptionInfo

from aae_batch import cli
from aae_batch.columns import IMAGE_COLUMN, MANIFEST_COLUMNS, OUTCOME_COLUMNS, TRIES_COLUMNS
from aae_batch.dataset.layout import ATTENTION_SCHEMA, MAPS_COLUMNS, TRIES_SCHEMA

PAGE = Path(__file__).parent / "reference.md"
OPTION = "| option | default | |"
COLUMN = "| column | type | |"


def reference() -> str:
    """The page, as Markdown."""
    return "\n".join(
        [
            "# Reference",
            "",
            "Made from the code by `make reference`.",
            "",
            *_section("Options of `aae-batch generate`", OPTION, _options(cli.generate)),
            *_section("Options of `aae-batch evaluate`", OPTION, _options(cli.evaluate)),
            *_section("Columns of a manifest", COLUMN, _columns(MANIFEST_COLUMNS)),
            "Only `prompt` is required. In `metadata` the same columns hold the values as used.",
            "",
            *_section("Columns that a run adds in `metadata`", COLUMN, _columns(OUTCOME_COLUMNS)),
            *_section(
                "Column of images, with `--layout parquet`", COLUMN, _columns([IMAGE_COLUMN])
            ),
            *_section(
                "Columns in `metadata`, with `--accept` or `--best-of`",
                COLUMN,
                _columns(TRIES_COLUMNS),
            ),
            *_section("Columns of `tries`", COLUMN, _columns(TRIES_SCHEMA)),
            *_section("Columns of `attention`", COLUMN, _columns(ATTENTION_SCHEMA)),
            *_section(
                "Columns of `attention`, with `--attention-maps every:N`",
                COLUMN,
                _columns(MAPS_COLUMNS),
            ),
        ]
    )


def _section(title: str, header: str, rows: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    yield from (f"## {title}", "", header, "|---|---|---|")
    for cells in rows:
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
    yield ""


def _options(command: Any) -> Iterator[tuple[str, str, str]]:
    """Each argument and option, its default, and its meaning."""
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        _, option = get_args(parameter.annotation)
        is_option = isinstance(option, OptionInfo)
        shown = f"`--{name.replace('_', '-')}`" if is_option else f"`{name.upper()}`"
        if is_option and option.param_decls:
            shown = f"`{option.param_decls[0]}`"
        default = parameter.default
        if isinstance(option.show_default, str):
            default = option.show_default
        elif default is inspect.Parameter.empty:
            default = "required"
        yield shown, _said(default), option.help


def _said(default: Any) -> str:
    return {None: "", False: "off", True: "on"}.get(default, str(default))


def _columns(fields: Iterable[pa.Field]) -> Iterator[tuple[str, str, str]]:
    for field in fields:
        yield f"`{field.name}`", f"`{field.type}`", field.metadata[b"description"].decode()


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
