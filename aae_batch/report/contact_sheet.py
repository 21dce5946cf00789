"""A contact sheet: images side by side under their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

Verdict = Literal["found", "partly", "missing", "note"]
COLOURS: dict[Verdict, str] = {
    "found": "#1a7f37",
    "partly": "#9a6700",
    "missing": "#cf222e",
    "note": "#656d76",
}
INK, PAPER, FRAME = "#1f2328", "#ffffff", "#d0d7de"

SIDE = 208
GAP = 14
LINE = 20
HEADING = 26


@dataclass(frozen=True)
class Finding:
    """One line under an image, coloured by its verdict."""

    text: str
    verdict: Verdict


@dataclass(frozen=True)
class Picture:
    """An image with its label and findings."""

    label: str
    image: Image.Image
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Group:
    """Images under one title."""

    title: str
    pictures: tuple[Picture, ...]


def contact_sheet(title: str, groups: Sequence[Group], columns: int = 3) -> Image.Image:
    """Lay `groups` out in a grid of `columns` under a title. All groups have the same size."""
    across = max(len(group.pictures) for group in groups)
    lines = max(len(picture.findings) for group in groups for picture in group.pictures)
    cell_width = across * SIDE + (across - 1) * GAP // 2 + 2 * GAP
    cell_height = HEADING + LINE + SIDE + 8 + lines * LINE + 2 * GAP
    rows = -(-len(groups) // columns)
    top = 3 * HEADING
    size = (columns * (cell_width + GAP) + GAP, top + rows * (cell_height + GAP))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, HEADING), title, fill=INK, font=_font(22))
    for i, group in enumerate(groups):
        x = GAP + (i % columns) * (cell_width + GAP)
        y = top + (i // columns) * (cell_height + GAP)
        draw.rounded_rectangle((x, y, x + cell_width, y + cell_height), 8, outline=FRAME)
        _draw_group(sheet, draw, group, x + GAP, y + GAP)
    return sheet


def _draw_group(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, group: Group, x: int, y: int
) -> None:
    draw.text((x, y), group.title, fill=INK, font=_font(17))
    for i, picture in enumerate(group.pictures):
        left, top = x + i * (SIDE + GAP // 2), y + HEADING
        draw.text((left, top), picture.label, fill=COLOURS["note"], font=_font(14))
        top += LINE
        sheet.paste(
            picture.image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, top)
        )
        top += SIDE + 8
        for finding in picture.findings:
            colour = COLOURS[finding.verdict]
            _draw_mark(draw, left + 7, top + 9, finding.verdict)
            draw.text((left + 20, top), finding.text, fill=colour, font=_font(14))
            top += LINE


_STROKES: dict[Verdict, list[list[tuple[int, int]]]] = {
    "found": [[(-6, 0), (-2, 4), (5, -5)]],
    "missing": [[(-5, -5), (5, 5)], [(-5, 5), (5, -5)]],
    "partly": [[(-6, 2), (-2, -2), (2, 2), (6, -2)]],
    "note": [],
}
"""A tick, a cross and a tilde, drawn as strokes because not every font has them."""


def _draw_mark(draw: ImageDraw.ImageDraw, x: int, y: int, verdict: Verdict) -> None:
    for stroke in _STROKES[verdict]:
        draw.line([(x + dx, y + dy) for dx, dy in stroke], fill=COLOURS[verdict], width=3)
    if verdict == "note":
        draw.ellipse([(x - 2, y - 2), (x + 2, y + 2)], fill=COLOURS[verdict])


@lru_cache(maxsize=8)
def _font(size: int):
    return ImageFont.load_default(size)
