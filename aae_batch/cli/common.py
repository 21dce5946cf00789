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
    except PermissionError as error:  # wherever it came up, it is the user's to grant
        complain(f"{error.strerror}: {error.filename}.")
        raise typer.Exit(USAGE) from None


def complain(text: str) -> None:
    print(f"aae-batch: {text}", file=sys.stderr)
