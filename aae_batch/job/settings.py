"""What a person decides about a job, and which of it the pictures depend on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aae_batch.config import GuidanceConfig
from aae_batch.errors import SettingsError

SHARD_SIZE = 256


class JobSettings(BaseModel):
    """One job: a manifest, an output, and how to get from one to the other.

    Raises:
        SettingsError: a value is unknown or out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest: Path = Field(description="Parquet, CSV or JSONL; one row per picture.")
    output: str = Field(description="The output root.")
    model: str = Field("shapes", description="Hub id, folder, or 'shapes'.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    guidance: GuidanceConfig = Field(description="How to sample.")
    device: str = Field("auto", description="Torch device of each actor.")
    dtype: str = Field("auto", description="Precision of the weights.")
    slots: int = Field(8, ge=1, description="Pictures in flight in each actor.")
    actors: int | None = Field(None, ge=1, description="Default: one per GPU, else one.")
    shard_size: int | None = Field(
        None,
        ge=1,
        description=f"Rows per shard. Default: {SHARD_SIZE}, or as the output was begun.",
    )
    max_deaths: int = Field(20, ge=1, description="Stop after so many deaths with no row between.")
    ray_address: str | None = Field(None, description="A running cluster; default: this machine.")

    def __init__(self, **values) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = (
                f"{'.'.join(map(str, problem['loc']))}: {problem['msg']} (got {problem['input']!r})"
                for problem in error.errors()
            )
            raise SettingsError(f"Invalid setting: {'; '.join(problems)}.") from None

    def pixels(self, manifest_digest: str) -> dict[str, Any]:
        """Everything that the pictures depend on, as JSON holds it."""
        model = Path(self.model)
        return {
            "model": str(model.resolve()) if model.is_dir() else self.model,
            "revision": self.revision,
            "device": self.device,
            "dtype": self.dtype,
            "guidance": json.loads(self.guidance.model_dump_json()),
            "manifest": manifest_digest,
        }


def fingerprint(pixels: dict[str, Any]) -> str:
    """SHA-256 of everything that the pictures depend on."""
    return hashlib.sha256(json.dumps(pixels, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`name: old -> new` for every value that is not the same in both."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict) and name == "guidance":
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {_short(before)} -> {_short(after)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return f"{text[:13]}...{text[-1]}" if isinstance(value, str) and len(value) == 64 else text
