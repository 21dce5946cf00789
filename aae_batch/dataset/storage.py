"""Where an output lives. Names are relative to its root, with `/` between the parts.

A backend is these seven verbs; nothing outside this module touches what lies under a root.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from filelock import FileLock, Timeout

from aae_batch.errors import OutputError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://")
_LOCK = ".lock"


class Storage(Protocol):
    """A root that bytes are written to and read from. Instances travel to the actors by pickling."""

    root: str

    def read_bytes(self, name: str) -> bytes:
        """Raises: OutputError: there is no such object, or it cannot be read."""

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write the whole object or nothing: a reader never sees a part of it.

        Raises:
            OutputError: it cannot be written.
        """

    def exists(self, name: str) -> bool: ...

    def list(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`, which ends in `/`, sorted."""

    def delete(self, name: str) -> None:
        """Remove the object; nothing happens if there is none."""

    def place(self, name: str) -> str:
        """Where a person finds the object."""

    def writing(self):
        """A context in which this process is the only one that writes a dataset here.

        Raises:
            OutputError: another process is.
        """


def open_storage(root: str | os.PathLike[str]) -> Storage:
    """The storage of an output root.

    Raises:
        OutputError: no backend for such a root.
    """
    text = os.fspath(root)
    if _SCHEME.match(text):
        raise OutputError(f"Cannot write to {text}: give a local folder.")
    return LocalStorage(text)


class LocalStorage:
    """A folder of this machine, made when something is first written to it."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)

    def read_bytes(self, name: str) -> bytes:
        try:
            return self._path(name).read_bytes()
        except OSError as error:
            raise OutputError(f"Cannot read {self.place(name)}: {error.strerror}.") from error

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
    def writing(self) -> Iterator[None]:
        """The lock is the operating system's, so it ends with the process, however that ends."""
        try:
            Path(self.root).mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._path(_LOCK))
            lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"Another run is writing to {self.root}: wait for it, or choose another folder."
            ) from None
        except OSError as error:
            raise OutputError(f"Cannot write to {self.root}: {error.strerror}.") from error
        try:
            yield
        finally:
            lock.release()

    def _path(self, name: str) -> Path:
        return Path(self.root, *name.split("/"))
