from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from aae_batch.dataset.image_format import ImageFormat
from aae_batch.errors import SettingsError

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("settings", "name", "suffix", "exact"),
    [
        ({}, "PNG", ".png", True),
        ({"kind": "png", "level": 9}, "PNG", ".png", True),
        ({"kind": "webp"}, "WEBP", ".webp", False),
        ({"kind": "webp", "lossless": True}, "WEBP", ".webp", True),
        ({"kind": "jpeg", "quality": 80}, "JPEG", ".jpg", False),
    ],
)
def test_the_same_pixels_are_the_same_bytes_of_the_format(settings, name, suffix, exact):
    form = ImageFormat(**settings)
    data = form.encode(Image.fromarray(PIXELS))
    assert form.suffix == suffix
    assert form.encode(Image.fromarray(PIXELS.copy())) == data
    image = Image.open(io.BytesIO(data))
    assert image.format == name
    assert np.array_equal(np.asarray(image), PIXELS) == exact


def test_quality_is_a_matter_of_bytes():
    image = Image.fromarray(PIXELS)
    for kind in ("webp", "jpeg"):
        sizes = [len(ImageFormat(kind=kind, quality=q).encode(image)) for q in (10, 50, 95)]
        assert sizes == sorted(set(sizes)), kind


def test_what_applies_is_what_is_recorded():
    assert ImageFormat().settings() == {"kind": "png", "level": 1}
    webp = ImageFormat(kind="webp", lossless=True)
    assert webp.settings() == {"kind": "webp", "lossless": True}
    assert ImageFormat(**webp.settings()) == webp


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "gif"}, "kind: Input should be 'png', 'webp' or 'jpeg'"),
        ({"kind": "jpeg", "quality": 101}, "quality: .*less than or equal to 100"),
        ({"quality": 90}, "png has no quality: leave it out, or choose webp or jpeg"),
        ({"kind": "jpeg", "level": 1}, "jpeg has no level: .* choose png"),
        ({"kind": "webp", "lossless": True, "quality": 9}, "webp, lossless has no quality"),
    ],
)
def test_a_setting_that_does_not_apply_is_refused(settings, said):
    with pytest.raises(SettingsError, match=said):
        ImageFormat(**settings)
