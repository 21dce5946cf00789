"""Storage in a local folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from aae_batch.errors import OutputError
from aae_batch.store import whole_file
from aae_batch.store.base import Storage, expanded
from aae_batch.store.folder_lock import is_lock_file, locked_folder, read_note
from aae_batch.store.lock import TIMING, Holder, Lock, Timing


class LocalStorage(Storage):
    """A local folder, created on the first write. The root may be a link; links below it are not
    followed."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(expanded(root))

    def read_bytes(self, name: str) -> bytes:
        with self._readable(name) as path:
            return path.read_bytes()

    def open(self, name: str) -> BinaryIO:
        with self._readable(name) as path:
            return path.open("rb")

    def create_bytes(self, name: str, data: bytes) -> bool:
        with self._writable(name):
            return whole_file.create(Path(self.root), name, data)

    def write_bytes(self, name: str, data: bytes) -> None:
        with self._writable(name):
            whole_file.write(Path(self.root), name, data)

    def exists(self, name: str) -> bool:
        with self._readable(name) as path:
            return path.exists()

    def list(self, prefix: str) -> list[str]:
        found = []
        with self._readable(prefix.rstrip("/")) as top:
            for folder, folders, files in os.walk(top, onerror=_unless_missing):
                folders[:] = [name for name in folders if not name.startswith(".")]
                files = [name for name in files if not name.startswith(".")]
                for name in (*folders, *files):
                    whole_file.refuse_link(Path(folder, name))
                found += [Path(folder, name).relative_to(self.root).as_posix() for name in files]
        return sorted(found)

    def anything(self, besides: str = "") -> str | None:
        root = Path(self.root)

        def is_ignored(name: str) -> bool:
            if name == besides:
                return True
            if name == whole_file.PARTS:
                return all(whole_file.is_part(root, part) for part in whole_file.left_over(root))
            return is_lock_file(root, name)

        with self._readable(""):
            try:
                found = sorted(os.listdir(root))
            except FileNotFoundError:
                return None
            for name in found:
                whole_file.refuse_link(root / name)
            return next((name for name in found if not is_ignored(name)), None)

    def delete(self, name: str) -> None:
        with self._writable(name, "delete"):
            self._path(name).unlink(missing_ok=True)

    def place(self, name: str) -> str:
        return str(Path(self.root, *name.split("/")))

    @contextmanager
    def writing(self, timing: Timing = TIMING) -> Iterator[Lock]:
        """Hold an operating system lock, which is released when the process ends, even if it is killed."""
        with locked_folder(Path(self.root), timing) as lock, self._held(lock):
            self._sweep()
            try:
                yield lock
            finally:
                self._sweep()  # actors that died meanwhile may have left files

    def lock_holder(self) -> tuple[Holder | None, float | None]:
        try:
            return read_note(Path(self.root))[0], None
        except OSError as error:
            raise OutputError(f"Cannot read the lock of {self.root}: {error.strerror}.") from error

    @contextmanager
    def _readable(self, name: str) -> Iterator[Path]:
        try:
            yield self._path(name)
        except OSError as error:
            raise OutputError(f"Cannot read {self.place(name)}: {error.strerror}.") from error

    @contextmanager
    def _writable(self, name: str, verb: str = "write") -> Iterator[None]:
        self.check_lock()
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"Cannot {verb} {self.place(name)}: {error.strerror}. Fix that and run the same "
                "command again."
            ) from error

    def _sweep(self) -> None:
        with self._writable(whole_file.PARTS, "sweep"):
            whole_file.sweep(Path(self.root))

    def _path(self, name: str) -> Path:
        return whole_file.below(Path(self.root), name)


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
