"""Options, preview and confirmation shared by the commands that write a manifest."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from aae_batch.cli.common import complain
from aae_batch.errors import SettingsError, counted
from aae_batch.methods import METHODS

if TYPE_CHECKING:
    from aae_batch.manifest.build.prompt import Prompts
    from aae_batch.manifest.build.rows import ManifestRows
    from aae_batch.manifest.build.subjects import Found

Target = Annotated[
    str, typer.Argument(help="The manifest to write, .parquet, .csv or .jsonl: a path or a URL.")
]
METHODS_HELP = (
    "One row per method: a comma-separated list; both, for attend-and-excite and stable-diffusion from "
    "the same noise; or all."
)
SEEDS_HELP = (
    "One row per seed: 4 for four of them, 0 to 3; 10:20 for 10 to 19; a list such as 1,5,9; or 42, with "
    "a comma for the seed 42 alone."
)
TokenizerOf = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Add token_indices from this model's tokenizer, and check every subject with it. Without "
        "it, subjects are words, which fit any model.",
        show_default="none",
    ),
]
Show = Annotated[int, typer.Option(min=0, help="Prompts to show before the manifest is written.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing manifest.")]


def first_of(shown: Sequence[int], count: int) -> str:
    """Say that a table does not show everything; nothing if it does."""
    return f", the first {len(shown)}" if len(shown) < count else ""


def show_prompts(prompts: Prompts, places: Sequence[int], title: str) -> None:
    """Print prompts with their subjects."""
    if not places:
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    print(title)
    table = Table("prompt", "subjects", box=None, pad_edge=False)
    for place in places:
        prompt = prompts.prompts[place]
        subjects = "; ".join(prompt.subjects or ()) or "none"
        if prompt.subjects is None and prompt.token_indices is not None:
            subjects = f"tokens {[list(indices) for indices in prompt.token_indices]}"
        table.add_row(Text(prompt.text), Text(subjects))
    Console(highlight=False, markup=False).print(table)


def show_found(found: Found, show: int) -> None:
    """Print the subjects found, and how many prompts have too few."""
    count = len(found.places)
    shown = found.places[:show]
    title = f"subjects found in {counted(count, 'prompt')}{first_of(shown, count)}:"
    show_prompts(found.prompts, shown, title)
    none, few = found.with_fewer_than(1), found.with_fewer_than(2)
    if few:
        print(
            f"of {counted(count, 'prompt')}, {few} with fewer than two subjects, {none} with none"
        )


def warn_of_unguidable(count: int) -> None:
    """Warn of prompts that have no subject, for whatever reason."""
    if count:
        complain(
            f"no subject in {counted(count, 'prompt')}, which no method can guide: name some in a column "
            "subjects, or generate these rows without guidance."
        )


def warn_of_left_out(rows: ManifestRows) -> None:
    """Warn of methods that have no rows for some prompts."""
    for method, count in rows.left_out.items():
        needs = METHODS[method]
        what = f"{needs.least_subjects} subjects"
        if "modifiers" in needs.needs:
            what = "a subject with an adjective, such as 'red circle'"
        complain(f"{method} needs {what}: no rows of it for {counted(count, 'prompt')}.")


def ask(question: str, yes: bool) -> None:
    """Ask on a terminal; elsewhere `--yes` must be given.

    Raises:
        SettingsError: standard input is not a terminal.
        typer.Abort: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise SettingsError(
            "The subjects were found automatically, and without a terminal nobody can confirm them: "
            "check them above, and add --yes."
        )
    typer.confirm(question, abort=True)


def write(target: str, rows: ManifestRows, endpoint: str | None) -> None:
    from aae_batch.manifest.build.rows import write_manifest

    write_manifest(target, rows, endpoint)
    print(f"{counted(len(rows), 'row')} in {target}{rows.seeds_in_words}")
