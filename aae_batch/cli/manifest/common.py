"""Options, preview and confirmation shared by the commands that write a manifest."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from aae_batch.cli.common import complain
from aae_batch.errors import SettingsError
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
    show_prompts(
        found.prompts, shown, f"subjects found in {count} prompts, the first {len(shown)}:"
    )
    none, few = found.with_fewer_than(1), found.with_fewer_than(2)
    print(f"{few} of {count} prompts have fewer than two subjects, {none} have none")


def warn_of_unguidable(count: int) -> None:
    """Warn of prompts that have no subject, for whatever reason."""
    if count:
        prompts, them = ("1 prompt has", "it") if count == 1 else (f"{count} prompts have", "them")
        complain(
            f"{prompts} no subject, and no method can guide {them}: name some in a column "
            "subjects, or generate these rows without guidance."
        )


def warn_of_left_out(rows: ManifestRows) -> None:
    """Warn of methods that have no rows for some prompts."""
    for method, count in rows.left_out.items():
        needs = METHODS[method]
        what = f"{needs.least_subjects} subjects"
        if "modifiers" in needs.needs:
            what = "a subject with an adjective, such as 'red circle'"
        complain(f"{method} needs {what}: no rows of it for {count} prompts.")


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
    print(f"{len(rows)} rows in {target}")
