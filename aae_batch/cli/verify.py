"""`aae-batch verify`: is the dataset whole?"""

from __future__ import annotations

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
            help="Delete the commits of broken shards, so that the next run makes these again, and "
            "pictures that no row names. No run may be writing meanwhile.",
        ),
    ] = False,
    s3_endpoint: S3Endpoint = None,
) -> None:
    """Prove that OUTPUT has every row once, with its picture and statistics, undamaged.

    Exit codes: 0 proved, 1 something is missing or wrong, 2 wrong command or input.
    """
    with errors_in_a_sentence():
        raise typer.Exit(_verify(output, manifest, repair, s3_endpoint))


def _verify(output: str, manifest_path: str | None, mend: bool, endpoint: str | None) -> int:
    from contextlib import ExitStack

    from aae_batch.dataset import layout
    from aae_batch.dataset.storage import open_storage
    from aae_batch.dataset.verify import repair, verify
    from aae_batch.manifest import open_manifest
    from aae_batch.terminal import shard_reporter

    storage = open_storage(output, endpoint)
    with ExitStack() as stack:
        mend = mend and storage.exists(layout.RUN)  # a lock would make a folder of a typing error
        if mend:
            stack.enter_context(storage.writing())
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
        deleted = repair(storage, found) if mend else []
    for name in deleted:
        print(f"deleted {name}")
    if deleted:
        print("Run the same `aae-batch generate` again to make these shards anew.")
    return COMPLETE if found.proved else WITH_FAILURES
