"""`aae-batch generate` for `ray job submit`, with the manifest and the output as options.

    ray job submit --working-dir . -- python jobs/generate.py --manifest s3://... --output s3://...

The options, their checks and the exit codes are the command line's own. The cluster to join is the
one that the job was submitted to.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The package of the working directory comes before an installed one, as it does in Ray's actors.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer

from aae_batch import cli

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(cli.generate.with_options_only(ray_address="auto"))

if __name__ == "__main__":
    app()
