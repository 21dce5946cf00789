"""`aae-batch verify`: check that a dataset is complete and undamaged."""

from __future__ import annotations

import sys
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from aae_batch.cli.common import COMPLETE, WITH_FAILURES, Output
from aae_batch.cli.options import settings_command

if TYPE_CHECKING:
    from aae_batch.store.base import Storage

PROBLEMS_SHOWN = 50


@settings_command()
def verify(
    output: Output,
    s3_endpoint: str | None,
    manifest: Annotated[
        str | None, typer.Option(help="Also compare the rows with this manifest.")
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Delete what is broken, so that the next run generates it again, and images of failed "
            "rows. Lists the files and asks first. No run may be writing at the same time.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Repair without asking.")] = False,
) -> int:
    """Prove that OUTPUT has every row exactly once, with its image and statistics undamaged.

    Exit codes: 0 proved, 1 something is missing or wrong, 2 wrong command or input.

    Examples:
    aae-batch verify output --manifest manifest.parquet
    aae-batch verify output --repair
    """
    from aae_batch.cli.terminal import count_reporter
    from aae_batch.dataset import verify as proof
    from aae_batch.dataset.reader import Dataset
    from aae_batch.dataset.rewriting import writing
    from aae_batch.dataset.run_record import names_of_its_manifest
    from aae_batch.manifest.reader import open_manifest
    from aae_batch.methods import load_plugins
    from aae_batch.store.open import open_storage

    storage = open_storage(output, s3_endpoint)
    run = Dataset(storage).run
    if manifest and run is not None:
        load_plugins(run["settings"].get("plugin", ()))
    with ExitStack() as stack:
        if repair and run is not None:  # without a run, nothing will be deleted
            stack.enter_context(writing(storage))
        may_have = names_of_its_manifest(run)
        opened = open_manifest(manifest, s3_endpoint, may_have) if manifest else nullcontext()
        rows = stack.enter_context(opened)
        with count_reporter("shards") as on_progress:
            found = proof.verify(storage, rows, on_progress)
        print(found)
        for problem in found.problems[:PROBLEMS_SHOWN]:
            print(f"  {problem}")
        if len(found.problems) > PROBLEMS_SHOWN:
            print(f"  and {len(found.problems) - PROBLEMS_SHOWN} more problems")
        names = proof.to_delete(storage, found) if repair else []
        if names:
            _delete(storage, names, yes)
        else:
            for sentence in found.advice(output):
                print(sentence)
    return COMPLETE if found.proved else WITH_FAILURES


def _delete(storage: Storage, names: list[str], yes: bool) -> None:
    for name in names:
        print(f"to delete: {name}")
    if yes or _agreed(len(names)):
        for name in names:
            storage.delete(name)
        print(
            f"Deleted {len(names)}. Run the same `aae-batch generate` again to make what is missing."
        )


def _agreed(count: int) -> bool:
    if not sys.stdin.isatty():
        print("Nothing was deleted: look at the list, and add --yes.")
        return False
    return typer.confirm(f"Delete these {count}?")
