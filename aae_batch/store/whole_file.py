"""Atomic file writes in a folder that survive a power cut.

A file is first written to the folder `.parts` under a unique name and flushed to disk, then linked or
renamed to its own name. A killed process leaves unfinished files only in `.parts`, and the next writer
removes them.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from aae_batch.errors import OutputError

PARTS = ".parts"
_PART = re.compile(r"[0-9a-f]{32}")
_ATTEMPTS = 100


def below(root: Path, name: str) -> Path:
    """Return the path of a name below a root. The root itself may be a link.

    Raises:
        OutputError: the name contains `..` or leads through a link, so it may lie outside the root.
    """
    path = root
    for part in filter(None, name.split("/")):
        if part == "..":
            raise OutputError(f"{name} is not below {root}: use a name below it.")
        path = path / part
        refuse_link(path)
    return path


def refuse_link(path: Path) -> None:
    """Raise OutputError if the path is a link."""
    if path.is_symlink():
        raise OutputError(
            f"{path} is a link, and a run follows no links inside its output: remove it, or choose "
            "another output."
        )


def create(root: Path, name: str, data: bytes) -> bool:
    """Create a file. Returns False, and changes nothing, if it exists already.

    Raises:
        OSError: it cannot be written.
        OutputError: the path leads through a link.
    """
    path = below(root, name)
    if path.exists():
        return False
    with _part(root, data) as part:
        _make_folder(path.parent)
        try:
            os.link(part, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            part.replace(path)  # a file system without hard links: see docs/reliability.md
        _to_disk(path.parent)
    return True


def write(root: Path, name: str, data: bytes) -> None:
    """Create or overwrite a file.

    Raises:
        OSError: it cannot be written.
        OutputError: the path leads through a link.
    """
    path = below(root, name)
    with _part(root, data) as part:
        _make_folder(path.parent)
        part.replace(path)
        _to_disk(path.parent)


def left_over(root: Path) -> list[str]:
    """Return the names in the folder of unfinished files. See `is_part` for which of them a writer
    left."""
    try:
        return os.listdir(below(root, PARTS))
    except FileNotFoundError:
        return []


def is_part(root: Path, name: str) -> bool:
    return _PART.fullmatch(name) is not None and (root / PARTS / name).is_file()


def sweep(root: Path) -> None:
    """Remove the unfinished files of killed writers.

    Raises:
        OSError: one of them cannot be removed.
    """
    for name in left_over(root):
        if is_part(root, name):
            (root / PARTS / name).unlink(missing_ok=True)
    with suppress(OSError):  # missing or not empty
        (root / PARTS).rmdir()


_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EXDEV, errno.EINVAL}
"""Errors of file systems that support no hard links, or none between folders."""


@contextmanager
def _part(root: Path, data: bytes) -> Iterator[Path]:
    part = below(root, f"{PARTS}/{uuid4().hex}")
    try:
        with _opened(part) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield part
    finally:
        part.unlink(missing_ok=True)
        with suppress(OSError):  # it holds another writer's part
            part.parent.rmdir()


def _opened(part: Path) -> BinaryIO:
    """Create the part, and its folder as often as other writers remove it while it is empty."""
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError, FileExistsError):
            part.parent.mkdir(parents=True, exist_ok=True)
            return part.open("xb")
    part.parent.mkdir(parents=True, exist_ok=True)
    return part.open("xb")


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, and flush their entries to disk."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _to_disk(folder.parent)


def _to_disk(folder: Path) -> None:
    """Flush a folder's entries to disk (POSIX only)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems support fsync only for files
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
