"""The JSON records of a run: `run.json`, which identifies an output as ours and which a later run is
compared with, and the job's reports `progress.json` and `summary.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
)

from aae_batch.columns import FORWARDS_COLUMN
from aae_batch.dataset.image_format import ImageFormat
from aae_batch.dataset.layout import PROGRESS, SUMMARY, Layout
from aae_batch.errors import SettingsError

SEAL = "seal"
"""Key for the SHA-256 of the rest of the record, which detects edits by hand."""


class _Record(BaseModel):
    """The fields of `run.json` that readers rely on. `job/records.py` writes more."""

    model_config = ConfigDict(strict=True)

    fingerprint: str
    settings: dict[str, Any]
    rows: int = Field(ge=1)
    shard_size: int = Field(ge=1)
    layout: Layout
    image_format: dict[str, Any]
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class Shards:
    """The division of a run's rows into shards: `shards[i]` is the range of manifest rows of shard `i`."""

    rows: int
    size: int

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> Shards:
        return cls(run["rows"], run["shard_size"])

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def __getitem__(self, shard: int) -> range:
        return range(shard * self.size, min((shard + 1) * self.size, self.rows))


def tries_again(run: Mapping[str, Any]) -> bool:
    """Return whether rows of the run are tried several times, and it has tables of tries."""
    return run["settings"].get("acceptance") is not None


def counts_forwards(run: Mapping[str, Any]) -> bool:
    """Return whether the metadata of the run has the column `forwards`. A run that an earlier version began
    goes on without it, so that all its tables have the same columns."""
    return run.get("counts_forwards", False)


def names_of_its_manifest(run: Mapping[str, Any] | None) -> frozenset[str]:
    """Return the reserved names that columns of the run's manifest may have, since the run adds no such
    column."""
    return frozenset() if run is None or counts_forwards(run) else frozenset({FORWARDS_COLUMN.name})


def own_columns(run: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return `names` without those that columns of the run's manifest may have."""
    return [name for name in names if name not in names_of_its_manifest(run)]


MANIFEST_RULES = 2
"""The rules by which a manifest is read. A change by which the same file has other rows or columns adds one.
Runs of versions before 2 do not say theirs."""


def reads_manifest_alike(run: Mapping[str, Any]) -> bool:
    """Return whether this version is known to read the run's manifest as the one that began the run."""
    return run.get("manifest_rules") == MANIFEST_RULES


def keeps_maps(run: Mapping[str, Any]) -> bool:
    """Return whether the run keeps attention maps of other steps than the last."""
    return run["settings"].get("guidance", {}).get("attention_maps", "last") != "last"


class _Courtesy(BaseModel):
    """A record that no row depends on."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class _Progress(_Courtesy):
    time: AwareDatetime
    rows: int
    done: int
    failures: dict[str, int]
    images_per_second: float
    mean_refinements: float
    eta_seconds: Annotated[float, Field(ge=0, le=1e9)] | None

    @field_serializer("time")
    def _iso(self, time: datetime) -> str:
        return time.isoformat()


class _Session(_Courtesy):
    images_per_second: float


class _Summary(_Courtesy):
    rows: int
    images: int
    failed: int
    failures: dict[str, int]
    examples: dict[str, str] = {}
    last_session: _Session | None = None


_COURTESIES: Mapping[str, type[_Courtesy]] = {PROGRESS: _Progress, SUMMARY: _Summary}


def courtesy(name: str, data: bytes) -> dict[str, Any] | None:
    """Return the content of `progress.json` or `summary.json`; None if it is damaged."""
    try:
        return _COURTESIES[name].model_validate_json(data).model_dump()
    except ValidationError:
        return None


class NotARun(Exception):
    """The record was not written by a run, or was edited. The message is the end of a sentence."""


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of settings: everything that the images depend on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    bare = {name: value for name, value in record.items() if name != SEAL}
    return bare | {SEAL: fingerprint(bare)}


def check_record(record: Any) -> dict[str, Any]:
    """Return the record if a run wrote it and nobody edited it.

    Raises:
        NotARun: another program wrote it, or it was edited.
    """
    try:
        known = _Record.model_validate(record)
        known.settings["manifest"]
        ImageFormat(**known.image_format)
    except (ValidationError, KeyError, TypeError, SettingsError):
        raise NotARun("no run of aae-batch wrote it") from None
    edited = SEAL in record and record != sealed(record)  # the first versions wrote no seal
    if edited or known.fingerprint != fingerprint(known.settings):
        raise NotARun("it was changed after it was written")
    return record
