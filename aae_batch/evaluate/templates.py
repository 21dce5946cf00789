"""The sentences a text is put into before CLIP reads it."""

from __future__ import annotations

import re
from importlib.resources import files

_FILE = files("aae_batch.evaluate") / "imagenet_templates.txt"

IMAGENET_TEMPLATES = tuple(_FILE.read_text(encoding="utf-8").splitlines())
"""The 80 of CLIP's notebook `Prompt_Engineering_for_ImageNet` (Radford et al. 2021, arXiv 2103.00020),
in its order; Attend-and-Excite's metrics use the same."""

_ARTICLE = re.compile(r"(?:an?|the)\s", re.IGNORECASE)
_ARTICLE_OF_TEMPLATE = re.compile(r"\b(?:a|the) (?=\{\})")


def filled(template: str, text: str) -> str:
    """Put `text` into a template, whose article gives way to the text's own: "a photo of a {}." and
    "a cat and a frog" make "a photo of a cat and a frog."

    For texts that begin with "a", as the official prompts do, this equals the official
    `metrics/imagenet_utils.py`, which replaces "a a" and "the a" by "a". Here "the" and capitals count
    as articles too, and neither letters of words nor the text itself change.
    """
    if _ARTICLE.match(text):
        template = _ARTICLE_OF_TEMPLATE.sub("", template)
    return template.replace("{}", text)


def ensemble(text: str) -> list[str]:
    """`text` in all of the templates."""
    return [filled(template, text) for template in IMAGENET_TEMPLATES]
