"""Sample images for the dataset card."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from aae_batch.dataset.image_format import PNG
from aae_batch.report.contact_sheet import Group, Picture, contact_sheet

SAMPLES_SHOWN = 12
_COLUMNS = 4
_LETTERS = 26
"""Characters of a prompt that fit above its image."""


def samples_page(samples: Sequence[tuple[Mapping[str, Any], bytes]]) -> bytes:
    """Return a PNG of images under their prompts.

    Args:
        samples: rows with their encoded images.
    """
    groups = [
        Group(_short(row["prompt"]), (Picture(f"{row['method']}, seed {row['seed']}", _rgb(data)),))
        for row, data in samples
    ]
    title = f"{len(groups)} images, evenly spaced over the dataset"
    return PNG.encode(contact_sheet(title, groups, columns=min(_COLUMNS, len(groups))))


def _short(prompt: str) -> str:
    prompt = " ".join(prompt.split())
    return prompt if len(prompt) <= _LETTERS else f"{prompt[: _LETTERS - 3]}..."


def _rgb(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")
