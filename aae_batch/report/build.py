"""Build the report page of a dataset, complete or not. Besides the images the page needs no other file.

The dataset is read one shard at a time. The figures cover all rows, the cards only the first.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from aae_batch.dataset.heatmap import colour_map
from aae_batch.dataset.methods import losses_compare, method_order, shown_settings, thresholds_of
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.run_record import own_columns, tries_again
from aae_batch.dataset.scores import Scores
from aae_batch.errors import OutputError
from aae_batch.report.figures import Figures, is_share
from aae_batch.report.metrics import judged
from aae_batch.report.rows import COLUMNS, Rows, linked
from aae_batch.report.thumbnails import Thumbnails
from aae_batch.report.tries import OF_ROWS, TRIES, TryFigures, tries_by_row
from aae_batch.store.base import is_url

LIMIT_LINKED, LIMIT_EMBEDDED = 10_000, 2_000
"""Rows shown by default. An embedded image takes 5 to 20 KB of the page."""

_SCRIPTS = (
    *("data.js", "filters.js", "compare.js", "attention.js", "cards.js", "choices.js", "page.js"),
)
"""Parts of the page's one script, in order: each may use the constants of those before it, and the functions
of all."""

_PICTURES_A_BLOCK = 64
_LABELS = {
    "final_loss": "final loss",
    "neglected": "neglected",
    "num_refinements": "refinements",
    "forwards": "forwards",
    "seconds": "latency, s",
}
_NOT_PIXELS = ("rows", "manifest", "shard_size", "layout", "started")


@dataclass
class Page:
    """The contents of a page.

    Attributes:
        run: the contents of `run.json`.
        figures: over all committed rows.
        rows: the rows shown.
        pictures: the embedded images, WebP in base64; empty if the page links to images.
        unreadable: number of images that could not be read.
        root: URL of the output, empty for a folder: its path means nothing to whom the page is sent.
    """

    run: dict[str, Any]
    figures: Figures = field(default_factory=Figures)
    rows: Rows = field(default_factory=Rows)
    pictures: list[str] = field(default_factory=list)
    unreadable: int = 0
    root: str = ""


def collect(
    dataset: Dataset,
    limit: int | None = None,
    embed: bool = False,
    side: int = 256,
    prefix: str = "",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Page:
    """Read what the page shows.

    Args:
        limit: number of rows to show, from the start of the manifest; default: `LIMIT_LINKED`, or
            `LIMIT_EMBEDDED` with embedded images, as those of rejected tries always are.
        embed: embed images instead of linking to them. Layouts other than `files` have no image files
            to link to, and always embed.
        side: pixels of an embedded image's longer side.
        prefix: path from the page's folder to the output root, empty or ending in `/`.
        on_progress: called with (done, total) shards.

    Raises:
        OutputError: the output has no run, or a table cannot be read.
    """
    run = dataset.run
    if run is None:
        raise OutputError(
            f"There is no run in {dataset.storage.root}: check the path, or wait until it begins."
        )
    embed = embed or run["layout"] != "files"
    rule = run["settings"]["acceptance"] if tries_again(run) else None
    if limit is None:
        embeds = embed or (rule is not None and rule["keep_rejected"])
        limit = LIMIT_EMBEDDED if embeds else LIMIT_LINKED
    page = Page(run, Figures(tries=rule and TryFigures(rule)))
    thumbnails = Thumbnails(dataset, side)
    scores = Scores(dataset)
    shards = dataset.shards()
    for done, shard in enumerate(shards, 1):
        table = dataset.table(shard, own_columns(run, [*COLUMNS, *(OF_ROWS if rule else ())]))
        tries = dataset.tries_of(shard, TRIES) if rule else None
        verdicts = judged(scores, shard, table)
        page.figures.add(table, verdicts, tries)
        shown = table.slice(0, limit - len(page.rows))
        if shown.num_rows:
            attention = dataset.attention_of(shard)
            by_row = {} if tries is None else tries_by_row(dataset, shard, shown, tries, thumbnails)
            locate = thumbnails if embed else linked(prefix)
            page.rows.add(shown, attention, verdicts, locate, by_row)
        on_progress(done, len(shards))
    page.pictures, page.unreadable = thumbnails.held, thumbnails.unreadable
    page.root = dataset.storage.root if is_url(dataset.storage.root) else ""
    return page


def render(page: Page, name: str) -> bytes:
    """Return the page as HTML.

    Args:
        name: title of the dataset, e.g. its root.
    """
    environment = Environment(
        loader=PackageLoader("aae_batch.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = files("aae_batch.report") / "page"
    script = "\n".join((folder / name).read_text("utf-8") for name in _SCRIPTS)
    style = (folder / "page.css").read_text("utf-8")
    figures, run = page.figures, page.run
    shown = {**run, "settings": shown_settings(run, figures.methods())}
    text = environment.get_template("page.html").render(
        name=name,
        run=run,
        settings=list(_flat({k: v for k, v in shown.items() if k not in _NOT_PIXELS})),
        figures=figures,
        failures=sorted(figures.failures.items(), key=lambda item: -item[1].count),
        columns=figures.telling(),
        labels=_LABELS,
        digits={"num_refinements": 1, "forwards": 1, "seconds": 1},
        is_share=is_share,
        apart=figures.apart(),
        shown=len(page.rows),
        unreadable=page.unreadable,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(style),
        data=_packed(json.dumps(_data(page), separators=(",", ":"), allow_nan=False).encode()),
        curves=_packed(page.rows.curves),
        maps=_packed(page.rows.maps),
        times=[_packed(block) for block in page.rows.times],
        pictures=[
            Markup(json.dumps(page.pictures[i : i + _PICTURES_A_BLOCK]))
            for i in range(0, len(page.pictures), _PICTURES_A_BLOCK)
        ],
    )
    return text.encode()


def _data(page: Page) -> dict[str, Any]:
    """Return the data that `data.js` reads; it documents the format."""
    rows = page.rows
    methods = sorted(set(rows.columns["method"]) - {None}, key=method_order)
    return {
        "rows": rows.columns,
        "attention": {
            name: values for name, values in rows.attention.items() if name != "times" or rows.times
        },
        "tries": rows.tries,
        "by": page.figures.tries.rule["by"] if page.figures.tries else None,
        "scores": [
            {"name": score.name, "label": score.label, "text": score.is_text, "values": values}
            for score, values in rows.scores.items()
        ],
        "methods": methods,
        "apart": page.figures.apart(),
        "lossesCompare": losses_compare(methods),
        "dataset": f"{page.run['fingerprint']} {page.run['started']}",
        "root": page.root,
        "thresholds": list(thresholds_of(page.run).items()),
        "picturesABlock": _PICTURES_A_BLOCK,
        "ramp": colour_map().tolist(),
    }


def _packed(data: bytes | bytearray) -> str:
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the settings that are set, as dotted names and text."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
