"""What every store can do. Names are relative to its root, with `/` between the parts.

A store is the verbs of `Storage`; nothing outside this folder touches what lies under a root.
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
    """Whether a place is a URL, and not a path of this machine."""
    return SCHEME.match(os.fspath(place)) is not None


@dataclass(frozen=True)
class Entry:
    """An object as a listing has it. `tag` is another one when the object's content is."""

    name: str
    size: int
    tag: str


class Storage(ABC):
    """A root that bytes are written to and read from. Instances travel to the actors by pickling,
    without what they hold of connections, credentials and locks (`_` names).

    All verbs raise `OutputError` where the store cannot do what is asked; those that write also
    where the lock that the object heeds was lost.
    """

    root: str
    _lock: Lock | Watch | None = None

    @abstractmethod
    def read_bytes(self, name: str) -> bytes: ...

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """The object as a file to read, of which only what is asked for is fetched."""

    @abstractmethod
    def create_bytes(self, name: str, data: bytes) -> bool:
        """Write the whole object where there is none. Returns False where there is one, which stays as
        it is; it may be this very one, where the store's answer to a first attempt was lost."""

    @abstractmethod
    def write_bytes(self, name: str, data: bytes) -> None:
        """Write the whole object or nothing, over the one that may be there: a reader never sees a
        part of it."""

    @abstractmethod
    def exists(self, name: str) -> bool: ...

    @abstractmethod
    def list(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`, which ends in `/`, sorted; never that of the lock.

        Raises:
            OutputError: also if there is a link among them.
        """

    @abstractmethod
    def anything(self) -> str | None:
        """The name of something under the root, apart from what writers keep there for themselves.

        Raises:
            OutputError: also if there is a link.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove the object; nothing happens if there is none."""

    def place(self, name: str) -> str:
        """Where a person finds the object."""
        return f"{self.root}/{name}"

    # --- the lock ---

    @abstractmethod
    def writing(self, timing: Timing = TIMING) -> AbstractContextManager[Lock]:
        """A context in which this process is the only one that writes a dataset here.

        Where the lock can be lost to another process (see `lock.py`), `Lock.check` and every later
        write by this object raise.

        Raises:
            OutputError: another process is writing; the message names it.
        """

    @abstractmethod
    def lock_holder(self) -> tuple[Holder | None, float | None]:
        """Who holds the lock, and how many seconds ago it was renewed, where that can make it lost."""

    def heed(self, token: str, timing: Timing = TIMING) -> None:
        """Refuse to write as soon as the lock is no longer the one with this token: for a worker, whose
        driver holds it."""
        self._lock = Watch(self.root, token, self.lock_holder, timing)

    def check_lock(self) -> None:
        """Raises: OutputError: the lock is lost."""
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
        """Set what does not travel."""
        self._lock = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root!r})"


class ObjectStorage(Storage):
    """A storage behind a URL: its objects can also be told apart, and copied to local files. Its lock
    is a lease."""

    ages_are_free = True
    """Whether the age of an object comes with it, so that workers can ask for it all the time."""
    _cell: Cell | None = None

    @abstractmethod
    def entries(self, prefix: str) -> tuple[Entry, ...]:
        """The objects whose names begin with `prefix`, which is empty or ends in `/`, by name."""

    @abstractmethod
    def download(self, name: str, path: Path) -> None:
        """Copy an object to a local file, without holding it in memory."""

    @abstractmethod
    def lock_cell(self) -> Cell:
        """Where the lock is kept."""

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
