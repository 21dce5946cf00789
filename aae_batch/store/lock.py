"""One writer per output root: a lock that names its holder and expires soon after its holder dies.

In a folder it is an operating system lock. In an object store it is the object `.lock`, which its
holder renews every 15 s. The next writer takes it over if it was not renewed for 90 s by the store's
own clock, or if its holder was a process of this machine that has ended.

Guarantees:
- If the store supports conditional writes (S3: `If-None-Match`, `If-Match`), only one of two concurrent
  processes gets the lock.
- In other stores a process writes its name, waits 2 s and reads it back. Two concurrent processes both
  get the lock only if one takes longer than that between its read and its write. The first one then
  notices when it renews.
- A holder that was disconnected or asleep for more than 90 s notices its loss when it renews, as soon as
  it reaches the store again.
- Workers check the lock every 5 s while they write. They stop once it belongs to another process, once
  the holder has ended on their machine or, in S3, once it was not renewed for 90 s.
- Writes that the holder or its workers sent before that moment create objects but overwrite none.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from uuid import uuid4

from aae_batch.errors import OutputError

NAME = ".lock"

logger = logging.getLogger("aae_batch")


@dataclass(frozen=True)
class Timing:
    """Times in seconds.

    Attributes:
        renew: between two renewals.
        stale: age after which a lock that was not renewed can be taken over.
        settle: between writing and reading back, in stores without conditional writes.
        look: between two checks of the driver's lock by a worker.
    """

    renew: float = 15.0
    stale: float = 90.0
    settle: float = 2.0
    look: float = 5.0


TIMING = Timing()


@dataclass(frozen=True)
class Holder:
    """The holder of a lock. Times are UTC by the holder's clock, and are only displayed."""

    host: str
    pid: int
    token: str
    started: str
    heartbeat: str
    pid_space: str = ""
    """The scope of `pid`: boot id and PID namespace. The host name is not enough: cloned machines may
    share it, and containers may share host name and boot id."""

    @classmethod
    def this_process(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), uuid4().hex, _now(), _now(), _pid_space())

    @classmethod
    def from_json(cls, data: bytes) -> Holder | None:
        """Return None if the data does not describe a holder."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def as_json(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()

    def alive(self) -> Holder:
        """Return the same holder with the current time as its heartbeat."""
        return replace(self, heartbeat=_now())

    @property
    def has_ended(self) -> bool:
        """True if it ran on this machine and exited; False for other machines."""
        if not self.pid_space or self.pid_space != _pid_space():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # it runs, as another user
            return False
        return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


@dataclass
class Lock:
    """The holder's view of its lock.

    Attributes:
        lost: whether another process has taken it over.
        renewed: time of the last renewal, in seconds since 1970. The wall clock is used because it
            keeps running while a machine sleeps.
        stale: seconds without renewal after which another process may take it over.
    """

    root: str
    token: str = ""
    lost: bool = False
    renewed: float = field(default_factory=time.time)
    stale: float = math.inf
    renew: Callable[[], None] = lambda: None

    def check(self) -> None:
        """Raise OutputError if another process has taken the lock over."""
        if time.time() - self.renewed > self.stale:  # asleep or disconnected: is it still ours?
            self.renew()
        if self.lost:
            raise _overtaken(self.root)


@dataclass
class Watch:
    """A worker's check of the lock that its driver holds.

    Attributes:
        look: returns the holder and the seconds since the last renewal, each None if unknown.
    """

    root: str
    token: str
    look: Callable[[], tuple[Holder | None, float | None]]
    _timing: Timing = TIMING
    _seen: float = field(default_factory=time.monotonic)
    _tried: float = -math.inf
    _lost: bool = False
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """Raise OutputError if the driver no longer holds the lock or has ended."""
        with self._guard:
            now = time.monotonic()
            if now - self._tried < self._timing.look and not self._lost:
                return
            self._tried = now
            try:
                holder, age = self.look()
            except OutputError:  # the store may be unreachable only for a moment
                if now - self._seen < self._timing.stale:
                    return
                raise
            ours = holder is not None and holder.token == self.token and not holder.has_ended
            self._lost = not ours or (age is not None and age > self._timing.stale)
            if self._lost:
                raise _overtaken(self.root)
            self._seen = now


@contextmanager
def renewing(lock: Lock, timing: Timing, renew: Callable[[], None]) -> Iterator[None]:
    """Renew the lock in a thread until the context ends or the lock is lost."""
    ended = threading.Event()

    def try_to_renew() -> None:
        try:
            renew()
        except Exception as error:  # of any kind: the next renewal may succeed in time
            logger.warning("The lock of %s was not renewed: %s", lock.root, error)

    def keep() -> None:
        while not lock.lost and not ended.wait(timing.renew):
            try_to_renew()

    thread = threading.Thread(target=keep, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# --- messages ------------------------------------------------------------------------------------


def foreign(place: str) -> OutputError:
    return OutputError(
        f"{place} exists, and no run wrote it: move it away, or choose another output."
    )


def refused(
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


def _overtaken(root: str) -> OutputError:
    return OutputError(
        f"Another run has taken over {root}, or the run that this process belongs to has ended, or was "
        "disconnected or asleep for too long: nothing more is written. Let the other run finish."
    )


def _pid_space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not on Linux
        return ""


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
