"""The layouts: where a shard's images are stored, and how they are written and checked."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from aae_batch.columns import TRIES_NAMES
from aae_batch.dataset import layout as names
from aae_batch.dataset.image_format import ImageFormat
from aae_batch.dataset.outcome import Outcome, may_have_left_a_picture
from aae_batch.dataset.problem import Problem, not_ours
from aae_batch.dataset.reader import parquet_images
from aae_batch.dataset.run_record import counts_forwards, keeps_maps, tries_again
from aae_batch.dataset.settle import alike, is_picture, settle
from aae_batch.dataset.webdataset import tar_members, tar_of
from aae_batch.dataset.writer import Shard
from aae_batch.store.base import Storage

_MEASURED = ("num_refinements", "final_loss", "neglected")
"""Columns that rounding may change between attempts."""

_OF_THE_TABLE_ONLY = [
    column.name for column in names.OUTCOME_COLUMNS if column.name not in ("sha256", *_MEASURED)
]
"""Columns left out of an image's JSON in a tar. Of these only `seconds` differs between runs; without it
the same shard gives the same tar."""


class Files(Shard):
    """One file per image: `images/00012/<id>.png`."""

    layout = "files"
    at_once = True

    def file_name(self, row_id: str) -> str:
        return names.image_name(self.index, row_id, self.image_format.suffix)

    def pictures(
        self, table: bytes, good: Collection[str], failed: Collection[str]
    ) -> Iterator[tuple[str, bytes] | Problem]:
        there = set(self.storage.list(names.images_of(self.index)))
        for row_id in good:
            name = self.file_name(row_id)
            if name in there:
                there.remove(name)
                yield row_id, self.storage.read_bytes(name)
        ours = sorted(filter(self._has_picture, there.intersection(map(self.file_name, failed))))
        if ours:
            more = f" and {len(ours) - 1} more" if len(ours) > 1 else ""
            text = f"{ours[0]}{more} belong to rows that failed."
            yield Problem("stray", text, self.index, names=tuple(ours))
        if others := sorted(there.difference(ours)):
            yield not_ours(others, self.index)

    def _settle_picture(self, outcome: Outcome, create: bool) -> Outcome:
        if outcome.image is None:
            return outcome
        name = outcome.metadata["file_name"]
        store = self.storage
        if store.create_bytes(name, outcome.image) if create else not store.exists(name):
            return outcome
        stored = store.read_bytes(name)
        if stored == outcome.image or self._is_of(stored, outcome):
            return outcome.with_image(stored)
        if outcome.tries and is_picture(stored, self.image_format, outcome.size):
            return self._replaced(outcome) if create else outcome
        return outcome.occupied(store.place(name))

    def _is_of(self, stored: bytes, outcome: Outcome) -> bool:
        """Return whether stored bytes are this outcome's picture, as another attempt made it. With several
        tries it must look the same, since that attempt may have kept another one."""
        assert outcome.image is not None
        is_ours = is_picture(stored, self.image_format, outcome.size)
        return is_ours and (not outcome.tries or alike(stored, outcome.image))

    def _replaced(self, outcome: Outcome) -> Outcome:
        """Replace another try's picture."""
        assert outcome.image is not None
        name, commit = outcome.metadata["file_name"], names.metadata_name(self.index)
        is_ours = partial(self._is_of, outcome=outcome)
        stored = settle(self.storage, name, outcome.image, is_ours, commit)
        return outcome if stored is None else outcome.with_image(stored)

    def _settle(self, outcomes: list[Outcome], metadata: pa.Table) -> list[Outcome]:
        """Delete images that an earlier, unfinished attempt left for rows that failed this time."""
        rows = [outcome.metadata for outcome in outcomes]
        left = {self.file_name(row["id"]) for row in rows if may_have_left_a_picture(row)}
        left -= {row.get("file_name") for row in rows}  # rows may share an id
        there = self.storage.list(names.images_of(self.index)) if left else []
        for name in filter(self._has_picture, left.intersection(there)):
            if not self.storage.exists(names.metadata_name(self.index)):
                self.storage.delete(name)
        return outcomes

    def _objects(self, outcomes: list[Outcome], metadata: pa.Table) -> dict[str, bytes]:
        return {o.metadata["file_name"]: o.image for o in outcomes if o.image is not None}

    def _has_picture(self, name: str) -> bool:
        return is_picture(self.storage.read_bytes(name), self.image_format)


