"""`aae-batch manifest validate`: find rows that would fail, before paying for a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from aae_batch.cli.common import COMPLETE, WITH_FAILURES
from aae_batch.cli.options import settings_command
from aae_batch.errors import counted

if TYPE_CHECKING:
    from aae_batch.manifest.judge import Judge
    from aae_batch.manifest.price import Quote
    from aae_batch.manifest.validate import Problem, Summary


@settings_command()
def validate(
    context: typer.Context,
    manifest: Annotated[str, typer.Argument(help="Parquet, CSV, TSV or JSONL: a path or a URL.")],
    model: str,
    revision: str | None,
    method: str | None,
    num_inference_steps: int | None,
    scheduler: str | None,
    guidance_scale: float | None,
    height: int | None,
    width: int | None,
    max_sequence_length: int | None,
    true_cfg_scale: float | None,
    update: str | None,
    attention_maps: str | None,
    plugin: str | None,
    s3_endpoint: str | None,
    limit: Annotated[int, typer.Option(min=0, help="Number of problems to show.")] = 20,
    output: Annotated[
        str | None,
        typer.Option(help="Write all problems to this CSV file.", show_default="nowhere"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all problems and totals as JSON instead.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that check rows.", show_default="one per core"),
    ] = None,
    price: Annotated[
        bool,
        typer.Option("--price", help="Also estimate FLOPs and bytes of the good rows."),
    ] = False,
    refinements: Annotated[
        float,
        typer.Option(min=0, help="For --price: average number of refinements per guided image."),
    ] = 20.0,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="For --price: the sustained TFLOP/s you measured on your GPU; adds GPU hours.",
            show_default="no hours",
        ),
    ] = None,
) -> int:
    """Find every row of MANIFEST that would fail, and why, loading only the model's tokenizers.

    Prompts that are cut off, negative prompts that have no effect, and rows that ask for the same image, are
    warnings and do not fail.
    Exit codes: 0 no row would fail, 1 some would, 2 the manifest cannot be read or the command is wrong.

    Examples:
    aae-batch manifest validate manifest.parquet --model stabilityai/stable-diffusion-xl-base-1.0
    aae-batch manifest validate manifest.parquet --price --tflops 150
    """
    from aae_batch.generate.settings import listed
    from aae_batch.manifest.judge import Judge
    from aae_batch.manifest.price import quote_for
    from aae_batch.methods import load_plugins
    from aae_batch.sampling.config import GuidanceConfig
    from aae_batch.sampling.model.loading import default_guidance

    plugins = listed(plugin)
    load_plugins(plugins)
    given = {
        name: value
        for name, value in context.params.items()
        if name in GuidanceConfig.model_fields and value is not None
    }
    config = default_guidance(model, s3_endpoint, revision).updated(**given)
    load = partial(
        Judge.load, model, config, revision=revision, s3_endpoint=s3_endpoint, plugin=plugins
    )
    most = None if as_json else limit
    shown, summary = _validate(manifest, load, processes, output, most, s3_endpoint)
    quote = None
    if price and summary.work:
        quote = quote_for(
            summary.work,
            model,
            config,
            refinements=refinements,
            tflops=tflops,
            revision=revision,
            s3_endpoint=s3_endpoint,
        )
    if as_json:
        _print_json(model, summary, shown, quote)
    else:
        _print(summary, shown, output)
        source = context.get_parameter_source("model")
        is_given = source is not None and source.name != "DEFAULT"
        print(
            f"judged as the model {model} would" + ("" if is_given else "; --model names another")
        )
        if quote is not None:
            print(f"\nwith the model {model}: {quote}")
    return WITH_FAILURES if summary.failing else COMPLETE


def _validate(
    path: str,
    load_judge: Callable[[], Judge],
    processes: int | None,
    output: str | None,
    limit: int | None,
    endpoint: str | None,
) -> tuple[list[Problem], Summary]:
    """Return the first `limit` problems, or all if None, and the totals."""
    import csv
    from contextlib import ExitStack

    from aae_batch.cli.terminal import count_reporter, waiting
    from aae_batch.errors import OutputError
    from aae_batch.manifest.reader import open_manifest
    from aae_batch.manifest.validate import Problem, validate
    from aae_batch.store.base import expanded

    kept: list[Problem] = []
    with ExitStack() as stack:
        opened = stack.enter_context(open_manifest(path, endpoint))
        with waiting("loading the tokenizer"):
            judge = load_judge()
        write = None
        if output:
            try:
                file = stack.enter_context(
                    open(expanded(output), "w", encoding="utf-8", newline="")
                )
            except OSError as error:
                raise OutputError(f"Cannot write {output}: {error.strerror}.") from error
            write = csv.writer(file)
            write.writerow(Problem._fields)

        def on_problem(problem: Problem) -> None:
            if limit is None or len(kept) < limit:
                kept.append(problem)
            if write is not None:
                write.writerow(problem)

        on_progress = stack.enter_context(count_reporter("rows"))
        return kept, validate(opened, judge, on_problem, on_progress, processes)


def _print(summary: Summary, shown: list[Problem], output: str | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if shown:
        table = Table("row", box=None, pad_edge=False)
        for name in ("id", "column", "problem"):
            table.add_column(name, overflow="fold")
        for some in shown:
            mark = "" if some.fails else "warning: "
            cells = (str(some.row), some.id, some.column, mark + some.problem)
            table.add_row(*(Text(printable(cell)) for cell in cells))
        Console(highlight=False, markup=False).print(table)
    hidden = summary.totals.total() - len(shown)
    if hidden:
        where = f"in {output}" if output else "(--limit shows more, --output FILE.csv writes all)"
        print(f"and {hidden} more {where}")
    good = summary.rows - summary.failing
    print(f"{counted(summary.rows, 'row')}: {good} good, {summary.failing} would fail")
    for kind, count in summary.totals.most_common():
        print(f"  {count} x {kind}")


def printable(text: str) -> str:
    """Replace unprintable characters, which could move a terminal's cursor, and shorten long text."""
    shown = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    return shown if len(shown) <= 300 else f"{shown[:200]}...{shown[-60:]}"


def _print_json(model: str, summary: Summary, problems: list[Problem], quote: Quote | None) -> None:
    import dataclasses
    import json

    said = {
        "model": model,
        "rows": summary.rows,
        "failing": summary.failing,
        "totals": dict(summary.totals.most_common()),
        "problems": [problem._asdict() for problem in problems],
    }
    if quote is not None:
        said["price"] = dataclasses.asdict(quote)
    print(json.dumps(said, indent=2))
