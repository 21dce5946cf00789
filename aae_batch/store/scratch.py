"""Temporary folders, removed when their process ends. The folders of killed processes are removed when
the next process makes one."""

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
"""A lock file that the folder's process holds; the operating system releases it with the process."""

_YOUNG_SECONDS = 60.0
"""Younger folders are kept, because their process may not hold the lock yet."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary folder that only this process uses."""
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
    """Remove this user's folders if their process has ended."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            seen = folder.lstat()
            mine = not hasattr(os, "getuid") or seen.st_uid == os.getuid()
            young = time.time() - seen.st_mtime < _YOUNG_SECONDS
            if folder.is_symlink() or not mine or young or not (folder / _OWNER).is_file():
                continue
            with FileLock(folder / _OWNER, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except (OSError, Timeout):  # another process sweeps the folder or still uses it
            continue