class Tar(Shard):
    """One tar per shard, `images/00012.tar`, with members `<id>.png` and `<id>.json`."""

    layout = "webdataset"

    def file_name(self, row_id: str) -> str:
        return f"{self._name}#{self._member(row_id)}"  # no id has a #

    def pictures(
        self, table: bytes, good: Collection[str], failed: Collection[str]
    ) -> Iterator[tuple[str, bytes] | Problem]:
        broken = partial(Problem, "broken", shard=self.index)
        tar = self.read(self._name)
        if tar is None:
            raise tarfile.ReadError(f"{self._name} is missing")
        images = {self._member(row_id): row_id for row_id in good}
        texts = {names.member_name(row_id, ".json"): row_id for row_id in good}
        for name, content in tar_members(tar):
            if name in images:
                yield images[name], content
            elif name not in texts:
                yield broken(f"{self._name} has {name}, which no row names.")
            elif not _is_json_of(row_id := texts.pop(name), content):
                yield broken(f"{name} is not the JSON of its row.", row=row_id)
        for name, row_id in texts.items():
            yield broken(f"{name} is missing in {self._name}.", row=row_id)

    def _settle(self, outcomes: list[Outcome], metadata: pa.Table) -> list[Outcome] | None:
        def fits(stored: bytes) -> bool:
            return self._from_tar(stored, outcomes) is not None

        tar = self._tar(outcomes, metadata)
        there = settle(self.storage, self._name, tar, fits, names.metadata_name(self.index))
        if there == tar:
            return outcomes
        return None if there is None else self._from_tar(there, outcomes)

    def _objects(self, outcomes: list[Outcome], metadata: pa.Table) -> dict[str, bytes]:
        return {self._name: self._tar(outcomes, metadata)}

    @staticmethod
    def pictures_of(index: int) -> str:
        return names.tar_name(index)

    @property
    def _name(self) -> str:
        return self.pictures_of(self.index)

    def _member(self, row_id: str) -> str:
        return names.member_name(row_id, self.image_format.suffix)

    def _tar(self, outcomes: list[Outcome], metadata: pa.Table) -> bytes:
        left_out = {*_OF_THE_TABLE_ONLY}
        if not self.with_forwards:  # the manifest may have a column of this name
            left_out.discard(names.FORWARDS_COLUMN.name)
        names_here = [name for name in metadata.column_names if name not in left_out]
        described = metadata.select(names_here)
        return tar_of(described, [o.image for o in outcomes], self.image_format.suffix)

    def _from_tar(self, tar: bytes, outcomes: list[Outcome]) -> list[Outcome] | None:
        """Return the outcomes with the images and measured values of a tar; None if the tar does not
        hold exactly these rows."""
        taken = []
        try:
            members = dict(tar_members(tar))
            for outcome in outcomes:
                if not outcome.failed:
                    row_id = outcome.metadata["id"]
                    image = members.pop(self._member(row_id))
                    said = json.loads(members.pop(names.member_name(row_id, ".json")))
                    if not is_picture(image, self.image_format, outcome.size):
                        return None
                    # Another attempt may have kept another try.
                    if any(said.get(n) != outcome.metadata.get(n) for n in TRIES_NAMES):
                        return None
                    measured = {name: said[name] for name in _MEASURED}
                    outcome = outcome.with_image(image, **measured)
                taken.append(outcome)
        except (tarfile.TarError, EOFError, ValueError, KeyError):
            return None
        return None if members else taken


class Table(Shard):
    """Images as a column of the metadata table."""

    layout = "parquet"

    def file_name(self, row_id: str) -> None:
        return None

    def pictures(
        self, table: bytes, good: Collection[str], failed: Collection[str]
    ) -> Iterator[tuple[str, bytes] | Problem]:
        return parquet_images(table)

    def _cells(self, outcome: Outcome) -> dict[str, Any]:
        if outcome.image is None:
            return {}
        path = f"{outcome.metadata['id']}{self.image_format.suffix}"
        return {names.IMAGE_COLUMN.name: {"bytes": outcome.image, "path": path}}


LAYOUTS: Mapping[str, type[Shard]] = {kind.layout: kind for kind in (Files, Tar, Table)}


def shard_of(run: Mapping[str, Any], storage: Storage, index: int) -> Shard:
    """Return a shard of the run that the record `run` (`run.json`) describes."""
    image_format = ImageFormat(**run["image_format"])
    return LAYOUTS[run["layout"]](
        storage,
        index,
        run["fingerprint"],
        image_format,
        tries_again(run),
        counts_forwards(run),
        keeps_maps(run),
    )


def _is_json_of(row_id: str, content: bytes) -> bool:
    try:
        return json.loads(content)["id"] == row_id
    except (ValueError, KeyError, TypeError):
        return False
