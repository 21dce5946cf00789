"""`aae-batch demo`: a small dataset to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aae_batch.cli.common import errors_in_a_sentence


def demo(
    output: Annotated[Path, typer.Argument(help="Folder for the pictures.")] = Path("demo-output"),
) -> None:
    """Make a small dataset with the embedded model, plain and guided from the same noise, and a
    page to look at both."""
    with errors_in_a_sentence():
        from aae_batch.report.demo import run_demo

        raise typer.Exit(run_demo(output))
