"""`aae-batch generate` for `ray job submit`, with the manifest and the output as options.

    ray job submit --working-dir . -- python jobs/generate.py --manifest s3://... --output s3://...

The options, their checks and the exit codes are the command line's own. The cluster to join is the
one that the job was submitted to.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

# The package of the working directory comes before an installed one, as it does in Ray's actors.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer

from aae_batch import cli


def _parameters() -> dict[str, inspect.Parameter]:
    """Those of `aae-batch generate`, its two arguments made options."""
    found = dict(inspect.signature(cli.generate, eval_str=True).parameters)
    for name in ("manifest", "output"):
        kind, argument = get_args(found[name].annotation)
        option = Annotated[kind, typer.Option(help=argument.help)]
        found[name] = found[name].replace(annotation=option)
    address = Annotated[str, typer.Option(help="Ray cluster to join.")]
    found["ray_address"] = found["ray_address"].replace(annotation=address, default="auto")
    return found


def generate(**values: Any) -> None:
    cli.generate(**values)


generate.__doc__ = cli.generate.__doc__
generate.__signature__ = inspect.Signature(list(_parameters().values()))  # type: ignore[attr-defined]
generate.__annotations__ = {name: found.annotation for name, found in _parameters().items()}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(generate)

if __name__ == "__main__":
    app()
