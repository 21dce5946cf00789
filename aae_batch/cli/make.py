"""`aae-batch make`: from prompts to a dataset with figures and a page, one command after the other."""

from __future__ import annotations

import inspect
import io
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.main

from aae_batch.cli.common import COMPLETE, WITH_FAILURES, complain
from aae_batch.cli.evaluate import evaluate
from aae_batch.cli.generate import generate
from aae_batch.cli.manifest.build import build
from aae_batch.cli.manifest.common import METHODS_HELP, SEEDS_HELP
from aae_batch.cli.manifest.validate import validate
from aae_batch.cli.options import settings_command
from aae_batch.cli.report import report
from aae_batch.errors import OutputError, SettingsError

if TYPE_CHECKING:
    from aae_batch.store.base import Storage


@settings_command(without=("manifest", "output"))
def make(
    context: typer.Context,
    prompts: Annotated[
        str,
        typer.Argument(
            help="Prompts, or a table with a column prompt, as for `aae-batch manifest build`: a path or a "
            "URL."
        ),
    ],
    output: Annotated[
        str, typer.Argument(help="Folder for the dataset, or a URL. The manifest is in it, too.")
    ],
    seeds: Annotated[
        str | None, typer.Option(help=SEEDS_HELP, show_default="one per prompt, from its id")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help=METHODS_HELP, show_default="the run's method")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="What judges the pictures, as for `aae-batch evaluate`.",
            show_default="attention; for the embedded models also detector",
        ),
    ] = None,
    yes: Annotated[
        bool,
        typer.Option("--yes", "-y", help="Accept the subjects found, and rows that fail, unasked."),
    ] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands, and run none.")
    ] = False,
    **settings: Any,
) -> int:
    """Make a dataset from PROMPTS, with scores and a page.

    Build its manifest, validate it, generate the images into OUTPUT, evaluate them, and write a page to look
    at them. Each step is a command of its own, which is shown before it runs; options go to the commands that have
    them. Run the same command again to resume after a stop.
    Exit codes: 0 complete, 1 complete with failed rows, 2 wrong command or input, 3 stopped.

    Examples:
    aae-batch make prompts.csv output --seeds 4 --methods both --open
    aae-batch make prompts.txt s3://bucket/output --model stabilityai/stable-diffusion-xl-base-1.0 --yes
    """
    from aae_batch.dataset.layout import MANIFEST
    from aae_batch.sampling.model.loading import EMBEDDED
    from aae_batch.store.open import open_storage

    if not output.strip("/"):
        raise SettingsError("OUTPUT is not a folder of its own; name one, e.g. output.")
    manifest = f"{output.rstrip('/')}/{MANIFEST}"
    # by default what needs no further model
    metric = metric or ("detector,attention" if settings["model"] in EMBEDDED else "attention")
    own = _option("--seeds", seeds) + _option("--methods", methods) + ["--yes"] * yes
    building = ["manifest", "build", prompts, manifest, *own, *_given(context, build, {"model"})]
    validating = ["manifest", "validate", manifest, *_given(context, validate)]
    others = [
        ["generate", manifest, output, *_given(context, generate, {"dry_run"})],
        # judges have a precision of their own
        ["evaluate", output, "--metric", metric, *_given(context, evaluate, {"metric", "dtype"})],
        ["report", output, *["--open"] * open_page, *_given(context, report)],
    ]
    if dry_run:
        for step in (building, validating, *others):
            print(_in_words(step))
        return COMPLETE
    storage = open_storage(output, settings["s3_endpoint"])
    was_there = storage.exists(MANIFEST)
    if was_there:
        _check_same(storage, building, prompts)
        print(f"manifest: {manifest}, built before from the same prompts")
    elif (there := storage.anything()) is not None:
        raise OutputError(
            f"{storage.root} is not empty (it has {there}), and not begun by `aae-batch make`: choose "
            "another output."
        )
    elif code := _run(building):
        return code
    code = _run(validating)
    if code > WITH_FAILURES or (code and not (yes or _agreed())):
        if not was_there:  # so that the same command takes the prompts as they are then
            storage.delete(MANIFEST)
        return code
    worst = COMPLETE
    for step in others:
        code = _run(step)
        if code > WITH_FAILURES:
            return code
        worst = max(worst, code)
    return worst


def _option(name: str, value: str | None) -> list[str]:
    return [] if value is None else [name, value]


def _given(context: typer.Context, command: Any, without: set[str] | None = None) -> list[str]:
    """Return the options given on the command line that `command` has too, as words."""
    names = set(inspect.signature(command).parameters) - (without or set())
    words: list[str] = []
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        is_given = source is not None and source.name != "DEFAULT"
        if name not in names - OWN or not is_given:
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            words += [parameter.opts[0], str(one)]
    return words


OWN = {"prompts", "output", "seeds", "methods", "yes", "open_page", "dry_run"}
"""Parameters that stand for themselves, or are written out above."""


def _in_words(step: Sequence[str]) -> str:
    return f"$ {shlex.join(['aae-batch', *step])}"


def _run(step: list[str], say: bool = True) -> int:
    """Run one command in this process, and return its exit code."""
    from aae_batch.cli import app

    if say:
        print(f"\n{_in_words(step)}", flush=True)
    return typer.main.get_command(app).main(step, prog_name="aae-batch", standalone_mode=False) or 0


def _check_same(storage: Storage, building: Sequence[str], prompts: str) -> None:
    """Check that the manifest in the output is the one that the command builds.

    Raises:
        OutputError: it is not, or cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from aae_batch.dataset.layout import MANIFEST
    from aae_batch.store.scratch import scratch_folder

    there = storage.read_bytes(MANIFEST) or b""
    said = io.StringIO()
    with scratch_folder() as folder:
        built = str(folder / MANIFEST)
        with redirect_stdout(said), redirect_stderr(said):
            code = _run([*building[:3], built, *building[4:], "--yes"], say=False)
        if code:
            print(said.getvalue(), end="", file=sys.stderr)
            raise typer.Exit(code)
        if Path(built).read_bytes() == there:
            return
        now = pq.read_table(built)
    try:  # another version may write the same rows otherwise
        before = pq.read_table(io.BytesIO(there))
    except pa.ArrowException:
        before = None
    if before is None or not before.equals(now):
        raise OutputError(
            f"{storage.place(MANIFEST)} is not what {prompts}, --seeds and --methods make now: choose another "
            "output, or go back to these prompts and options to finish it."
        )


def _agreed() -> bool:
    """Ask whether to go on with the rows that are good."""
    if not sys.stdin.isatty():
        complain("Some rows would fail: fix their prompts, or add --yes to make the others.")
        return False
    return typer.confirm("Some rows would fail. Make the others?")
