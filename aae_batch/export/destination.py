"""Where an export goes: what lies there, and what of it may be replaced.

An export writes its marker first, `.aae_batch_export.json`, which says what it is going to write, and
its card last. So a file is known for an export's own by the marker beside it and by its name, and an
export for whole by its card.
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
    """What an export is going to write: in which format, in how many parts, and the suffix of its
    picture files, with its dot."""

    format: str
    pieces: int
    suffix: str

    def write(self, destination: Storage) -> None:
        destination.write_bytes(MARKER, (json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def read(cls, destination: Storage) -> Marker | None:
        """That of the export in the destination; None where none can be read."""
        if not destination.exists(MARKER):
            return None
        try:
            marker = TypeAdapter(cls).validate_json(destination.read_bytes(MARKER), strict=True)
        except ValidationError:
            return None
        return marker if marker.format in FORMATS else None


def replaceable(destination: Storage, force: bool) -> list[str]:
    """The files of an earlier export in the destination, its card first.

    Raises:
        OutputError: there are files of others; or the earlier export is whole, and not `force`.
    """
    names = [name for name in destination.list("") if not name.startswith(".")]
    own: set[str] = set()
    if names and (marker := Marker.read(destination)):
        own = {CARD, SAMPLES} | files_of(marker.format, marker.pieces, marker.suffix, names)
    if foreign := next((name for name in names if name not in own), None):
        raise OutputError(
            f"{destination.root} holds {foreign}, which is of no export: choose an empty destination."
        )
    if CARD in names and not force:
        raise OutputError(
            f"{destination.root} holds an export: choose another destination, or replace it with "
            "--force."
        )
    return sorted(names, key=lambda name: name != CARD)


def replace(destination: Storage, earlier: list[str], marker: Marker) -> None:
    """Delete the files of an earlier export, the card before the others so that what is left of it is
    never taken for whole, and then mark the place for this one."""
    if earlier:
        destination.delete(earlier[0])
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(destination.delete, earlier[1:]))
    marker.write(destination)
