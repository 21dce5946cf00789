"""What a stopped job keeps of a shard that is not complete."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial as partial_of

import pyarrow as pa
import pytest

from aae_batch.dataset import partial
from aae_batch.dataset.layout import TRIES_SCHEMA
from aae_batch.dataset.layouts import shard_of
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.verify import to_delete, verify
from aae_batch.dataset.writer import Shard
from aae_batch.manifest.reader import open_manifest
from tests.small_output import Output


@pytest.fixture(params=["files", "webdataset", "parquet", "with maps over time"])
def make(make_output, request) -> Callable[..., Output]:
    """Write a dataset in a layout, or one that keeps maps of other steps than the last."""
    if request.param == "with maps over time":
        return partial_of(make_output, "webdataset", attention_maps="every:2")
    return partial_of(make_output, request.param)


@pytest.fixture
def uncommitted(make):
    """A storage, its first shard, rows a and b, without its tables, and the outcomes of both."""
    storage = make().storage
    shard = shard_of(Dataset(storage).run, storage, 0)
    outcomes = shard.stored_outcomes(0)
    for name in ("metadata/00000.parquet", "attention/00000.parquet", "summary.json"):
        storage.delete(name)
    return storage, shard, outcomes


def names_of(shard: Shard) -> list[str]:
    return list(partial.kept(shard.storage, shard.fingerprint).get(shard.index, ()))


def test_outcomes_come_back_as_they_were_kept(uncommitted, make, tmp_path):
    storage, shard, (first, second) = uncommitted
    partial.keep(shard, [second])
    partial.keep(shard, [first])
    partial.keep(shard, [])
    statuses = sorted(partial.kept(storage, shard.fingerprint)[0].values(), key=str)
    assert statuses == [{0: "ok"}, {1: "ok"}]
    found, damaged = partial.take_up(shard, names_of(shard), range(2))
    assert not damaged
    one = make(tmp_path / "other")
    with open_manifest(one.manifest) as manifest:
        shard.commit(list(found.values()), manifest.part(0, 2).extras)
    partial.discard(storage, names_of(shard))
    there, here = Dataset(one.storage), Dataset(storage)
    assert here.metadata().equals(there.metadata())
    assert here.attention().equals(there.attention())
    for row in here.metadata().to_pylist():
        if row["status"] == "ok":
            assert here.image_bytes(row) == there.image_bytes(row)


def test_tries_come_back_as_they_were_kept(uncommitted):
    _, shard, (first, _) = uncommitted
    tries = [
        {"id": "a", "try": 0, "verdict": "rejected", "kept": False, "guided": 2, "denoised": 6},
        {"id": "a", "try": 1, "verdict": "accepted", "kept": True, "guided": 2, "denoised": 6},
    ]
    made = [{"seed": n, "method": "syngen", "picture": b"png"} | one for n, one in enumerate(tries)]
    partial.keep(shard, [first.after(made)])
    found, _ = partial.take_up(shard, names_of(shard), range(2))
    assert [found[0].metadata[name] for name in ("tries", "kept_try", "forwards")] == [2, 1, 16]
    there, here = (pa.Table.from_pylist(rows, TRIES_SCHEMA) for rows in (made, found[0].tries))
    assert here.equals(there)


def test_only_the_rows_that_are_asked_for_come_back(uncommitted):
    _, shard, outcomes = uncommitted
    partial.keep(shard, outcomes)
    found, _ = partial.take_up(shard, names_of(shard), range(1, 2))
    assert list(found) == [1]


def test_a_row_whose_picture_is_gone_is_not_taken_up(make_output):
    storage = make_output("files").storage
    shard = shard_of(Dataset(storage).run, storage, 0)
    partial.keep(shard, shard.stored_outcomes(0))
    storage.delete("images/00000/a.png")
    found, _ = partial.take_up(shard, names_of(shard), range(2))
    assert list(found) == [1]


def test_a_damaged_file_is_deleted_and_its_rows_are_not_taken_up(uncommitted):
    storage, shard, outcomes = uncommitted
    partial.keep(shard, outcomes)
    (name,) = names_of(shard)
    data = bytearray(storage.read_bytes(name))
    data[len(data) // 3] ^= 1
    storage.write_bytes(name, bytes(data))
    assert partial.take_up(shard, [name], range(2)) == ({}, [name])
    assert not storage.exists(name)


@pytest.mark.parametrize("kind", ["cut off", "of another run", "not ours"])
def test_a_file_that_is_not_known_to_be_ours_is_left_alone(uncommitted, kind):
    storage, shard, outcomes = uncommitted
    partial.keep(shard, outcomes)
    (name,) = names_of(shard)
    mark = shard.fingerprint
    if kind == "cut off":
        storage.write_bytes(name, storage.read_bytes(name)[:-9])
    elif kind == "of another run":
        mark = "another"
    else:
        data = storage.read_bytes(name)
        storage.delete(name)
        name = "partial/holiday.parquet"
        storage.write_bytes(name, data)
    others: list[str] = []
    assert partial.kept(storage, mark, others.append) == {}
    assert others == [name]
    assert storage.exists(name)


def test_verify_knows_what_is_kept(uncommitted):
    storage, shard, outcomes = uncommitted
    partial.keep(shard, outcomes)
    assert verify(storage).only_incomplete
    (name,) = names_of(shard)
    storage.write_bytes("partial/00000/0badbad00badbad0.parquet", storage.read_bytes(name)[:-9])
    storage.write_bytes("partial/notes.txt", b"dear")
    found = verify(storage)
    assert to_delete(storage, found) == ["partial/00000/0badbad00badbad0.parquet"]
    assert any("no run wrote partial/notes.txt" in str(problem) for problem in found.problems)


def test_rows_of_a_complete_shard_are_left_by_a_command_to_be_finished(make_output):
    storage = make_output("files").storage
    shard = shard_of(Dataset(storage).run, storage, 0)
    partial.keep(shard, shard.stored_outcomes(0))
    found = verify(storage)
    assert found.only_incomplete
    assert to_delete(storage, found) == []
