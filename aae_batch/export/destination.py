"""The destination of an export: what it contains, and which files may be replaced.

An export first writes its marker, `.aae_batch_export.json`, which says what it will write, and writes
its card last. The marker and a file's name show that the file belongs to an export; the card shows that
the export is complete.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter, ValidationError

from aae_batch.errors import OutputError
from aae_batch.export.formats import CARD, FORMATS, SAMPLES, THREADS, files_of
from aae_batch.store.base import Storage

MARKER = ".aae_batch_export.json"


@dataclass(frozen=True)
class Marker:
    """What an export will write: the format, the number of parts, and the suffix of image files,
    including the dot."""

    format: str
    pieces: int
    suffix: str

    def write(self, destination: Storage) -> None:
        destination.write_bytes(MARKER, (json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def read(cls, destination: Storage) -> Marker | None:
        """Return the marker in the destination, or None if it is missing or invalid."""
        if not destination.exists(MARKER):
            return None
        try:
            marker = TypeAdapter(cls).validate_json(destination.read_bytes(MARKER), strict=True)
        except ValidationError:
            return None
        return marker if marker.format in FORMATS else None


def replaceable(destination: Storage, force: bool) -> list[str]:
    """Return the files of an earlier export in the destination, its card first.

    Raises:
        OutputError: the destination holds other files, or a complete export and `force` is not set.
    """
    names = [name for name in destination.list("") if not name.startswith(".")]
    own: set[str] = set()
    if names and (marker := Marker.read(destination)):
        own = {CARD, SAMPLES} | files_of(marker.format, marker.pieces, marker.suffix, names)
    if foreign := next((name for name in names if name not in own), None):
        raise OutputError(
            f"{destination.root} holds {foreign}, which no export wrote: choose an empty destination."
        )
    if CARD in names and not force:
        raise OutputError(
            f"{destination.root} holds an export: choose another destination, or replace it with "
            "--force."
        )
    return sorted(names, key=lambda name: name != CARD)


def replace(destination: Storage, earlier: list[str], marker: Marker) -> None:
    """Delete the files of an earlier export, then write the marker of this one. The card goes first, so
    that a partly deleted export never looks complete."""
    if earlier:
        destination.delete(earlier[0])
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(destination.delete, earlier[1:]))
    marker.write(destination)
