"""What the commands share: exit codes, options, and how errors are told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from aae_batch.errors import AaeBatchError, JobError

COMPLETE, WITH_FAILURES, USAGE, STOPPED = 0, 1, 2, 3
"""Exit codes: all rows have pictures; some failed; the command or its input is wrong; stopped on the
way, and the same command goes on."""

Model = Annotated[
    str,
    typer.Option(
        help="Hub id, folder in diffusers' layout, URL of one (s3://bucket/folder), or 'shapes', "
        "the model in this package."
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of the model on the hub.", show_default="main"),
]
S3Endpoint = Annotated[
    str | None,
    typer.Option(help="URL of an S3-compatible store.", show_default="AWS_ENDPOINT_URL, or AWS"),
]
Actors = Annotated[
    str | None,
    typer.Option(
        help="Processes that hold a model each: a number, or MIN:MAX to use what a cluster has room "
        "for. MIN are asked for in any case, which makes a cluster that scales grow.",
        show_default="one per GPU as they come, else one",
    ),
]
GpusPerActor = Annotated[
    float | None,
    typer.Option(
        help="Share of a GPU that an actor takes, e.g. 0.5 for two on each.",
        show_default="1 where there are GPUs, else 0",
    ),
]
Device = Annotated[
    str, typer.Option(help="Torch device of each actor; auto is CUDA, else MPS, else CPU.")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (bfloat16 or float16 on CUDA, else float32), float32, float16, bfloat16, float64."
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Ray cluster to join, e.g. 'auto'.", show_default="one on this machine"),
]
Grace = Annotated[
    float,
    typer.Option(
        help="Seconds that shards under way are given after SIGTERM or Ctrl-C; what is not done by "
        "then is dropped, to be made again. A second signal stops at once."
    ),
]
RowTimeout = Annotated[
    float,
    typer.Option(help="Seconds without a finished row after which an actor is given up."),
]
MaxDeaths = Annotated[
    int,
    typer.Option(help="Stop after more actor deaths than this with nothing finished between."),
]
Output = Annotated[str, typer.Argument(help="The dataset's root: a folder, or a URL.")]


@contextmanager
def errors_in_a_sentence() -> Iterator[None]:
    """Errors of ours are one sentence and an exit code; any other is a bug and keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        complain("Stopped. Run the same command again to go on.")
        raise typer.Exit(STOPPED) from None
    except JobError as error:
        complain(f"{error} Run the same command again to go on.")
        raise typer.Exit(STOPPED) from None
    except AaeBatchError as error:
        complain(str(error))
        raise typer.Exit(USAGE) from None


def complain(text: str) -> None:
    print(f"aae-batch: {text}", file=sys.stderr)
