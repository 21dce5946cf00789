"""`aae-batch verify`: is the dataset whole?"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from aae_batch.cli.common import COMPLETE, WITH_FAILURES, Output, S3Endpoint, errors_in_a_sentence

PROBLEMS_SHOWN = 50


def verify(
    output: Output,
    manifest: Annotated[
        str | None, typer.Option(help="Compare the rows with this manifest, too.")
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Delete what is broken, so that the next run makes it again, and pictures of rows that "
            "failed. Lists it and asks first. No run may be writing meanwhile.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Repair without asking.")] = False,
    s3_endpoint: S3Endpoint = None,
) -> None:
    """Prove that OUTPUT has every row once, with its picture and statistics, undamaged.

    Exit codes: 0 proved, 1 something is missing or wrong, 2 wrong command or input.
    """
    with errors_in_a_sentence():
        raise typer.Exit(_verify(output, manifest, repair, yes, s3_endpoint))


def _verify(
    output: str, manifest_path: str | None, mend: bool, yes: bool, endpoint: str | None
) -> int:
    from contextlib import ExitStack

    from aae_batch.cli.terminal import shard_reporter
    from aae_batch.dataset.reader import Dataset
    from aae_batch.dataset.rewriting import writing
    from aae_batch.dataset.verify import to_delete, verify
    from aae_batch.manifest.reader import open_manifest
    from aae_batch.store.open import open_storage

    storage = open_storage(output, endpoint)
    with ExitStack() as stack:
        if mend and Dataset(storage).run is not None:  # nothing is mended in what is not ours
            stack.enter_context(writing(storage))
        manifest = None
        if manifest_path:
            manifest = stack.enter_context(open_manifest(manifest_path, endpoint))
        with shard_reporter() as report:
            found = verify(storage, manifest, report)
        print(found)
        for problem in found.problems[:PROBLEMS_SHOWN]:
            print(f"  {problem}")
        if len(found.problems) > PROBLEMS_SHOWN:
            print(f"  and {len(found.problems) - PROBLEMS_SHOWN} more problems")
        names = to_delete(storage, found) if mend else []
        for name in names:
            print(f"to delete: {name}")
        if names and (yes or _agreed(len(names))):
            for name in names:
                storage.delete(name)
            print(
                f"Deleted {len(names)}. Run the same `aae-batch generate` again to make anew what is "
                "missing."
            )
    return COMPLETE if found.proved else WITH_FAILURES


def _agreed(count: int) -> bool:
    if not sys.stdin.isatty():
        print("Nothing was deleted: look at the list, and add --yes.")
        return False
    return typer.confirm(f"Delete these {count}?")
