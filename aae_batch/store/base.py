"""The interface of every store. Names are relative to the store's root, with `/` between the parts.

Code outside this folder accesses an output root only through `Storage`.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from aae_batch.store.lease import Cell, leased
from aae_batch.store.lock import TIMING, Holder, Lock, Timing, Watch

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def is_url(place: str | os.PathLike[str]) -> bool:
    """Return True for a URL, False for a local path."""
    return SCHEME.match(os.fspath(place)) is not None


def expanded(place: str | os.PathLike[str]) -> str:
    """Return a path or URL as text, with the home folder in place of a leading `~`."""
    return os.path.expanduser(os.fspath(place))


@dataclass(frozen=True)
class Entry:
    """An object in a listing. `tag` changes when the object's content changes."""

    name: str
    size: int
    tag: str


class Storage(ABC):
    """Reads and writes objects under a root. Instances are pickled and sent to the actors, without
    their connections, credentials and locks (attributes that begin with `_`).

    All methods raise `OutputError` if the operation fails. Writes also raise it if this storage watches
    a lock that was lost.
    """

    root: str
    _lock: Lock | Watch | None = None

    @abstractmethod
    def read_bytes(self, name: str) -> bytes: ...

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open the object for reading; only the ranges that are read are fetched."""

    @abstractmethod
    def create_bytes(self, name: str, data: bytes) -> bool:
        """Create the object, whole or not at all. Returns False, and changes nothing, if it exists
        already. An earlier attempt of this call, whose response was lost, may have created it."""

    @abstractmethod
    def write_bytes(self, name: str, data: bytes) -> None:
        """Create or overwrite the object atomically: a reader never sees part of it."""

    @abstractmethod
    def exists(self, name: str) -> bool: ...

    @abstractmethod
    def list(self, prefix: str) -> list[str]:
        """Return the names that begin with `prefix`, which ends in `/`, sorted, without the lock.

        Raises:
            OutputError: also if one of them is a link.
        """

    @abstractmethod
    def anything(self, besides: str = "") -> str | None:
        """Return the name of any object under the root, or None if the root is empty. Locks,
        temporary files of writers and the object `besides` are ignored.

        Raises:
            OutputError: also if one of the objects is a link.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete the object if it exists."""

    def place(self, name: str) -> str:
        """Return the object's full path or URL, for messages."""
        return f"{self.root}/{name}"

    # --- the lock ---

    @abstractmethod
    def writing(self, timing: Timing = TIMING) -> AbstractContextManager[Lock]:
        """Hold the lock of this root, so that no other process writes a dataset here.

        If another process takes the lock over (see `lock.py`), `Lock.check` and every later write by
        this object raise.

        Raises:
            OutputError: another process is writing; the message names it.
        """

    @abstractmethod
    def lock_holder(self) -> tuple[Holder | None, float | None]:
        """Return the lock's holder and the seconds since it was renewed, each None if unknown. The age
        is also None for a lock that cannot expire."""

    def heed(self, token: str, timing: Timing = TIMING) -> None:
        """Refuse writes once the lock no longer has this token. Workers call this; their driver holds
        the lock."""
        self._lock = Watch(self.root, token, self.lock_holder, timing)

    def check_lock(self) -> None:
        """Raise OutputError if the lock is lost."""
        if self._lock is not None:
            self._lock.check()

    @contextmanager
    def _held(self, lock: Lock) -> Iterator[None]:
        self._lock = lock
        try:
            yield
        finally:
            self._lock = None

    # --- pickling ---

    def _reset(self) -> None:
        """Initialize the state that is not pickled."""
        self._lock = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root!r})"


class ObjectStorage(Storage):
    """A storage behind a URL. It also lists objects with size and tag, and downloads them to local
    files. Its lock is a lease."""

    ages_are_free = True
    """Whether reading an object also returns its age at no cost, so that workers can poll it."""
    _cell: Cell | None = None

    @abstractmethod
    def entries(self, prefix: str) -> tuple[Entry, ...]:
        """Return the objects whose names begin with `prefix`, sorted by name. `prefix` is empty or
        ends in `/`."""

    @abstractmethod
    def download(self, name: str, path: Path) -> None:
        """Copy an object to a local file without loading it into memory."""

    @abstractmethod
    def lock_cell(self) -> Cell:
        """Return the object that holds the lock."""

    def list(self, prefix: str) -> list[str]:
        return [entry.name for entry in self.entries(prefix)]

    @contextmanager
    def writing(self, timing: Timing = TIMING) -> Iterator[Lock]:
        with leased(self.lock_cell(), self.root, timing) as lock, self._held(lock):
            yield lock

    def lock_holder(self) -> tuple[Holder | None, float | None]:
        self._cell = self._cell or self.lock_cell()
        seen = self._cell.read(aged=self.ages_are_free)
        return (seen.holder, seen.age) if seen else (None, None)

    def _reset(self) -> None:
        super()._reset()
        self._cell = None
