"""A folder's lock: an operating system lock on the empty file `.lock`. It cannot be lost. The file
`.lock-holder` names its holder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from aae_batch.errors import OutputError
from aae_batch.store import whole_file
from aae_batch.store.lock import NAME, Holder, Lock, Timing, foreign, refused, renewing

_HOLDER = ".lock-holder"


@contextmanager
def locked_folder(root: Path, timing: Timing) -> Iterator[Lock]:
    """Hold a folder's lock and keep its holder file up to date.

    Raises:
        OutputError: another process holds it, or the folder cannot be written to.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for name in (NAME, _HOLDER):
            if whole_file.below(root, name).exists() and not is_lock_file(root, name):
                raise foreign(str(root / name))
        system_lock = FileLock(root / NAME)
        system_lock.acquire(timeout=0)
    except Timeout:
        found, age = None, None
        with suppress(OSError):
            found, age = read_note(root)
        raise refused(str(root), found, age) from None
    except OSError as error:
        raise OutputError(f"Cannot write to {root}: {error.strerror}.") from error
    holder = Holder.this_process()
    lock = Lock(str(root), holder.token)
    try:
        _write_note(root, holder)
        with renewing(lock, timing, lambda: _write_note(root, holder.alive())):
            yield lock
    finally:
        whole_file.below(root, _HOLDER).unlink(missing_ok=True)
        system_lock.release()


def read_note(root: Path) -> tuple[Holder | None, float | None]:
    """Return the holder of a folder's lock and the age of its holder file in seconds; None for both if
    that file is missing.

    Raises:
        OSError: the file cannot be read.
    """
    note = whole_file.below(root, _HOLDER)
    try:
        return Holder.from_json(note.read_bytes()), max(0.0, time.time() - note.stat().st_mtime)
    except FileNotFoundError:  # the holder has not written it yet, or is releasing the lock
        return None, None


def is_lock_file(root: Path, name: str) -> bool:
    """Return whether a file in the folder was written by a lock holder, judging by its content."""
    path = root / name
    if name == NAME:
        return path.is_file() and path.stat().st_size == 0
    return name == _HOLDER and path.is_file() and Holder.from_json(path.read_bytes()) is not None


def _write_note(root: Path, holder: Holder) -> None:
    try:
        whole_file.write(root, _HOLDER, holder.as_json())
    except OSError as error:
        raise OutputError(f"Cannot write {root / _HOLDER}: {error.strerror}.") from error
