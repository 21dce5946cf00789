"""Exit codes, options and error reporting that the commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from aae_batch.errors import AaeBatchError, JobError

COMPLETE, WITH_FAILURES, USAGE, STOPPED = 0, 1, 2, 3
"""Exit codes: every row has an image; some rows failed; wrong command or input; stopped early, and the
same command resumes."""

Output = Annotated[str, typer.Argument(help="Root of the dataset: a folder or a URL.")]


@contextmanager
def errors_in_a_sentence() -> Iterator[None]:
    """Turn this package's errors into one sentence and an exit code. Others are bugs and keep a traceback."""
    try:
        yield
    except KeyboardInterrupt as stop:
        complain(f"{str(stop) or 'Stopped.'} Run the same command again to go on.")
        raise typer.Exit(STOPPED) from None
    except JobError as error:
        complain(f"{error} Run the same command again to go on.")
        raise typer.Exit(STOPPED) from None
    except AaeBatchError as error:
        complain(str(error))
        raise typer.Exit(USAGE) from None
    except PermissionError as error:  # wherever it occurs, only the user can fix it
        complain(f"{error.strerror}: {error.filename}.")
        raise typer.Exit(USAGE) from None


def complain(text: str) -> None:
    print(f"aae-batch: {text}", file=sys.stderr)
