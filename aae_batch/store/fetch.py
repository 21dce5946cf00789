"""Copy inputs from an object store to local files."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from platformdirs import user_cache_path

from aae_batch.errors import OutputError
from aae_batch.store.base import Entry, ObjectStorage
from aae_batch.store.open import open_url

T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between attempts while a hub is busy or unreachable."""


def fetch(url: str, folder: Path, s3_endpoint: str | None = None) -> Path:
    """Copy one object into a folder under its own name, and return its path.

    Raises:
        OutputError: the object does not exist or cannot be read.
    """
    scheme, _, rest = url.partition("://")
    parent, _, name = rest.rpartition("/")
    path = folder / (name or "object")
    open_url(f"{scheme}://{parent}", s3_endpoint).download(name, path)
    return path


def fetch_folder(url: str, wanted: Callable[[str], bool], s3_endpoint: str | None = None) -> Path:
    """Return a local folder with a copy of the wanted objects under a prefix.

    The objects are copied once per machine, into the user's cache or `AAE_BATCH_CACHE`, and again when
    the store's listing changes.

    Args:
        wanted: tells from an object's name below the prefix whether it is needed.

    Raises:
        OutputError: nothing is there, it cannot be read, or it changes during the copy.
    """
    storage = open_url(url, s3_endpoint)
    entries = _entries(storage, wanted)
    folder = _cache() / _digest(storage, entries)
    if folder.is_dir():
        return folder
    with _one_at_a_time(folder.name):
        if not folder.is_dir():
            with _writing_to_cache():
                _copy(storage, entries, wanted, folder)
    return folder


def fetch_in_turn(
    name: str, fetch: Callable[[], T], patience: Callable[[BaseException], float]
) -> T:
    """Call `fetch` in one process of this machine at a time, retry it after temporary errors, and
    return its result. If many processes start together, the first one fetches and the others find the
    result in the cache.

    Args:
        name: identifies what is fetched.
        patience: how many seconds to wait in all, at most, after an error; 0 if it is not temporary.

    Raises:
        OutputError: the folder of the lock cannot be written to.
    """
    with _one_at_a_time(hashlib.sha256(name.encode()).hexdigest()):
        for i, seconds in enumerate(WAITS):
            try:
                return fetch()
            except Exception as error:
                if sum(WAITS[: i + 1]) >= patience(error):
                    raise
            time.sleep(seconds)
        return fetch()


def folder_digest(url: str, wanted: Callable[[str], bool], s3_endpoint: str | None = None) -> str:
    """Return the SHA-256 of the names, sizes and tags of the wanted objects under a prefix.

    Raises:
        OutputError: nothing is there, or it cannot be listed.
    """
    storage = open_url(url, s3_endpoint)
    return _digest(storage, _entries(storage, wanted))


def _entries(storage: ObjectStorage, wanted: Callable[[str], bool]) -> list[Entry]:
    entries = [entry for entry in storage.entries("") if wanted(entry.name)]
    if not entries:
        raise OutputError(f"There is no model at {storage.root}: check the URL.")
    for entry in entries:
        if ".." in entry.name.split("/"):
            raise OutputError(f"{storage.place(entry.name)} cannot be a file here; rename it.")
    return entries


def _digest(storage: ObjectStorage, entries: list[Entry]) -> str:
    digest = hashlib.sha256(f"{storage.root}\n".encode())
    for entry in entries:
        digest.update(f"{entry.name} {entry.size} {entry.tag}\n".encode())
    return digest.hexdigest()


def _copy(
    storage: ObjectStorage, entries: list[Entry], wanted: Callable[[str], bool], folder: Path
) -> None:
    """Copy under a temporary name, then rename. Only one process at a time calls this."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for entry in entries:
        path = part.joinpath(*entry.name.split("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.download(entry.name, path)
    if _entries(storage, wanted) != entries:
        raise OutputError(f"{storage.root} changed while it was copied: run the command again.")
    part.rename(folder)


@contextmanager
def _one_at_a_time(name: str) -> Iterator[None]:
    """Let one process of this machine fetch this name while the others wait."""
    turn = FileLock(_cache() / f"{name}.lock")
    with _writing_to_cache():
        _cache().mkdir(parents=True, exist_ok=True)
        turn.acquire()
    try:
        yield
    finally:
        turn.release()


@contextmanager
def _writing_to_cache() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"Cannot write to {_cache()}: {error.strerror}. Fix that, or name another folder in "
            "AAE_BATCH_CACHE."
        ) from error


def _cache() -> Path:
    named = os.environ.get("AAE_BATCH_CACHE")
    return Path(named).expanduser() if named else user_cache_path("aae-batch") / "models"
