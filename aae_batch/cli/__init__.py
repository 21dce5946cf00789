"""The command line: one module per command.

Heavy imports wait until a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from aae_batch import __version__
from aae_batch.cli.common import COMPLETE
from aae_batch.cli.demo import demo
from aae_batch.cli.evaluate import evaluate
from aae_batch.cli.export import export
from aae_batch.cli.generate import generate
from aae_batch.cli.make import make
from aae_batch.cli.manifest import manifest
from aae_batch.cli.options import add_commands
from aae_batch.cli.report import report
from aae_batch.cli.status import status
from aae_batch.cli.tokens import tokens
from aae_batch.cli.verify import verify

app = typer.Typer(
    help="Image datasets with semantic guidance: Attend-and-Excite, in batches, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

add_commands(app, make, generate, verify, status, report, evaluate, export, tokens, demo)
app.add_typer(manifest, name="manifest")


def main() -> None:
    """Run the console script."""
    app()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            help="Print the version.",
            callback=lambda wanted: _print_version() if wanted else None,
        ),
    ] = False,
) -> None: ...


def _print_version() -> None:
    print(f"aae-batch {__version__}")
    raise typer.Exit(COMPLETE)
