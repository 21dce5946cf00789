"""Overlay an attention map on its image, in a perceptually uniform colour map."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

OPACITY = 0.6
"""Opacity of the map over the image. The image is grey below it, so that all colour is the map's."""

_LIGHTNESS = (0.20, 0.95)
_HUES = (285.0, 465.0)
_CHROMA = 0.15
"""The colour map runs from dark violet over red and orange to light yellow, in OKLab: lightness in [0, 1],
hue in degrees."""


def heatmap(image: Image.Image, attention: np.ndarray, most: float | None = None) -> Image.Image:
    """Return an RGB image of the size of `image`, with the map laid over it.

    Args:
        attention: [height, width] of any size, non-negative.
        most: the value of the lightest colour. Default: the largest of `attention`.
    """
    attention = attention.astype(np.float32)
    shares = Image.fromarray(attention / ((attention.max() if most is None else most) or 1))
    smooth = np.asarray(shares.resize(image.size, Image.Resampling.BICUBIC))
    colours = colour_map()[np.rint(smooth.clip(0, 1) * 255).astype(np.uint8)]
    return Image.blend(image.convert("L").convert("RGB"), Image.fromarray(colours), OPACITY)


@lru_cache(maxsize=1)
def colour_map() -> np.ndarray:
    """Return 256 colours whose OKLab lightness grows in equal steps: uint8 [256, 3], sRGB."""
    share = np.linspace(0, 1, 256)
    lightness = _LIGHTNESS[0] + (_LIGHTNESS[1] - _LIGHTNESS[0]) * share
    hue = np.radians(_HUES[0] + (_HUES[1] - _HUES[0]) * share)
    # Dark and light colours have less room for chroma in sRGB.
    chroma = _CHROMA * np.sin(np.pi * (0.25 + 0.6 * share))
    oklab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    return np.rint(_srgb(oklab) * 255).astype(np.uint8)


def _srgb(oklab: np.ndarray) -> np.ndarray:
    """Convert OKLab (Ottosson 2020) to sRGB in [0, 1], clipped to its gamut: [..., 3]."""
    cone_roots = oklab @ np.array(
        [
            [1.0, 1.0, 1.0],
            [0.3963377774, -0.1055613458, -0.0894841775],
            [0.2158037573, -0.0638541728, -1.2914855480],
        ]
    )
    linear = cone_roots**3 @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
