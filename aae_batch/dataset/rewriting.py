"""Rewrite a committed shard atomically, even if the process is killed midway.

All new objects are first written together into one tar beside the shard. From then on the rewrite counts
as done: the next writer to the dataset finishes an interrupted one.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from aae_batch.dataset import layout
from aae_batch.dataset.webdataset import add_member, tar_members
from aae_batch.errors import OutputError
from aae_batch.store.base import Storage
from aae_batch.store.lock import Lock


@contextmanager
def writing(storage: Storage) -> Iterator[Lock]:
    """Hold the dataset's lock, after finishing interrupted rewrites.

    Raises:
        OutputError: another process is writing, or the tar of a rewrite is damaged.
    """
    with storage.writing() as lock:
        for name in storage.list(layout.REWRITING):
            _carry_out(storage, name, _unpacked(storage, name))
        yield lock


def rewrite(storage: Storage, shard: int, objects: Mapping[str, bytes]) -> None:
    """Overwrite a shard's objects, in the order of `objects`; the commit must be the last."""
    name = layout.rewriting_name(shard)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member, data in objects.items():
            add_member(tar, member, data)
    storage.write_bytes(name, buffer.getvalue())
    _carry_out(storage, name, objects)


def _carry_out(storage: Storage, name: str, objects: Mapping[str, bytes]) -> None:
    for member, data in objects.items():
        storage.write_bytes(member, data)
    storage.delete(name)


def _unpacked(storage: Storage, name: str) -> dict[str, bytes]:
    try:
        objects = dict(tar_members(storage.read_bytes(name)))
    except (tarfile.TarError, EOFError):
        objects = {}
    shard = layout.shard_of(name)
    if not objects or shard is None or not all(layout.is_of_shard(n, shard) for n in objects):
        raise OutputError(
            f"{storage.place(name)} is damaged, or was not written by a run: move it away; "
            "`aae-batch verify` says what is missing."
        )
    return objects
