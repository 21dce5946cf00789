"""`aae-batch manifest`: build and check manifests."""

from __future__ import annotations

import typer

from aae_batch.cli.manifest.benchmark import benchmark
from aae_batch.cli.manifest.build import build
from aae_batch.cli.manifest.validate import validate
from aae_batch.cli.options import add_commands

manifest = typer.Typer(
    help="Build manifests, and check them without loading a model's weights.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

add_commands(manifest, build, benchmark, validate)
