"""How a run stores its pictures: a class for each layout, in which all the rules of that layout stand."""

from __future__ import annotations

import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.dataset import layout as names
from aae_batch.dataset.image_format import PNG, ImageFormat
from aae_batch.dataset.layout import Layout
from aae_batch.dataset.outcome import Outcome, may_have_left_a_picture
from aae_batch.dataset.problem import Problem, not_ours
from aae_batch.dataset.settle import is_picture, settle, settle_picture
from aae_batch.dataset.webdataset import tar_members, tar_of
from aae_batch.errors import OutputError
from aae_batch.store.base import Storage

_OF_THE_TABLE_ONLY = [
    "status",
    "error_type",
    "error",
    "file_name",
    "seconds",
    "shard",
    "fingerprint",
]
"""Columns that a picture's JSON in a tar lacks. Without them, among which `seconds` alone differs from
run to run, the same shard gives the same tar."""

_MEASURED = ("num_refinements", "final_loss", "neglected")
"""Columns that rounding may change from one attempt to the next."""

_PICTURES_AT_ONCE = 16
"""That are read from a table."""


@dataclass(frozen=True)
class Stored:
    """A committed shard.

    Attributes:
        table: its metadata.
        good: the ids of its rows with a picture.
        failed: those of rows of which an earlier attempt may have left one.
    """

    storage: Storage
    shard: int
    table: bytes
    good: Collection[str]
    failed: Collection[str]


@dataclass(frozen=True)
class Form(ABC):
    """A layout and an image format. `outcomes` are those of one shard's rows, in the manifest's order.

    Attributes:
        at_once: whether a picture is written as soon as it is drawn, not with its shard's commit.
    """

    image_format: ImageFormat = PNG
    layout: ClassVar[Layout]
    at_once: ClassVar[bool] = False

    @abstractmethod
    def file_name(self, shard: int, row_id: str) -> str | None:
        """Where the metadata says that a picture is: its object; in a tar, with `#` and the member; None in
        the metadata table itself."""

    def cells(self, outcome: Outcome) -> dict[str, Any]:
        """What a row of the metadata table has in this layout alone."""
        return {}

    def settle_picture(self, storage: Storage, outcome: Outcome, create: bool) -> Outcome:
        """See `settle.settle_picture`, in the layout whose pictures have names of their own."""
        return outcome

    def settle_shard(
        self, storage: Storage, shard: int, outcomes: Sequence[Outcome], metadata: pa.Table
    ) -> Sequence[Outcome] | None:
        """Make the pictures of a shard ready for its commit. Returns the outcomes of those that are
        there; None where the shard was committed meanwhile."""
        return outcomes

    def objects(
        self, shard: int, outcomes: Sequence[Outcome], metadata: pa.Table
    ) -> dict[str, bytes]:
        """What is rewritten of a shard beside its tables."""
        return {}

    def shared_object(self, shard: int) -> str | None:
        """The object beside the tables that has all the pictures of a shard."""
        return None

    @abstractmethod
    def pictures(self, stored: Stored) -> Iterator[tuple[str, bytes] | Problem]:
        """What a committed shard has: ids with their pictures, and what is wrong with the rest.

        Raises:
            tarfile.TarError, EOFError, pa.ArrowException: the pictures cannot be read.
        """

    def strangers(self, storage: Storage, shards: int) -> Iterator[Problem]:
        """What lies among the objects that have the pictures, and is none of them."""
        ours = {self.shared_object(shard) for shard in range(shards)}
        others = [name for name in storage.list(names.IMAGES) if name not in ours]
        if others:
            yield not_ours(others)

    def _is_picture(self, data: bytes, size: tuple[int, int] | None = None) -> bool:
        return is_picture(data, self.image_format, size)


class Files(Form):
    """A file for each picture: `images/00012/<id>.png`."""

    layout = "files"
    at_once = True

    def file_name(self, shard: int, row_id: str) -> str:
        return names.image_name(shard, row_id, self.image_format.suffix)

    def settle_picture(self, storage: Storage, outcome: Outcome, create: bool) -> Outcome:
        if outcome.image is None:
            return outcome
        return settle_picture(storage, outcome, self.image_format, create)

    def settle_shard(
        self, storage: Storage, shard: int, outcomes: Sequence[Outcome], metadata: pa.Table
    ) -> Sequence[Outcome]:
        """Remove pictures that an earlier, unfinished attempt left for rows that failed this time."""
        rows = [outcome.metadata for outcome in outcomes]
        left = {self.file_name(shard, row["id"]) for row in rows if may_have_left_a_picture(row)}
        left -= {row.get("file_name") for row in rows}  # rows may share an id
        for name in left.intersection(storage.list(names.images_of(shard)) if left else ()):
            ours = self._is_picture(storage.read_bytes(name))
            if ours and not storage.exists(names.metadata_name(shard)):
                storage.delete(name)
        return outcomes

    def objects(
        self, shard: int, outcomes: Sequence[Outcome], metadata: pa.Table
    ) -> dict[str, bytes]:
        return {o.metadata["file_name"]: o.image for o in outcomes if o.image is not None}

    def pictures(self, stored: Stored) -> Iterator[tuple[str, bytes] | Problem]:
        storage, shard = stored.storage, stored.shard
        there = set(storage.list(names.images_of(shard)))
        for row_id in stored.good:
            name = self.file_name(shard, row_id)
            if name in there:
                there.remove(name)
                yield row_id, storage.read_bytes(name)
        left = there.intersection(self.file_name(shard, row_id) for row_id in stored.failed)
        ours = sorted(name for name in left if self._is_picture(storage.read_bytes(name)))
        if ours:
            more = f" and {len(ours) - 1} more" if len(ours) > 1 else ""
            text = f"{ours[0]}{more} belong to rows that failed."
            yield Problem("stray", text, shard, names=tuple(ours))
        if others := sorted(there.difference(ours)):
            yield not_ours(others, shard)

    def strangers(self, storage: Storage, shards: int) -> Iterator[Problem]:
        """Only the folders of committed shards are looked through, by `pictures`."""
        yield from ()


