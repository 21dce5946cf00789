"""How results and rows look in a notebook: HTML that is legible on light and on dark pages."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from aae_batch.dataset.heatmap import colour_map, heatmap

if TYPE_CHECKING:
    from aae_batch.request import Result, SubjectAttention

SIDE = 256
"""Pixels of the longer side of a shown image, at most."""

_CAPTION = 128
"""Pixels of a caption's width, at least."""

_LETTERS = 80
_STEPS_SHOWN = 6
"""Maps over time shown of a subject, evenly spaced."""

_COLOURS = ("#e8590c", "#1c7ed6", "#0ca678", "#ae3ec9", "#8a9a00", "#e64980")
"""Colours of curves, of a lightness that stands out from white and from black."""

_WIDTH, _HEIGHT, _MARGIN = 320, 120, 28
"""Pixels of a plot of curves."""


def as_text(value: object) -> str:
    """Return a request's or a row's value as text, whatever its type; None, which a failed one may have, is
    empty."""
    return "" if value is None else str(value)


def clipped(text: str, most: int = _LETTERS) -> str:
    """Return the text, with its end left out if it is longer than `most` letters."""
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}\u2026"


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def picture(image: Image.Image, text: str, side: int = SIDE) -> str:
    """Return an `img`, at most `side` pixels long, with a text for those who do not see it."""
    small = image.copy()
    small.thumbnail((side, side))
    data = base64.b64encode(png(small)).decode()
    # Notebooks shrink images to their table's cell.
    return f'<img style="max-width: none" alt="{escape(text)}" src="data:image/png;base64,{data}">'


def figure(image: Image.Image, caption: str, title: str = "", side: int = SIDE) -> str:
    """Return an image with its caption.

    Args:
        title: the whole text if the caption is clipped.
    """
    width = max(_CAPTION, min(image.width, side))
    return (
        '<figure style="display: inline-block; margin: 4px; vertical-align: top">'
        f"{picture(image, title or caption, side)}"
        f'<figcaption style="max-width: {width}px; overflow-wrap: anywhere" '
        f'title="{escape(title or caption)}">{escape(caption)}</figcaption></figure>'
    )


def scale(most: float) -> str:
    """Return the colours of heatmaps, from no attention to `most`."""
    stops = ", ".join("rgb({}, {}, {})".format(*colour) for colour in colour_map()[::51])
    bar = (
        '<span style="display: inline-block; width: 120px; height: 10px; '
        f'background: linear-gradient(to right, {stops})"></span>'
    )
    return f"<div>attention 0 {bar} {most:.2g}</div>"


def curves(named: Iterable[tuple[str, Sequence[float] | np.ndarray]]) -> str:
    """Return a plot, as SVG, of values in [0, 1] at each step, a curve for each name."""
    lines, keys, last = [], [], 0
    for place, (name, values) in enumerate(named):
        colour = _COLOURS[place % len(_COLOURS)]
        last = max(last, len(values) - 1)
        across = np.linspace(_MARGIN, _WIDTH, len(values))
        down = 8 + (1 - np.clip(np.nan_to_num(values), 0, 1)) * (_HEIGHT - 16)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
        lines.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>'
        )
        keys.append(f'<span style="color: {colour}">\u2014 {escape(clipped(name))}</span>')
    bottom = _HEIGHT - 8
    labels = [(0, bottom, "0"), (0, 14, "1"), (_MARGIN, _HEIGHT + 10, "step 0")]
    texts = "".join(f'<text x="{x}" y="{y}">{text}</text>' for x, y, text in labels)
    return (
        f'<div><svg width="{_WIDTH + 8}" height="{_HEIGHT + 14}" role="img" '
        'aria-label="largest attention at each step" fill="currentColor" font-size="11">'
        f'<path fill="none" stroke="currentColor" opacity="0.4" d="M{_MARGIN} 8 V{bottom} H{_WIDTH}"/>'
        f'{texts}<text x="{_WIDTH}" y="{_HEIGHT + 10}" text-anchor="end">{last}</text>'
        f"{''.join(lines)}</svg><div>largest attention: {' '.join(keys)}</div></div>"
    )


def result_text(result: Result) -> str:
    """Return a result in a line."""
    end = f"failed: {result.error}" if result.error is not None else _figures_of(result)
    return f"<Result of {clipped(as_text(result.request.prompt))!r}, {_made_by(result)}: {end}>"


def result_html(result: Result) -> str:
    """Return the image of a result, each subject's maps and curve; or why there is no image."""
    prompt = as_text(result.request.prompt)
    head = f'<b title="{escape(prompt)}">{escape(clipped(prompt))}</b>, {escape(_made_by(result))}'
    if result.error is not None:
        return f"<div>{head}<p>failed: {escape(str(result.error))}</p></div>"
    subjects = result.attention.subjects if result.attention else ()
    shown = figure(result.image, _figures_of(result), prompt) if result.image else ""
    if not subjects:
        return f"<div>{head}<div>{shown}</div></div>"
    most = max(float(subject.map_scales.max()) for subject in subjects)
    maps = "".join(f"<div>{_over_time(result, subject, most)}</div>" for subject in subjects)
    if all(len(subject.map_steps) == 1 for subject in subjects):
        maps = "".join(_over_time(result, subject, most) for subject in subjects)
    plot = curves((subject.subject, subject.max_attention) for subject in subjects)
    return f"<div>{head}<div>{shown}{maps}</div>{scale(most)}{plot}</div>"


def _over_time(result: Result, subject: SubjectAttention, most: float) -> str:
    """Return the heatmaps of a subject at some of its steps, the last among them."""
    if result.image is None:
        return ""
    places = np.unique(np.linspace(0, len(subject.maps) - 1, _STEPS_SHOWN).round().astype(int))
    return "".join(
        figure(
            heatmap(result.image, subject.maps[i] * (subject.map_scales[i] / 255), most),
            clipped(f"{subject.subject}, step {subject.map_steps[i]}"),
            side=SIDE if len(places) == 1 else SIDE // 2,
        )
        for i in places
    )


def _made_by(result: Result) -> str:
    method = result.method or as_text(result.request.method)
    return f"{f'{method}, ' if method else ''}seed {result.request.seed}"


def _figures_of(result: Result) -> str:
    size = f"{result.image.width} x {result.image.height}" if result.image else "no image"
    seen = result.attention
    loss = "" if seen is None or seen.final_loss is None else f", final loss {seen.final_loss:.3f}"
    return f"{size}{loss}, {result.seconds:.1f} s"
