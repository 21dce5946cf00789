"""Temporary folders that end with their process, or, where that was killed, with the next one's start."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX = "aae-batch-"
_OWNER = ".aae-batch-owner"
"""A lock that the folder's process holds. The operating system ends it with the process."""

_YOUNG_SECONDS = 60.0
"""A folder's process may not hold the lock yet."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder of this process alone."""
    _sweep(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    owner = FileLock(folder / _OWNER)
    try:
        owner.acquire()
        yield folder
    finally:
        owner.release()
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove this user's folders whose processes have ended."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            seen = folder.lstat()
            mine = not hasattr(os, "getuid") or seen.st_uid == os.getuid()
            young = time.time() - seen.st_mtime < _YOUNG_SECONDS
            if folder.is_symlink() or not mine or young or not (folder / _OWNER).is_file():
                continue
            with FileLock(folder / _OWNER, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except (OSError, Timeout):  # another process sweeps, or is at work
            continue
