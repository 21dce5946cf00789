from __future__ import annotations

import threading

import pytest

from aae_batch.store.read_ahead import AT_ONCE, read_ahead


def test_results_are_in_order_and_as_many_reads_as_allowed_are_under_way():
    together = threading.Barrier(AT_ONCE, timeout=30)  # passes when all are there

    def read(item: int) -> int:
        together.wait()
        return item * item

    items = range(2 * AT_ONCE)
    assert list(read_ahead(read, items)) == [item * item for item in items]


def test_no_more_is_read_than_is_asked_for_soon():
    read = []
    for found in read_ahead(lambda item: read.append(item) or item, range(100)):
        if found == 3:
            break
    assert len(read) <= 3 + AT_ONCE


def test_an_error_comes_where_its_result_would():
    def read(item: int) -> int:
        return 1 // (2 - item)

    found = read_ahead(read, range(100))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)
