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

from aae_batch.dataset import whole_file
from aae_batch.dataset.lock import (
    TIMING,
    Guarded,
    Holder,
    Lock,
    Timing,
    is_lock_file,
    locked_folder,
    read_note,
)
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

    def create_bytes(self, name: str, data: bytes) -> bool:
        """Write the whole object where there is none. Returns False where there is one, which stays as
        it is; it may be this very one, where the store's answer to a first attempt was lost.

        Raises:
            OutputError: as `write_bytes`.
        """

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write the whole object or nothing, over the one that may be there: a reader never sees a
        part of it.

        Raises:
            OutputError: it cannot be written, or the lock that this object heeds was lost.
        """

    def exists(self, name: str) -> bool: ...

    def list(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`, which ends in `/`, sorted; never that of the lock.

        Raises:
            OutputError: it cannot be listed, or there is a link among them.
        """

    def anything(self) -> str | None:
        """The name of something that lies under the root, what writers keep there for themselves aside.

        Raises:
            OutputError: it cannot be listed, or there is a link.
        """

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

    def heed(self, token: str) -> None:
        """Refuse to write as soon as the lock is no longer the one with this token: for a worker, whose
        driver holds it."""


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


class LocalStorage(Guarded):
    """A folder of this machine, made when something is first written to it. The root may be a link;
    below it none is followed."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)

    def read_bytes(self, name: str) -> bytes:
        with self._readable(name) as path:
            return path.read_bytes()

    def open(self, name: str) -> BinaryIO:
        with self._readable(name) as path:
            return path.open("rb")

    def create_bytes(self, name: str, data: bytes) -> bool:
        with self._writable(name):
            return whole_file.create(Path(self.root), name, data)

    def write_bytes(self, name: str, data: bytes) -> None:
        with self._writable(name):
            whole_file.write(Path(self.root), name, data)

    def exists(self, name: str) -> bool:
        with self._readable(name) as path:
            return path.exists()

    def list(self, prefix: str) -> list[str]:
        found = []
        with self._readable(prefix.rstrip("/")) as top:
            for folder, folders, files in os.walk(top, onerror=_unless_missing):
                folders[:] = [name for name in folders if not name.startswith(".")]
                files = [name for name in files if not name.startswith(".")]
                for name in (*folders, *files):
                    whole_file.refuse_link(Path(folder, name))
                found += [Path(folder, name).relative_to(self.root).as_posix() for name in files]
        return sorted(found)

    def anything(self) -> str | None:
        try:
            found = sorted(os.listdir(self.root))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"Cannot read {self.root}: {error.strerror}.") from error
        root = Path(self.root)
        for name in found:
            whole_file.refuse_link(root / name)
        return next((name for name in found if not self._is_of_writers(name)), None)

    def _is_of_writers(self, name: str) -> bool:
        root = Path(self.root)
        if name == whole_file.PARTS:
            return all(whole_file.is_part(root, part) for part in whole_file.left_over(root))
        return is_lock_file(root, name)

    def delete(self, name: str) -> None:
        with self._writable(name, "delete"):
            self._path(name).unlink(missing_ok=True)

    def place(self, name: str) -> str:
        return str(Path(self.root, *name.split("/")))

    @contextmanager
    def writing(self, timing: Timing = TIMING) -> Iterator[Lock]:
        """The lock is the operating system's, so it ends with the process, however that ends."""
        with locked_folder(Path(self.root), timing) as lock, self.held(lock):
            self._sweep()
            try:
                yield lock
            finally:
                self._sweep()  # after actors that died meanwhile

    def lock_holder(self) -> tuple[Holder | None, float | None]:
        try:
            return read_note(Path(self.root))[0], None
        except OSError as error:
            raise OutputError(f"Cannot read the lock of {self.root}: {error.strerror}.") from error

    def __repr__(self) -> str:
        return f"LocalStorage({self.root!r})"

    def __getstate__(self) -> dict[str, str]:
        return {"root": self.root}

    @contextmanager
    def _readable(self, name: str) -> Iterator[Path]:
        path = self._path(name)
        try:
            yield path
        except OSError as error:
            raise OutputError(f"Cannot read {self.place(name)}: {error.strerror}.") from error

    @contextmanager
    def _writable(self, name: str, verb: str = "write") -> Iterator[None]:
        self.check_lock()
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"Cannot {verb} {self.place(name)}: {error.strerror}. Mend that and run the same "
                "command again."
            ) from error

    def _sweep(self) -> None:
        with self._writable(whole_file.PARTS, "sweep"):
            whole_file.sweep(Path(self.root))

    def _path(self, name: str) -> Path:
        return whole_file.below(Path(self.root), name)


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
