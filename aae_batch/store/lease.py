"""An object store's lock: an object that its holder renews, and that others take over once it is old.
See `lock.py` for what it guarantees."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from aae_batch.errors import OutputError
from aae_batch.store.lock import NAME, Holder, Lock, Timing, foreign, logger, refused, renewing


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

    def write(self, data: bytes, over: Seen | None) -> bool:
        """Write where the object still is `over` (None: where there is none); what came of it is found
        out by reading. Returns False where the store knows no such condition, and wrote without."""

    def delete(self) -> None: ...


@contextmanager
def leased(cell: Cell, root: str, timing: Timing) -> Iterator[Lock]:
    """Hold an object store's lock, and renew it meanwhile.

    Raises:
        OutputError: another process holds it, or the store cannot be used.
    """
    me = Holder.this_process()

    def is_mine(found: Seen | None) -> bool:
        holder = found.holder if found else None
        return holder is not None and holder.token == me.token

    def claim(over: Seen | None) -> Seen | None:
        """Returns what is there afterwards: the answer to a write may get lost, and the write not."""
        if not cell.write(me.alive().as_json(), over):
            time.sleep(timing.settle)
        return cell.read()

    found = cell.read(aged=True)
    if found is not None:
        if found.holder is None:
            raise foreign(f"{root}/{NAME}")
        if not found.holder.has_ended and (found.age is None or found.age < timing.stale):
            raise refused(root, found.holder, found.age, timing)
    found = claim(over=found)
    if not is_mine(found):  # another was quicker
        raise refused(root, found.holder if found else None, found.age if found else None)

    one_at_a_time = threading.Lock()

    def renew() -> None:
        with one_at_a_time:
            if lock.lost:
                return
            found = cell.read()
            # Where it is gone after a long absence, another may have held it and be through.
            gone = found is None and time.time() - lock.renewed > timing.stale
            if not gone and (found is None or is_mine(found)):
                found = claim(over=found)
            if is_mine(found):
                lock.renewed = time.time()
            else:
                lock.lost = True
                logger.error("Another run has taken over %s.", root)

    lock = Lock(root, me.token, stale=timing.stale, renew=renew)
    try:
        with renewing(lock, timing, renew):
            yield lock
    finally:
        try:
            if is_mine(cell.read()):
                cell.delete()
        except OutputError as error:
            logger.warning(
                "The lock of %s was not removed (%s); it ends in %.0f s.", root, error, timing.stale
            )
