"""The sentences a text is put into before CLIP reads it."""

from __future__ import annotations

import re

IMAGENET_TEMPLATES = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)
"""The 80 of CLIP's notebook `Prompt_Engineering_for_ImageNet` (Radford et al. 2021, arXiv 2103.00020),
in its order; Attend-and-Excite's metrics use the same."""

_ARTICLE = re.compile(r"(?:an?|the)\s", re.IGNORECASE)
_ARTICLE_OF_TEMPLATE = re.compile(r"\b(?:a|the) (?=\{\})")


def filled(template: str, text: str) -> str:
    """`text` in its place, where a template's article gives way to the text's own: "a photo of a {}." and
    "a cat and a frog" make "a photo of a cat and a frog."

    For texts that begin with "a", as the official prompts do, it is what the official
    `metrics/imagenet_utils.py` does, which replaces "a a" and "the a" by "a". Other than there, "the"
    and capitals are articles, too, and neither letters of words nor the text itself are changed.
    """
    if _ARTICLE.match(text):
        template = _ARTICLE_OF_TEMPLATE.sub("", template)
    return template.replace("{}", text)


def ensemble(text: str) -> list[str]:
    """`text` in all of the templates."""
    return [filled(template, text) for template in IMAGENET_TEMPLATES]
