"""What every store can do. Names are relative to its root, with `/` between the parts.

A store is the verbs of `Storage`; nothing outside this folder touches what lies under a root.
"""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from aae_batch.store.lock import TIMING, Lock, Timing

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


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
    return SCHEME.match(os.fspath(place)) is not None
