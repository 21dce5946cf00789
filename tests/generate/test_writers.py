"""As many writers as the store needs, and no more images in memory than there is room for."""

from __future__ import annotations

import threading

import pytest

from aae_batch.generate.writers import LEAST, MOST, Writers

ENCODED_LONGER, UPLOADED_LONGER = (2.0, 1.0), (1.0, 2.0)


class Store:
    """Writes end when the test says so, and say that they took `seconds`."""

    def __init__(self, seconds: tuple[float, float], room: int = 100) -> None:
        self.seconds = seconds
        self.begun = self.ended = self.most_waiting = 0
        self._changed = threading.Condition()
        self._may_end = threading.Semaphore(0)
        self.writers: Writers[int] = Writers(self.write, room)

    def write(self, item: int) -> tuple[float, float]:
        with self._changed:
            self.begun += 1
            self.most_waiting = max(self.most_waiting, self.writers.waiting)
            self._changed.notify_all()
        self._may_end.acquire()
        with self._changed:
            self.ended += 1
            self._changed.notify_all()
        return self.seconds

    def let_end(self, writes: int) -> None:
        """Let so many writes end, one after another, so that nothing else ends meanwhile."""
        for _ in range(writes):
            ended = self.ended
            self._may_end.release()
            self.until(lambda ended=ended: self.ended > ended)

    def until(self, condition) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout=20)

    @property
    def at_once(self) -> int:
        return self.begun - self.ended


def test_another_writer_starts_whenever_one_has_waited_for_the_store_and_an_image_waits():
    store = Store(UPLOADED_LONGER)
    for item in range(40):
        store.writers.put(item)
    for at_once in [*range(LEAST, MOST + 1), MOST, MOST]:
        store.until(lambda at_once=at_once: store.at_once == at_once)
        store.let_end(1)


@pytest.mark.parametrize(
    ("seconds", "items"), [(ENCODED_LONGER, 40), (UPLOADED_LONGER, LEAST)], ids=["encodes", "idle"]
)
def test_none_starts_if_the_store_is_quick_or_nothing_waits(seconds, items):
    store = Store(seconds)
    for item in range(items):
        store.writers.put(item)
    store.until(lambda: store.at_once == LEAST)
    writers = sum(thread.name == "writer" for thread in threading.enumerate())
    store.let_end(items)
    for item in range(LEAST + 1):  # one that had started would take the last
        store.writers.put(item)
    store.until(lambda: store.at_once == LEAST)
    assert store.writers.waiting == 1
    assert sum(thread.name == "writer" for thread in threading.enumerate()) == writers


def test_who_puts_waits_while_there_is_no_room():
    store = Store(ENCODED_LONGER, room=3)
    every = range(20)
    putting = threading.Thread(target=lambda: [store.writers.put(item) for item in every])
    putting.start()
    store.until(lambda: store.at_once == LEAST)
    store.let_end(len(every))
    putting.join(20)
    assert store.begun == len(every)
    assert store.most_waiting <= 3
