"""One writer per output root: a lock that names its holder, and that outlives no holder for long.

In a folder the operating system holds it. In an object store it is the object `.lock`, which its
holder renews every 15 s; one that was not renewed for 90 s, by the store's own clock, or whose holder
was a process of this machine that has ended, belongs to nobody, and the next writer takes it over.

What this guarantees: where the store writes on condition (S3: `If-None-Match`, `If-Match`), of two
processes that ask at once one gets it. Elsewhere a process writes its name, waits a moment and reads
it back: two that ask at once get it both only if the one is slower than that moment between reading
and writing, and then the first learns so when it renews. A holder that was cut off, or asleep, for
more than 90 s learns that it was overtaken when it renews, as soon as it reaches the store again.
Its workers look at the lock themselves, every 5 s while they write, and write no more once it is
another's, or a process's of their machine that has ended, or, in S3, was not renewed for too long. What
either sent before that moment is written where nothing was (see `settle.py`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from filelock import FileLock, Timeout

from aae_batch.errors import OutputError
from aae_batch.store import whole_file

NAME = ".lock"
_HOLDER = ".lock-holder"
"""Beside a folder's lock: who holds it. The lock itself is the operating system's, and empty."""

logger = logging.getLogger("aae_batch")


@dataclass(frozen=True)
class Timing:
    """In seconds.

    Attributes:
        renew: between two signs of life.
        stale: a lock without one for so long belongs to nobody.
        settle: between writing and reading back, in stores that do not write on condition.
        look: between two looks of a worker at its driver's lock.
    """

    renew: float = 15.0
    stale: float = 90.0
    settle: float = 2.0
    look: float = 5.0

    def wait_until_settled(self) -> None:
        time.sleep(self.settle)


TIMING = Timing()


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. Times are UTC, by the holder's clock, and only for people to read."""

    host: str
    pid: int
    token: str
    started: str
    heartbeat: str
    pid_space: str = ""
    """Where `pid` counts: this boot of this machine, and this namespace of processes on it. Machines
    that were cloned may share a name, and containers a name and a boot."""

    @classmethod
    def this_process(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), uuid4().hex, _now(), _now(), _pid_space())

    def alive(self) -> Holder:
        """The same holder, with a sign of life."""
        return replace(self, heartbeat=_now())

    def as_json(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()

    @property
    def has_ended(self) -> bool:
        """It ran on this machine and does so no more. Of another machine's there is no telling."""
        if not self.pid_space or self.pid_space != _pid_space():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # it is someone else's
            return False
        return False

    @classmethod
    def from_json(cls, data: bytes) -> Holder | None:
        """None for what is no holder."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


@dataclass
class Lock:
    """What the holder of a lock has in its hands. `lost` turns true when another took it over.

    Attributes:
        renewed: when that was last done, by the wall's clock, which goes on while a machine sleeps.
        stale: seconds after which another may take it over.
    """

    root: str
    token: str = ""
    lost: bool = False
    renewed: float = field(default_factory=time.time)
    stale: float = math.inf
    renew: Callable[[], None] = lambda: None
    _ended: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raises: OutputError: another process has taken the lock over."""
        if time.time() - self.renewed > self.stale:  # asleep, or cut off: is it still ours?
            self.renew()
        if self.lost:
            raise _overtaken(self.root)


class Watch:
    """A worker's eye on the lock that its driver holds.

    Args:
        look: reads who holds it, and how many seconds ago it was renewed, where that can be told.
    """

    def __init__(
        self,
        root: str,
        token: str,
        look: Callable[[], tuple[Holder | None, float | None]],
        timing: Timing = TIMING,
    ) -> None:
        self.root = root
        self.token = token
        self._look = look
        self._timing = timing
        self._seen, self._tried, self._lost = time.monotonic(), -math.inf, False
        self._guard = threading.Lock()

    def check(self) -> None:
        """Raises: OutputError: the driver does not hold it any more, or has ended."""
        with self._guard:
            now = time.monotonic()
            if now - self._tried < self._timing.look and not self._lost:
                return
            self._tried = now
            try:
                holder, age = self._look()
            except OutputError:  # the store is out of reach for a moment
                if now - self._seen < self._timing.stale:
                    return
                raise
            ours = holder is not None and holder.token == self.token and not holder.has_ended
            self._lost = not ours or (age is not None and age > self._timing.stale)
            if self._lost:
                raise _overtaken(self.root)
            self._seen = now


class Guarded(ABC):
    """A storage that asks before every write whether the lock it heeds is still held."""

    root: str
    _lock: Lock | Watch | None = None

    @abstractmethod
    def lock_holder(self) -> tuple[Holder | None, float | None]:
        """Who holds the lock, and how many seconds ago it was renewed, where that can make it lost."""

    @contextmanager
    def held(self, lock: Lock) -> Iterator[None]:
        self._lock = lock
        try:
            yield
        finally:
            self._lock = None

    def heed(self, token: str) -> None:
        """See `Storage.heed`."""
        self._lock = Watch(self.root, token, self.lock_holder)

    def check_lock(self) -> None:
        """Raises: OutputError: the lock is lost."""
        if self._lock is not None:
            self._lock.check()


def _foreign(place: str) -> OutputError:
    return OutputError(
        f"{place} is there, and no run wrote it: move it away, or choose another output."
    )


def _overtaken(root: str) -> OutputError:
    return OutputError(
        f"Another run has taken over {root}, or the one that this belonged to has ended, or was cut off "
        "from it or asleep for too long: nothing more is written. Let the other one finish."
    )


# --- in a folder ---------------------------------------------------------------------------------


@contextmanager
def locked_folder(root: Path, timing: Timing) -> Iterator[Lock]:
    """Hold a folder's lock, which cannot be lost.

    Raises:
        OutputError: another process holds it, or the folder cannot be written to.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for name in (NAME, _HOLDER):
            if whole_file.below(root, name).exists() and not is_lock_file(root, name):
                raise _foreign(str(root / name))
        system_lock = FileLock(root / NAME)
        system_lock.acquire(timeout=0)
    except Timeout:
        raise _refused(str(root), *_note_if_readable(root)) from None
    except OSError as error:
        raise OutputError(f"Cannot write to {root}: {error.strerror}.") from error
    holder = Holder.this_process()
    lock = Lock(str(root), holder.token)
    try:
        _write_note(root, holder)
        with _renewing(lock, timing, lambda: _write_note(root, holder.alive())):
            yield lock
    finally:
        whole_file.below(root, _HOLDER).unlink(missing_ok=True)
        system_lock.release()


def _write_note(root: Path, holder: Holder) -> None:
    try:
        whole_file.write(root, _HOLDER, holder.as_json())
    except OSError as error:
        raise OutputError(f"Cannot write {root / _HOLDER}: {error.strerror}.") from error


def read_note(root: Path) -> tuple[Holder | None, float | None]:
    """Who holds a folder's lock, and how many seconds ago that was written.

    Raises:
        OSError: it cannot be read.
    """
    note = whole_file.below(root, _HOLDER)
    try:
        return Holder.from_json(note.read_bytes()), max(0.0, time.time() - note.stat().st_mtime)
    except FileNotFoundError:  # not written yet, or the holder is just leaving
        return None, None


def _note_if_readable(root: Path) -> tuple[Holder | None, float | None]:
    try:
        return read_note(root)
    except OSError:
        return None, None


def is_lock_file(root: Path, name: str) -> bool:
    """Whether a file of a folder is one that holders of its lock write."""
    path = root / name
    if name == NAME:
        return path.is_file() and path.stat().st_size == 0
    return name == _HOLDER and path.is_file() and Holder.from_json(path.read_bytes()) is not None


# --- in an object store --------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A lock object as it was read.

    Attributes:
        version: what the store calls this state of it.
        age: seconds since it was written, by the store's clock; None where that is not known.
    """

    data: bytes
    version: str
    age: float | None

    @property
    def holder(self) -> Holder | None:
        return Holder.from_json(self.data)


class Cell(Protocol):
    """One object of a store. All verbs raise OutputError when the store cannot be used."""

    def read(self, aged: bool = False) -> Seen | None:
        """None where there is none. The age is only sure to be looked up where it is asked for."""

    def write(self, data: bytes, over: Seen | None) -> None:
        """Write where the object still is `over` (None: where there is none), as far as the store
        can tell; what came of it is found out by reading."""

    def delete(self) -> None: ...


@contextmanager
def leased(cell: Cell, root: str, timing: Timing) -> Iterator[Lock]:
    """Hold an object store's lock, and renew it meanwhile.

    Raises:
        OutputError: another process holds it, or the store cannot be used.
    """
    holder = Holder.this_process()
    found = cell.read(aged=True)
    if found is not None and found.holder is None:
        raise _foreign(f"{root}/{NAME}")
    ended = found is not None and found.holder is not None and found.holder.has_ended
    if found is not None and not ended and (found.age is None or found.age < timing.stale):
        raise _refused(root, found.holder, found.age, timing)
    found = _write(cell, holder, over=found)
    if not _is_of(found, holder):  # another was quicker
        raise _refused(root, found.holder if found else None, found.age if found else None)

    one_at_a_time = threading.Lock()

    def renew() -> None:
        with one_at_a_time:
            if lock.lost:
                return
            found = cell.read()
            # Where it is gone after a long absence, another may have held it and be through.
            gone = found is None and time.time() - lock.renewed > timing.stale
            if not gone and (found is None or _is_of(found, holder)):
                found = _write(cell, holder, over=found)
            if _is_of(found, holder):
                lock.renewed = time.time()
            else:
                lock.lost = True
                logger.error("Another run has taken over %s.", root)

    lock = Lock(root, holder.token, stale=timing.stale, renew=renew)
    try:
        with _renewing(lock, timing, renew):
            yield lock
    finally:
        _release(cell, root, holder, timing)


class Leasing(Guarded):
    """A storage whose lock is a lease."""

    ages_are_free = True
    """Whether the age of an object comes with it, so that workers can ask for it all the time."""
    _cell: Cell | None = None

    @abstractmethod
    def lock_cell(self, timing: Timing) -> Cell:
        """Where the lock is kept."""

    @contextmanager
    def writing(self, timing: Timing = TIMING) -> Iterator[Lock]:
        """See `Storage.writing`."""
        with leased(self.lock_cell(timing), self.root, timing) as lock, self.held(lock):
            yield lock

    def lock_holder(self) -> tuple[Holder | None, float | None]:
        self._cell = self._cell or self.lock_cell(TIMING)
        seen = self._cell.read(aged=self.ages_are_free)
        return (seen.holder, seen.age) if seen else (None, None)


def _write(cell: Cell, holder: Holder, over: Seen | None) -> Seen | None:
    """Returns what is there afterwards: the answer to a write may get lost, and the write not."""
    cell.write(holder.alive().as_json(), over)
    return cell.read()


def _is_of(found: Seen | None, holder: Holder) -> bool:
    current = found.holder if found else None
    return current is not None and current.token == holder.token


def _release(cell: Cell, root: str, holder: Holder, timing: Timing) -> None:
    try:
        if _is_of(cell.read(), holder):
            cell.delete()
    except OutputError as error:
        logger.warning(
            "The lock of %s was not removed (%s); it ends in %.0f s.", root, error, timing.stale
        )


# --- both ----------------------------------------------------------------------------------------


@contextmanager
def _renewing(lock: Lock, timing: Timing, renew: Callable[[], None]) -> Iterator[None]:
    """Renew in a thread, until the context ends or the lock is lost."""

    def try_to() -> None:
        try:
            renew()
        except Exception as error:  # whatever it was: the next one may come through in time
            logger.warning("The lock of %s was not renewed: %s", lock.root, error)

    def keep() -> None:
        while not lock.lost and not lock._ended.wait(timing.renew):
            try_to()

    thread = threading.Thread(target=keep, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        lock._ended.set()
        thread.join()


def _refused(
    root: str, holder: Holder | None, age: float | None, timing: Timing | None = None
) -> OutputError:
    who = f": {holder}" if holder else ""
    if holder and age is not None:
        who += f", last heard of {age:.0f} s ago"
    if timing is None:
        end = ""
    elif age is None:
        end = f"; if that run has died, delete {root}/{NAME}"
    else:
        end = f"; if that run has died, the output is free in {max(1, timing.stale - age):.0f} s"
    return OutputError(
        f"Another run is writing to {root}{who}. Wait for it, or choose another output{end}."
    )


def _pid_space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not on Linux
        return ""


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
