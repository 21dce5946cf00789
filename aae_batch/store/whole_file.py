"""Files of a folder that are there whole or not at all, and that a power cut does not empty.

A file is written beside all others, under a name that no other writer has, brought to the disk, and
then given its own name. What a killed process leaves unfinished lies in the folder `.parts`, nowhere
else, and the next writer sweeps it.
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
    """The path of a name below a root, which may itself be a link.

    Raises:
        OutputError: it leads through a link or upwards, so that it lies somewhere else.
    """
    path = root
    for part in filter(None, name.split("/")):
        if part == "..":
            raise OutputError(f"{name} does not lie below {root}: name what does.")
        path = path / part
        refuse_link(path)
    return path


def refuse_link(path: Path) -> None:
    """Raises: OutputError: it is a link."""
    if path.is_symlink():
        raise OutputError(
            f"{path} is a link, and a run follows none inside its output: remove it, or choose another "
            "output."
        )


def create(root: Path, name: str, data: bytes) -> bool:
    """Write a file where there is none. Returns False where there is one, which stays as it is.

    Raises:
        OSError: it cannot be written.
        OutputError: there is a link on the way.
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
    """Write a file, or over it.

    Raises:
        OSError: it cannot be written.
        OutputError: there is a link on the way.
    """
    path = below(root, name)
    with _part(root, data) as part:
        _make_folder(path.parent)
        part.replace(path)
        _to_disk(path.parent)


def left_over(root: Path) -> list[str]:
    """What lies among the unfinished files: none of them, where a writer would have named it otherwise."""
    try:
        return os.listdir(below(root, PARTS))
    except FileNotFoundError:
        return []


def is_part(root: Path, name: str) -> bool:
    return _PART.fullmatch(name) is not None and (root / PARTS / name).is_file()


def sweep(root: Path) -> None:
    """Remove what killed writers have left unfinished.

    Raises:
        OSError: it cannot be removed.
    """
    for name in left_over(root):
        if is_part(root, name):
            (root / PARTS / name).unlink(missing_ok=True)
    with suppress(OSError):  # it is not there, or not empty
        (root / PARTS).rmdir()


_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EXDEV, errno.EINVAL}
"""What file systems say that have no hard links, or not from one folder to another."""


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
        with suppress(OSError):  # another writer's part is there
            part.parent.rmdir()


def _opened(part: Path) -> BinaryIO:
    """Other writers may remove the folder, which is empty for them, at any moment."""
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError, FileExistsError):
            part.parent.mkdir(parents=True, exist_ok=True)
            return part.open("xb")
    part.parent.mkdir(parents=True, exist_ok=True)
    return part.open("xb")


def _make_folder(folder: Path) -> None:
    """With its parents, whose entries go to the disk too."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _to_disk(folder.parent)


def _to_disk(folder: Path) -> None:
    """The entries of a folder, where the system has that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems know it for files alone
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
