"""Write the report page of a dataset, to its root or elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from aae_batch.dataset import layout
from aae_batch.dataset.reader import Dataset
from aae_batch.report.build import collect, render
from aae_batch.store.base import Storage, is_url
from aae_batch.store.local import LocalStorage


def write_report(
    storage: Storage,
    html: Path | None = None,
    limit: int | None = None,
    embed: bool = False,
    side: int = 256,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Write the page and return its URL.

    Args:
        html: a local file; default: `report.html` in the root.
        limit, embed, side, on_progress: as in `collect`.

    Raises:
        OutputError: the output has no run or cannot be read, or the page cannot be written.
    """
    prefix = ""
    if html is not None:
        html = html.expanduser()
        if is_url(storage.root):
            embed = True
        else:
            prefix = Path(os.path.relpath(storage.root, html.absolute().parent)).as_posix() + "/"
    page = collect(Dataset(storage), limit, embed, side, prefix, on_progress)
    html_bytes = render(page, storage.root.rstrip("/").rsplit("/", 1)[-1])
    target, name = storage, layout.REPORT
    if html is not None:
        target, name = LocalStorage(str(html.absolute().parent)), html.name
    target.write_bytes(name, html_bytes)
    place = target.place(name)
    return place if is_url(place) else Path(place).as_uri()
