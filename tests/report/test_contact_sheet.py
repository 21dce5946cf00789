from __future__ import annotations

import numpy as np
from PIL import Image

from aae_batch.report.contact_sheet import COLOURS, Finding, Group, Picture, contact_sheet


def shows(sheet: Image.Image, colour: str) -> bool:
    wanted = np.array(Image.new("RGB", (1, 1), colour))[0, 0]
    return bool((np.asarray(sheet) == wanted).all(axis=-1).any())


def group(*verdicts) -> Group:
    findings = tuple(Finding(f"a thing: {verdict}", verdict) for verdict in verdicts)
    image = Image.new("RGB", (128, 128), "#123456")
    return Group("a cat and a dog", (Picture("plain", image, findings), Picture("guided", image)))


def test_every_verdict_has_its_colour():
    sheet = contact_sheet("title", [group("found", "partly", "missing", "note")])
    assert all(shows(sheet, colour) for colour in COLOURS.values())
    assert shows(sheet, "#123456")


def test_the_page_grows_by_rows():
    one = contact_sheet("title", [group("found")] * 3)
    two = contact_sheet("title", [group("found")] * 4)
    assert two.width == one.width
    assert two.height > one.height
