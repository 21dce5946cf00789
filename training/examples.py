"""Training examples: pictures as latents, and captions as noisy as those of the web."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
import torch
from torch import Tensor

from aae_batch.request import Request
from aae_batch.sampling.words import Tokenizer, resolve_subjects
from aae_batch.shapes.world import PAIRS, SHAPES, SIZE, THINGS, Thing, caption
from training.networks import LATENT_SIZE, MAX_TOKENS, WORDS
from training.pictures import Scene, coverage, place, render

MAP_SIZE = LATENT_SIZE // 2
"""Side of the attention maps at which captions are grounded."""


@dataclass(frozen=True)
class CaptionMix:
    """How often a training example is of which kind. This is where subject neglect comes from.

    Attributes:
        one: a caption of one thing, with a picture of it.
        both: a caption of two things, with a picture of both.
        left_out: a caption of two things, with a picture of only one of them.
        none: no caption (for classifier-free guidance).
        none_pairs: the share of pictures with two things among those without a caption. Classifier-free
            guidance moves away from these, so a large share makes plain sampling leave one out.
        plain: the share of captions that name shapes without colours.
    """

    one: float = 0.35
    both: float = 0.24
    left_out: float = 0.31
    none: float = 0.10
    none_pairs: float = 0.5
    plain: float = 0.2


@dataclass
class Example:
    """One row of a batch, before it becomes tensors."""

    index: int
    named: tuple[Thing, ...]
    coloured: bool

    @property
    def caption(self) -> str:
        return caption(self.named, self.coloured)


@dataclass
class Batch:
    """`latents` [batch, channels, h, w]; `grounding` [batch, cells, tokens], where each word should be looked
    at; `grounded` [batch], False where there is no caption."""

    latents: Tensor
    captions: list[str]
    grounding: Tensor
    grounded: Tensor


def scenes(count: int, seed: int) -> list[Scene]:
    """`count` scenes; the first half with one thing, the second with two."""
    random = Random(seed)
    singles = [place([random.choice(THINGS)], random) for _ in range(count // 2)]
    pairs = [place(random.choice(PAIRS), random) for _ in range(count - count // 2)]
    return singles + pairs


def pixels(scene: Scene) -> np.ndarray:
    """A rendered scene as the VAE takes it: float32 [3, height, width] in [-1, 1]."""
    return np.asarray(render(scene), dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def outlines(scene: Scene) -> np.ndarray:
    """Where each shape of the world is in a scene: float32 [shapes, height, width], 0 or 1."""
    where = np.zeros((len(SHAPES), SIZE, SIZE), dtype=np.float32)
    for placed in scene.objects:
        where[SHAPES.index(placed.thing.shape)] += coverage(placed, SIZE)
    return where


class Examples:
    """Draws training batches from encoded scenes.

    Args:
        scenes: as `scenes()` made them.
        latents: [scenes, channels, h, w], of each the mean latent.
        tokenizer: which says at what positions a word stands.

    Raises:
        ValueError: the tokenizer breaks a word of the world into several tokens.
    """

    def __init__(self, scenes: list[Scene], latents: Tensor, tokenizer: Tokenizer) -> None:
        check_whole(tokenizer)
        self.tokenizer = tokenizer
        self.things = [tuple(o.thing for o in scene.objects) for scene in scenes]
        self.latents = latents
        self.coverage = [
            [coverage(o, MAP_SIZE).reshape(-1) for o in scene.objects] for scene in scenes
        ]
        self.singles = [i for i, things in enumerate(self.things) if len(things) == 1]
        self.pairs = [i for i, things in enumerate(self.things) if len(things) == 2]

    def batch(self, size: int, mix: CaptionMix, random: Random) -> Batch:
        rows = [self._draw(mix, random) for _ in range(size)]
        return Batch(
            latents=self.latents[[row.index for row in rows]].float(),
            captions=[row.caption for row in rows],
            grounding=torch.from_numpy(np.stack([self.grounding(row) for row in rows])),
            grounded=torch.tensor([bool(row.named) for row in rows]),
        )

    def _draw(self, mix: CaptionMix, random: Random) -> Example:
        kind = random.choices(
            ("one", "both", "left_out", "none"), (mix.one, mix.both, mix.left_out, mix.none)
        )[0]
        coloured = random.random() >= mix.plain
        if kind == "none":
            of_two = random.random() < mix.none_pairs
            return Example(random.choice(self.pairs if of_two else self.singles), (), coloured)
        if kind == "both":
            index = random.choice(self.pairs)
            return Example(index, tuple(random.sample(self.things[index], 2)), coloured)
        index = random.choice(self.singles)
        shown = self.things[index][0]
        if kind == "one":
            return Example(index, (shown,), coloured)
        absent = random.choice([b for a, b in PAIRS if a == shown])
        return Example(index, tuple(random.sample([shown, absent], 2)), coloured)

    def grounding(self, row: Example) -> np.ndarray:
        """Where each token should be looked at: float32 [cells, tokens], rows sum to 1.

        The cells of an object look at the words that name it, everything else at the start token.
        """
        target = np.zeros((MAP_SIZE**2, MAX_TOKENS), dtype=np.float32)
        if row.named:
            positions = dict(zip(row.named, self._positions(row.named, row.coloured), strict=True))
            shown = zip(self.things[row.index], self.coverage[row.index], strict=True)
            for thing, covered in shown:
                for position in positions.get(thing, ()):
                    target[:, position] += covered / len(positions[thing])
        target[:, 0] = np.clip(1 - target.sum(axis=1), 0, 1)
        return target

    @cache  # noqa: B019 - there are a few hundred captions, and the instance lives as long as the run
    def _positions(self, named: tuple[Thing, ...], coloured: bool) -> list[tuple[int, ...]]:
        """Where the words of each thing stand in the caption, as guidance would find them."""
        names = [str(thing) if coloured else thing.shape for thing in named]
        request = Request(caption(named, coloured), subjects=names)
        return [subject.token_indices for subject in resolve_subjects(self.tokenizer, request)]


def check_whole(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that breaks the world's words.

    Maps would still be grounded at the right positions, but a subject's attention would be spread over
    the pieces of its words, and differently for different words.

    Raises:
        ValueError: it does.
    """
    for word in WORDS:
        pieces = tokenizer(word, add_special_tokens=False).input_ids
        if len(pieces) != 1:
            raise ValueError(
                f"the tokenizer breaks {word!r} into {len(pieces)} tokens; "
                "give it a vocabulary that has every word of the world"
            )
