"""`aae-batch generate` for `ray job submit`, with the manifest and the output as options.

    ray job submit --working-dir . -- python jobs/generate.py --manifest s3://... --output s3://...

Options, checks and exit codes are those of the command line. The job joins the cluster it was submitted
to.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Prefer the package in the working directory to an installed one, as Ray's actors do.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer

from aae_batch import cli

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(cli.generate.with_options_only(ray_address="auto"))

if __name__ == "__main__":
    app()
