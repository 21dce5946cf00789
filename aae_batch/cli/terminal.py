"""Show a job's progress: a bar on a terminal, periodic lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aae_batch.job.progress import Progress

LINE_SECONDS = 15.0


@contextmanager
def progress_reporter() -> Iterator[Callable[[Progress], None]]:
    """Yield a callback that shows a job's progress on standard error, and the first failed row of each
    kind as soon as it has failed. A bar disappears at the end; if the job ended well, its text stays."""
    if not sys.stderr.isatty():
        yield lines(_print)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(bar_width=30), TextColumn("{task.description}", markup=False))
    console, text = Console(stderr=True), ""
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        tell = new_failures(lambda text: console.print(text, markup=False, highlight=False))

        def on_progress(progress: Progress) -> None:
            nonlocal text
            tell(progress)
            loading = f"loading the model, {progress.done} rows done"
            text = str(progress) if progress.started else loading
            bar.update(task, completed=progress.done, total=progress.total, description=text)

        yield on_progress
    if text:
        _print(text)


@contextmanager
def waiting(for_what: str) -> Iterator[None]:
    """On a terminal, say on standard error what the command waits for, until it goes on."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(for_what):
        yield


@contextmanager
def count_reporter(things: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback that takes (done, total) and shows the count of `things` on standard error."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(things, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        last = time.monotonic()

        def on_progress(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                _print(f"{done}/{total} {things}")

        yield on_progress


def lines(
    write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
) -> Callable[[Progress], None]:
    """Return a callback that writes one line at once, one every 15 seconds, one at the end, and one for the
    first failed row of each kind."""
    last, ended = -LINE_SECONDS, False
    tell = new_failures(write)

    def on_progress(progress: Progress) -> None:
        nonlocal last, ended
        tell(progress)
        is_end = progress.done == progress.total
        is_due = clock() - last >= LINE_SECONDS or (is_end and not ended)
        if progress.started and is_due:
            last, ended = clock(), is_end
            write(str(progress))

    return on_progress


def new_failures(write: Callable[[str], None]) -> Callable[[Progress], None]:
    """Return a callback that writes what the first failed row of each `error_type` says."""
    from aae_batch.job.progress import shortened

    told: set[str] = set()

    def tell(progress: Progress) -> None:
        for kind, reason in progress.now.examples.items():
            if kind not in told:
                told.add(kind)
                write(f"{kind}: {shortened(reason)}")

    return tell


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
