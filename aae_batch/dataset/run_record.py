"""The JSON that a run leaves: `run.json`, by which an output is known for one of ours and which a later
run is held against, and what it says of itself in `progress.json` and `summary.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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

from aae_batch.dataset.image_format import ImageFormat
from aae_batch.dataset.layout import PROGRESS, SUMMARY, Layout
from aae_batch.errors import SettingsError

SEAL = "seal"
"""SHA-256 of everything else in the record: it shows what was edited by hand."""


class _Record(BaseModel):
    """What readers rely on. There is more in it, which `job/records.py` writes."""

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
    """How a run's rows are cut: `shards[i]` are the places in the manifest of the rows of shard `i`."""

    rows: int
    size: int

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> Shards:
        return cls(run["rows"], run["shard_size"])

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def __getitem__(self, shard: int) -> range:
        return range(shard * self.size, min((shard + 1) * self.size, self.rows))


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
    last_session: _Session | None = None


_COURTESIES: Mapping[str, type[_Courtesy]] = {PROGRESS: _Progress, SUMMARY: _Summary}


def courtesy(name: str, data: bytes) -> dict[str, Any] | None:
    """What such a record says; None where it is damaged."""
    try:
        return _COURTESIES[name].model_validate_json(data).model_dump()
    except ValidationError:
        return None


class NotARun(Exception):
    """A record is none of ours; the message is the end of a sentence."""


def fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 of everything that the pictures depend on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its seal."""
    bare = {name: value for name, value in record.items() if name != SEAL}
    return bare | {SEAL: fingerprint(bare)}


def check_record(record: Any) -> dict[str, Any]:
    """A record as it was written.

    Raises:
        NotARun: it is of another program, or was edited.
    """
    try:
        known = _Record.model_validate(record)
        known.settings["manifest"]
        ImageFormat(**known.image_format)
    except (ValidationError, KeyError, TypeError, SettingsError):
        raise NotARun("no run of aae-batch wrote it") from None
    edited = SEAL in record and record != sealed(record)  # the first versions wrote none
    if edited or known.fingerprint != fingerprint(known.settings):
        raise NotARun("it was changed after it was written")
    return record
