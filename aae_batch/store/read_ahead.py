"""Several small reads at once, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

AT_ONCE = 8
"""Reads under way: an object store takes as long for one small object as for eight."""

Item = TypeVar("Item")
Found = TypeVar("Found")


def read_ahead(read: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
    """What `read`, called in threads, finds of each item, in their order; at most `AT_ONCE` results are
    under way or held."""
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
