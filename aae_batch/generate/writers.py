"""Threads that encode and store images while sampling goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

LEAST, MOST = 2, 8
"""Writers. Encoding is work and needs few; an upload to an object store is mostly waiting and needs more."""

T = TypeVar("T")


class Writers(Generic[T]):
    """Threads that write what is put, in order, as many as the store needs. One more starts whenever a
    writer has waited for the store for longer than it has encoded, and finds that something waits for it.

    Args:
        write: encodes and stores one item, and returns the seconds of each.
        room: how many items may wait. Together with `MOST` that bounds the memory they take.
    """

    def __init__(self, write: Callable[[T], tuple[float, float]], room: int) -> None:
        self._write = write
        self._waiting: queue.Queue[T] = queue.Queue(room)
        self._count = 0
        self._lock = threading.Lock()
        for _ in range(LEAST):
            self._start()

    def put(self, item: T) -> None:
        """Have an item written; blocks while too many wait."""
        self._waiting.put(item)

    @property
    def waiting(self) -> int:
        """How many items no writer has taken yet."""
        return self._waiting.qsize()

    def _start(self) -> None:
        with self._lock:
            if self._count < MOST:
                threading.Thread(target=self._run, name="writer", daemon=True).start()
                self._count += 1

    def _run(self) -> None:
        while True:
            encoding, uploading = self._write(self._waiting.get())
            if uploading > encoding and self.waiting:
                with suppress(RuntimeError):  # the system has no thread left
                    self._start()
