"""Outputs and inputs in any store that fsspec supports: Google Cloud Storage, Azure, the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import fsspec

from aae_batch.errors import OutputError
from aae_batch.store.base import Entry, ObjectStorage
from aae_batch.store.lease import Seen
from aae_batch.store.lock import NAME

PACKAGES = {
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "adlfs"),
    "hf": "huggingface_hub",
}
"""The package to install for each scheme."""

_CLOCK = "-clock-"
_LOCKS = re.compile(rf"{re.escape(NAME)}({_CLOCK}[0-9a-f]{{32}})?")

_TAGS = ("etag", "ETag", "md5Hash", "generation", "blob_id", "last_modified", "mtime", "created")
"""Keys by which stores identify an object's content, most reliable first."""


class FsspecStorage(ObjectStorage):
    """A folder in an fsspec store. fsspec finds credentials in the environment.

    Writes are atomic if the store's own writes are, as in all object stores.
    """

    ages_are_free = False

    def __init__(self, root: str) -> None:
        self.root = root
        scheme = root.split("://")[0]
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError:
            package = PACKAGES.get(scheme)
            fix = f"; pip install {package}" if package else ""
            raise OutputError(f"{scheme}:// needs a package that is missing{fix}.") from None
        except ValueError:
            raise OutputError(
                f"No store supports {scheme}://; use a folder, s3://, or an fsspec scheme."
            ) from None
        self._reset()

    def read_bytes(self, name: str) -> bytes:
        with self._explained("read", name) as store:
            return store.cat_file(self._path(name))

    def open(self, name: str) -> BinaryIO:
        with self._explained("read", name) as store:
            return store.open(self._path(name), "rb")

    def create_bytes(self, name: str, data: bytes) -> bool:
        """Check whether the object exists, then create it, conditionally if the store's package can."""
        self.check_lock()
        if self.exists(name):
            return False
        known = (FileExistsError, NotImplementedError, TypeError, ValueError)
        try:
            with self._explained("write", name, passing=known) as store:
                _put(store, self._path(name), data, mode="create")
        except FileExistsError:
            return False
        except known:
            self.write_bytes(name, data)
        return True

    def write_bytes(self, name: str, data: bytes) -> None:
        self.check_lock()
        with self._explained("write", name) as store:
            _put(store, self._path(name), data)

    def exists(self, name: str) -> bool:
        with self._explained("read", name) as store:
            store.invalidate_cache()
            try:
                store.info(self._path(name))
            except FileNotFoundError:
                return False
        return True

    def anything(self, besides: str = "") -> str | None:
        return next((entry.name for entry in self.entries("") if entry.name != besides), None)

    def entries(self, prefix: str) -> tuple[Entry, ...]:
        with self._explained("list", prefix) as store:
            start = len(self._path(""))
            store.invalidate_cache()
            try:
                found = store.find(self._path(prefix).rstrip("/"), detail=True)
            except FileNotFoundError:
                return ()
        entries = (Entry(path[start:], info["size"], _tag(info)) for path, info in found.items())
        kept = (entry for entry in entries if not _LOCKS.fullmatch(entry.name))
        return tuple(sorted(kept, key=lambda entry: entry.name))

    def delete(self, name: str) -> None:
        self.check_lock()
        with self._explained("delete", name) as store:
            _remove(store, self._path(name))

    def download(self, name: str, path: Path) -> None:
        with self._explained("read", name) as store:
            store.get_file(self._path(name), str(path))

    def lock_cell(self) -> _LockObject:
        return _LockObject(self)

    def _reset(self) -> None:
        super()._reset()
        self._opened: tuple[Any, str] | None = None

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            self._opened = fsspec.core.url_to_fs(self.root)
        return self._opened

    def _path(self, name: str) -> str:
        return f"{self._open()[1].rstrip('/')}/{name}"

    @contextmanager
    def _explained(
        self, verb: str, name: str, passing: tuple[type[Exception], ...] = ()
    ) -> Iterator[Any]:
        """Yield the fsspec filesystem, and turn its errors, which can be of any class, into OutputError,
        except those in `passing`. The original text is left out, since it may quote credentials."""
        failed = f"Cannot {verb} {self.place(name)}"
        try:
            yield self._open()[0]
        except passing:
            raise
        except FileNotFoundError:
            raise OutputError(f"{failed}: there is no such object; check the name.") from None
        except PermissionError:
            raise OutputError(
                f"{failed}: access is denied; check which credentials the environment gives."
            ) from None
        except Exception as error:
            reason = isinstance(error, OSError) and error.strerror
            raise OutputError(
                f"{failed}: {reason or type(error).__name__}; check the network, the name and the "
                "credentials in the environment, and run the same command again."
            ) from None


class _LockObject:
    """The lock's object. Its age is measured against a second object written now, since both have the
    store's time. If a store reports no times, the user must remove the lock of a dead run."""

    def __init__(self, storage: FsspecStorage) -> None:
        self._storage = storage
        self._path = storage._path(NAME)

    def read(self, aged: bool = False) -> Seen | None:
        with self._storage._explained("read", NAME) as store:
            store.invalidate_cache()
            try:
                data = store.cat_file(self._path)
                return Seen(data, version="", age=self._age(store) if aged else None)
            except FileNotFoundError:
                return None

    def write(self, data: bytes, over: Seen | None) -> bool:
        with self._storage._explained("write", NAME) as store:
            _put(store, self._path, data)
        return False

    def delete(self) -> None:
        with self._storage._explained("delete", NAME) as store:
            _remove(store, self._path)

    def _age(self, store: Any) -> float | None:
        """Return the lock's age in seconds. This writes and removes an object."""
        clock = f"{self._path}{_CLOCK}{uuid4().hex}"
        try:
            store.pipe_file(clock, b"")
            try:
                return (store.modified(clock) - store.modified(self._path)).total_seconds()
            finally:
                _remove(store, clock)
        except NotImplementedError:
            return None


def _put(store: Any, path: str, data: bytes, **mode: str) -> None:
    try:
        store.pipe_file(path, data, **mode)
    except FileNotFoundError:  # the store has real folders
        store.makedirs(path.rpartition("/")[0], exist_ok=True)
        store.pipe_file(path, data, **mode)


def _remove(store: Any, path: str) -> None:
    with suppress(FileNotFoundError):
        store.rm_file(path)


def _tag(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in _TAGS if info.get(name) is not None), "")
