"""What a person decides about a job, and which of it the pictures depend on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from aae_batch.dataset.image_format import ImageFormat, ImageKind
from aae_batch.dataset.layout import Layout
from aae_batch.errors import ModelError, OutputError
from aae_batch.job.settings import ActorSettings
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.model.loading import MODEL_FILES, source_of
from aae_batch.store.base import is_url
from aae_batch.store.fetch import folder_digest

SHARD_SIZE = 256
AUTO = "auto"
_END = 1 << 20
_OF_SETTINGS = ("guidance", "image_format")


def _failures(value: Any) -> Any:
    """A count as int, a share as float below 1."""
    if isinstance(value, str):
        value = float(value[:-1]) / 100 if value.endswith("%") else int(value)
    if isinstance(value, (int, float)) and (value < 0 or (isinstance(value, float) and value > 1)):
        raise ValueError("give a number of rows, or a share such as 5%")
    return value


class JobSettings(ActorSettings):
    """One job: a manifest, an output, and how to get from one to the other.

    Raises:
        SettingsError: a value is unknown or out of range.
    """

    manifest: Annotated[str, BeforeValidator(os.fspath)] = Field(
        description="Parquet, CSV or JSONL, path or URL; one row per picture."
    )
    output: str = Field(description="The output root: a folder or a URL.")
    model: str = Field("shapes", description="Hub id, folder, URL of one, or 'shapes'.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    guidance: GuidanceConfig = Field(description="How to sample.")
    slots: int = Field(8, ge=1, description="Pictures in flight in each actor.")
    shard_size: int | None = Field(
        None,
        ge=1,
        description=f"Rows per shard. Default: {SHARD_SIZE}, or as the output was begun.",
    )
    layout: Layout | None = Field(
        None, description="How pictures are stored. Default: files, or as the output was begun."
    )
    image_format: ImageKind | None = Field(
        None, description="Default: png, or as the output was begun."
    )
    image_quality: int | None = Field(None, description="Of JPEG, and of lossy WebP.")
    png_level: int | None = Field(None, description="Of PNG's compression.")
    webp_lossless: bool | None = Field(None, description="WebP that keeps every pixel.")
    max_failures: Annotated[int | float | None, BeforeValidator(_failures)] = Field(
        None, description="Stop when more rows have failed: a number, or a share, '5%'."
    )
    retry_failed: bool = Field(False, description="Generate again the rows that have failed.")
    other_versions: bool = Field(
        False, description="Go on with a run that other versions of torch and others have begun."
    )

    def pixels(self, manifest_digest: str) -> dict[str, Any]:
        """Everything that the pictures depend on, as JSON holds it."""
        return {
            "model": self.model,
            "revision": self.revision,
            "weights": weights_digest(self.model, self.s3_endpoint),
            "device": self.device.partition(":")[0],
            "dtype": self.dtype,
            "guidance": json.loads(self.guidance.model_dump_json()),
            "manifest": manifest_digest,
        }

    def form(self, begun: dict[str, Any]) -> dict[str, Any]:
        """How the rows are stored, as `run.json` says it: what is asked for, else as `begun` has it,
        else the defaults.

        Raises:
            SettingsError: the image format does not have a setting that is given.
        """
        return {
            "shard_size": self.shard_size or begun.get("shard_size", SHARD_SIZE),
            "layout": self.layout or begun.get("layout", "files"),
            "image_format": self._image_format(begun.get("image_format", {})).settings(),
        }

    def _image_format(self, begun: dict[str, Any]) -> ImageFormat:
        kind = self.image_format or begun.get("kind", "png")
        lossless = begun.get("lossless") if self.webp_lossless is None else self.webp_lossless
        given = {
            "kind": kind,
            "level": self.png_level,
            "quality": self.image_quality,
            "lossless": self.webp_lossless,
        }
        if (kind, lossless) == (begun.get("kind"), begun.get("lossless")):
            given |= {name: value for name, value in begun.items() if given[name] is None}
        return ImageFormat(**given)


def weights_digest(
    model: str, s3_endpoint: str | None = None, endings: tuple[str, ...] = MODEL_FILES
) -> str | None:
    """SHA-256 over the files of a model on this machine, or over the listing of one in an object
    store; None for one on the hub.

    Of a large file only the two ends are read: other weights differ there as everywhere.

    Args:
        endings: of the names of files that count.

    Raises:
        ModelError: the object store has no such model, or cannot be read.
    """
    if is_url(model):
        try:
            return folder_digest(model, lambda name: name.endswith(endings), s3_endpoint)
        except OutputError as error:
            raise ModelError(str(error)) from None
    folder = Path(source_of(model))
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix not in endings:
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_END))
            file.seek(max(0, size - _END))
            digest.update(file.read(_END))
    return digest.hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`name: old -> new` for every value that is not the same in both."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict) and name in _OF_SETTINGS:
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {_short(before)} -> {_short(after)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return f"{text[:13]}...{text[-1]}" if isinstance(value, str) and len(value) == 64 else text