class Tars(Form):
    """A tar for each shard, `images/00012.tar`, with `<id>.png` and `<id>.json`."""

    layout = "webdataset"

    def file_name(self, shard: int, row_id: str) -> str:
        return f"{names.tar_name(shard)}#{self._member(row_id)}"  # no id has that

    def settle_shard(
        self, storage: Storage, shard: int, outcomes: Sequence[Outcome], metadata: pa.Table
    ) -> Sequence[Outcome] | None:
        tar = self._tar(outcomes, metadata)
        there = settle(
            storage,
            names.tar_name(shard),
            tar,
            lambda stored: self._from_tar(stored, outcomes) is not None,
            names.metadata_name(shard),
        )
        if there == tar:
            return outcomes
        return None if there is None else self._from_tar(there, outcomes)

    def objects(
        self, shard: int, outcomes: Sequence[Outcome], metadata: pa.Table
    ) -> dict[str, bytes]:
        return {names.tar_name(shard): self._tar(outcomes, metadata)}

    def shared_object(self, shard: int) -> str:
        return names.tar_name(shard)

    def pictures(self, stored: Stored) -> Iterator[tuple[str, bytes] | Problem]:
        broken = partial(Problem, "broken", shard=stored.shard)
        tar = names.tar_name(stored.shard)
        data = read_if_there(stored.storage, tar)
        if data is None:
            raise tarfile.ReadError(f"{tar} is missing")
        images = {self._member(row_id): row_id for row_id in stored.good}
        texts = {names.member_name(row_id, ".json"): row_id for row_id in stored.good}
        for name, content in tar_members(data):
            if name in images:
                yield images[name], content
            elif name not in texts:
                yield broken(f"{tar} has {name}, which no row names.")
            elif not _is_json_of(row_id := texts.pop(name), content):
                yield broken(f"{name} is not what was said of it.", row=row_id)
        for name, row_id in texts.items():
            yield broken(f"{name} is missing in {tar}.", row=row_id)

    def _member(self, row_id: str) -> str:
        return names.member_name(row_id, self.image_format.suffix)

    def _tar(self, outcomes: Sequence[Outcome], metadata: pa.Table) -> bytes:
        described = metadata.drop_columns(_OF_THE_TABLE_ONLY)
        return tar_of(described, [o.image for o in outcomes], self.image_format.suffix)

    def _from_tar(self, tar: bytes, outcomes: Sequence[Outcome]) -> list[Outcome] | None:
        """The outcomes with the pictures that a tar has, and what it says of them; None where it does
        not have just these."""
        taken = []
        try:
            members = dict(tar_members(tar))
            for outcome in outcomes:
                if outcome.failed:
                    taken.append(outcome)
                    continue
                row_id = outcome.metadata["id"]
                image = members.pop(self._member(row_id))
                said = json.loads(members.pop(names.member_name(row_id, ".json")))
                if not self._is_picture(image, outcome.size):
                    return None
                taken.append(outcome.with_image(image, **{name: said[name] for name in _MEASURED}))
        except (tarfile.TarError, EOFError, ValueError, KeyError):
            return None
        return None if members else taken


class Tables(Form):
    """The pictures of a shard are a column of its metadata table."""

    layout = "parquet"

    def file_name(self, shard: int, row_id: str) -> None:
        return None

    def cells(self, outcome: Outcome) -> dict[str, Any]:
        if outcome.image is None:
            return {}
        path = f"{outcome.metadata['id']}{self.image_format.suffix}"
        return {names.IMAGE_COLUMN.name: {"bytes": outcome.image, "path": path}}

    def pictures(self, stored: Stored) -> Iterator[tuple[str, bytes] | Problem]:
        return table_pictures(stored.table)


FORMS: Mapping[str, type[Form]] = {form.layout: form for form in (Files, Tars, Tables)}
"""By layout."""


def form_of(run: Mapping[str, Any]) -> Form:
    """The form that a run's record names."""
    return FORMS[run["layout"]](ImageFormat(**run["image_format"]))


def picture_place(
    row: Mapping[str, Any],
) -> tuple[str, str, Callable[[bytes], Iterator[tuple[str, bytes]]] | None]:
    """Where the picture of a metadata row is, by its `file_name`: the object, and where that has several,
    its key there and what reads them."""
    name = row["file_name"]
    if name is None:
        return names.metadata_name(row["shard"]), row["id"], table_pictures
    place, hash_sign, member = name.partition("#")
    return place, member, tar_members if hash_sign else None


def table_pictures(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The ids and pictures of a metadata table that holds them, in order; rows without are
    left out."""
    file = pq.ParquetFile(pa.BufferReader(data))
    for batch in file.iter_batches(_PICTURES_AT_ONCE, columns=["id", names.IMAGE_COLUMN.name]):
        for row in batch.to_pylist():
            if row.get("image") is not None:
                yield row["id"], row["image"]["bytes"]


def read_if_there(storage: Storage, name: str) -> bytes | None:
    """An object; None where there is none. One that is there and cannot be read need not be broken,
    so that error is the caller's."""
    try:
        return storage.read_bytes(name)
    except OutputError:
        if storage.exists(name):
            raise
        return None


def _is_json_of(row_id: str, content: bytes) -> bool:
    try:
        return json.loads(content)["id"] == row_id
    except (ValueError, KeyError, TypeError):
        return False
