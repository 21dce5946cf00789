"""Concurrent small reads with results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

AT_ONCE = 8
"""Concurrent reads. In an object store eight small objects take as long as one."""

Item = TypeVar("Item")
Found = TypeVar("Found")


def read_ahead(read: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
    """Call `read` on the items in threads and yield the results in the items' order. At most `AT_ONCE`
    results are in progress or held in memory."""
    rest = iter(items)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ahead = deque(pool.submit(read, item) for item in islice(rest, AT_ONCE))
        try:
            while ahead:
                found = ahead.popleft().result()
                yield found
                ahead.extend(pool.submit(read, item) for item in islice(rest, 1))
        finally:
            for future in ahead:
                future.cancel()
