"""Image encoding, deterministic: the same pixels give the same bytes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from aae_batch.errors import SettingsError
from aae_batch.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

ImageKind = Literal["png", "webp", "jpeg"]
Layout = Literal["files", "webdataset", "parquet"]
"""How images are stored: one file each, one tar per shard, or a column of the metadata table."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    # Level 6 takes five times as long and saves only a few per cent.
    "png": {"level": 1},
    "webp": {"quality": 90, "lossless": False},
    "webp, lossless": {"lossless": True},
    "jpeg": {"quality": 95},
}
_SUFFIXES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}


class ImageFormat(Settings):
    """A file format and its settings. Settings of other formats are None.

    Raises:
        SettingsError: a value is unknown or out of range, or the format does not have the setting.
    """

    what: ClassVar[str] = "image format"

    kind: ImageKind = Field("png", description="The file format.")
    level: int | None = Field(None, ge=0, le=9, description="PNG compression level.")
    quality: int | None = Field(None, ge=1, le=100, description="Quality of JPEG and lossy WebP.")
    lossless: bool | None = Field(None, description="Whether WebP is lossless.")

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in values.items() if value is not None}
        return {**_DEFAULTS.get(_variant(given), {}), **given}

    @model_validator(mode="after")
    def _only_its_own(self) -> ImageFormat:
        variant = _variant(self.settings())
        own = _DEFAULTS[variant]
        for name in self.settings():
            if name != "kind" and name not in own:
                having = [other for other in _DEFAULTS if name in _DEFAULTS[other]]
                raise SettingsError(
                    f"The image format {variant} has no {name}: leave it out, or choose "
                    f"{' or '.join(having)}."
                )
        return self

    @property
    def suffix(self) -> str:
        return _SUFFIXES[self.kind]

    @property
    def is_lossless(self) -> bool:
        """Whether a stored image has the very pixels that were encoded."""
        return self.kind == "png" or self.lossless is True

    def settings(self) -> dict[str, Any]:
        """Return the settings of this format, as in `run.json`: `ImageFormat(**settings)` restores it."""
        return self.model_dump(exclude_none=True)

    def encode(self, image: Image) -> bytes:
        buffer = io.BytesIO()
        options = self.model_dump(exclude={"kind", "level"}, exclude_none=True)
        image.save(
            buffer, self.kind, compress_level=self.level, **options
        )  # only PNG uses the level
        return buffer.getvalue()


def _variant(settings: dict[str, Any]) -> str:
    kind = settings.get("kind", "png")
    return "webp, lossless" if kind == "webp" and settings.get("lossless") else kind


PNG = ImageFormat()
