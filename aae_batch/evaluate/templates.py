"""The ImageNet templates that a text is put into before CLIP embeds it."""

from __future__ import annotations

import re
from importlib.resources import files

_FILE = files("aae_batch.evaluate") / "imagenet_templates.txt"

IMAGENET_TEMPLATES = tuple(_FILE.read_text(encoding="utf-8").splitlines())
"""The 80 templates of CLIP's notebook `Prompt_Engineering_for_ImageNet` (Radford et al. 2021, arXiv
2103.00020), in the same order, as used by Attend-and-Excite's metrics."""

_ARTICLE = re.compile(r"(?:an?|the)\s", re.IGNORECASE)
_ARTICLE_OF_TEMPLATE = re.compile(r"\b(?:a|the) (?=\{\})")


def filled(template: str, text: str) -> str:
    """Insert `text` into a template, where its own article replaces the template's.

    "a photo of a {}." and "a cat and a frog" give "a photo of a cat and a frog."

    For texts that start with "a", like the official prompts, this equals the official
    `metrics/imagenet_utils.py`, which replaces "a a" and "the a" with "a". Unlike it, this also handles
    "the" and capitals, and never changes the text itself or letters inside words.
    """
    if _ARTICLE.match(text):
        template = _ARTICLE_OF_TEMPLATE.sub("", template)
    return template.replace("{}", text)


def ensemble(text: str) -> list[str]:
    """Return `text` in all of the templates."""
    return [filled(template, text) for template in IMAGENET_TEMPLATES]
