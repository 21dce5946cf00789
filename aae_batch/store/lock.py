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
either sent before that moment is written only where nothing was.
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

    @classmethod
    def from_json(cls, data: bytes) -> Holder | None:
        """None for what is no holder."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def as_json(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()

    def alive(self) -> Holder:
        """The same holder, with a sign of life."""
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
        except OSError:  # it is someone else's
            return False
        return False

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

    def check(self) -> None:
        """Raises: OutputError: another process has taken the lock over."""
        if time.time() - self.renewed > self.stale:  # asleep, or cut off: is it still ours?
            self.renew()
        if self.lost:
            raise _overtaken(self.root)


@dataclass
class Watch:
    """A worker's eye on the lock that its driver holds.

    Attributes:
        look: reads who holds it, and how many seconds ago it was renewed, where that can be told.
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
        """Raises: OutputError: the driver does not hold it any more, or has ended."""
        with self._guard:
            now = time.monotonic()
            if now - self._tried < self._timing.look and not self._lost:
                return
            self._tried = now
            try:
                holder, age = self.look()
            except OutputError:  # the store is out of reach for a moment
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
    """Renew in a thread, until the context ends or the lock is lost."""
    ended = threading.Event()

    def try_to_renew() -> None:
        try:
            renew()
        except Exception as error:  # whatever it was: the next one may come through in time
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


# --- what is said --------------------------------------------------------------------------------


def foreign(place: str) -> OutputError:
    return OutputError(
        f"{place} is there, and no run wrote it: move it away, or choose another output."
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
        f"Another run has taken over {root}, or the one that this belonged to has ended, or was cut off "
        "from it or asleep for too long: nothing more is written. Let the other one finish."
    )


def _pid_space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not on Linux
        return ""


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
