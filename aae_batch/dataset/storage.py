"""Where an output lives. Names are relative to its root, with `/` between the parts.

A backend is the verbs of `Storage`; nothing outside the backends touches what lies under a root. This
one is a local folder; `s3.py` and `other_stores.py` hold the others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol
from uuid import uuid4

from aae_batch.dataset.lock import TIMING, Lock, Timing, locked_folder
from aae_batch.errors import OutputError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_USERINFO = re.compile(r"[^/@]*:(?!\d+(?:/|$))[^@]*@")
"""`user:password@`, also with a `/` in the password; `host:8020/` is none."""


class Storage(Protocol):
    """A root that bytes are written to and read from. Instances travel to the actors by pickling."""

    root: str

    def read_bytes(self, name: str) -> bytes:
        """Raises: OutputError: there is no such object, or it cannot be read."""

    def open(self, name: str) -> BinaryIO:
        """The object as a file to read, of which only what is asked for is fetched.

        Raises:
            OutputError: as `read_bytes`; reading from the file, too.
        """

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write the whole object or nothing: a reader never sees a part of it.

        Raises:
            OutputError: it cannot be written, or the lock that this object held was lost.
        """

    def exists(self, name: str) -> bool: ...

    def list(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`, which ends in `/`, sorted; never that of the lock."""

    def delete(self, name: str) -> None:
        """Remove the object; nothing happens if there is none."""

    def place(self, name: str) -> str:
        """Where a person finds the object."""

    def writing(self, timing: Timing = TIMING) -> AbstractContextManager[Lock]:
        """A context in which this process is the only one that writes a dataset here.

        Where the lock can be lost to another process (see `lock.py`), `Lock.check` and every later
        write by this object raise.

        Raises:
            OutputError: another process is writing; the message names it.
        """


@dataclass(frozen=True)
class Entry:
    """An object as a listing has it. `tag` is another one when the object's content is."""

    name: str
    size: int
    tag: str


class ObjectStorage(Storage, Protocol):
    """A storage behind a URL: its objects can also be told apart, and copied to local files."""

    def entries(self, prefix: str) -> tuple[Entry, ...]:
        """The objects whose names begin with `prefix`, which is empty or ends in `/`, by name."""

    def download(self, name: str, path: Path) -> None:
        """Copy an object to a local file, without holding it in memory.

        Raises:
            OutputError: there is no such object, or it cannot be copied.
        """


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is a URL, and not a path of this machine."""
    return _SCHEME.match(os.fspath(place)) is not None


def open_storage(root: str | os.PathLike[str], s3_endpoint: str | None = None) -> Storage:
    """The storage of an output root: a folder, `s3://bucket/prefix`, or any scheme of fsspec.

    Args:
        s3_endpoint: URL of an S3-compatible store; default: as the environment says, else AWS.

    Raises:
        OutputError: no backend for such a root, or its package is not installed.
    """
    if is_url(root):
        return open_url(os.fspath(root), s3_endpoint)
    return LocalStorage(os.fspath(root))


def open_url(url: str, s3_endpoint: str | None = None) -> ObjectStorage:
    """The storage behind a URL. Credentials come from the environment, never from the URL.

    Raises:
        OutputError: as for `open_storage`.
    """
    match = _SCHEME.match(url)
    assert match is not None
    scheme, rest = match.group(1).lower(), url[match.end() :].rstrip("/")
    if _USERINFO.match(rest) or (scheme == "s3" and re.match("[^/]*[@:]", rest)):
        raise OutputError(
            f"A {scheme}:// URL with credentials in it is not taken, since it would be written down "
            "with the settings: give them in the environment, and write the URL without them."
        )
    if scheme == "s3":
        from aae_batch.dataset.s3 import S3Storage

        return S3Storage(f"s3://{rest}", s3_endpoint)
    if "?" in rest:
        raise OutputError(
            f"A {scheme}:// URL with options after ? is not taken, since they may hold a key: give "
            "them in the environment, and write the URL without them."
        )
    if scheme == "file":
        raise OutputError(f"Cannot use {url}: give the path of the folder, without file://.")
    from aae_batch.dataset.other_stores import FsspecStorage

    return FsspecStorage(f"{scheme}://{rest}")


class LocalStorage:
    """A folder of this machine, made when something is first written to it."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)

    def read_bytes(self, name: str) -> bytes:
        with self._readable(name) as path:
            return path.read_bytes()

    def open(self, name: str) -> BinaryIO:
        with self._readable(name) as path:
            return path.open("rb")

    def write_bytes(self, name: str, data: bytes) -> None:
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # In the same folder, so that the rename is atomic; under a name of its own, so that two
            # writers never share it.
            part = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
            try:
                part.write_bytes(data)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"Cannot write {self.place(name)}: {error.strerror}. Mend that and run the same "
                "command again."
            ) from error

    def exists(self, name: str) -> bool:
        return self._path(name).exists()

    def list(self, prefix: str) -> list[str]:
        folder = self._path(prefix)
        if not folder.is_dir():
            return []
        return sorted(
            path.relative_to(self.root).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith(".")
        )

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def place(self, name: str) -> str:
        return str(self._path(name))

    @contextmanager
    def writing(self, timing: Timing = TIMING) -> Iterator[Lock]:
        """The lock is the operating system's, so it ends with the process, however that ends."""
        with locked_folder(Path(self.root), timing) as lock:
            yield lock

    @contextmanager
    def _readable(self, name: str) -> Iterator[Path]:
        try:
            yield self._path(name)
        except OSError as error:
            raise OutputError(f"Cannot read {self.place(name)}: {error.strerror}.") from error

    def _path(self, name: str) -> Path:
        return Path(self.root, *name.split("/"))
