"""An object store's lock: an object that its holder renews and that others take over once it expires.
See `lock.py` for its guarantees."""

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
        version: the store's identifier of this version, for conditional writes.
        age: seconds since it was written, by the store's clock; None if unknown.
    """

    data: bytes
    version: str
    age: float | None

    @property
    def holder(self) -> Holder | None:
        return Holder.from_json(self.data)


class Cell(Protocol):
    """One object of a store. All methods raise OutputError if the store cannot be used."""

    def read(self, aged: bool = False) -> Seen | None:
        """Read the object; None if it does not exist. The age may be missing unless `aged` is True."""

    def write(self, data: bytes, over: Seen | None) -> bool:
        """Write the object if it is still `over`, or if it does not exist and `over` is None.

        Returns False if the store has no conditional writes and the object was written unconditionally,
        else True, whether or not the condition held: read the object to find out.
        """

    def delete(self) -> None: ...


@contextmanager
def leased(cell: Cell, root: str, timing: Timing) -> Iterator[Lock]:
    """Hold an object store's lock and renew it.

    Raises:
        OutputError: another process holds it, or the store cannot be used.
    """
    me = Holder.this_process()

    def is_mine(found: Seen | None) -> bool:
        holder = found.holder if found else None
        return holder is not None and holder.token == me.token

    def claim(over: Seen | None) -> Seen | None:
        """Write, then return what is stored: a write may succeed although its response was lost."""
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
    if not is_mine(found):  # another process was faster
        raise refused(root, found.holder if found else None, found.age if found else None)

    one_at_a_time = threading.Lock()

    def renew() -> None:
        with one_at_a_time:
            if lock.lost:
                return
            found = cell.read()
            # If we were away for long and it is gone, another process may have held and released it.
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
                "The lock of %s was not removed (%s); it expires in %.0f s.",
                root,
                error,
                timing.stale,
            )
