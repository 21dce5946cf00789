"""The JSON that a run leaves: `run.json`, by which an output is known for one of ours and which a later
run is held against, and what it says of itself in `progress.json` and `summary.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

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


class _Progress(BaseModel):
    time: AwareDatetime
    rows: int
    done: int
    failures: dict[str, int]
    images_per_second: float
    mean_refinements: float
    eta_seconds: float | None


class _Summary(BaseModel):
    rows: int
    images: int
    failed: int
    failures: dict[str, int]


COURTESIES: Mapping[str, type[BaseModel]] = {PROGRESS: _Progress, SUMMARY: _Summary}
"""Records that no row depends on."""


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
    edited = SEAL in record and record != sealed(record)  # versions before 0.2 wrote none
    if edited or known.fingerprint != fingerprint(known.settings):
        raise NotARun("it was changed after it was written")
    return record
