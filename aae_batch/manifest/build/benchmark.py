"""The prompts that Attend-and-Excite was measured on, and the like for the embedded model.

Chefer et al. 2023 (arXiv 2301.13826, section 5) pair 12 animals and 12 objects: every two animals,
every animal with every object, every two objects; 66 + 144 + 66 prompts. Objects have a colour,
drawn at random, except where an animal wears one ("a frog with a crown"). Which colours the authors
drew is in their file of prompts alone; here a seed draws them. The article is "a" throughout, as
theirs is ("a elephant"). The subjects are the nouns.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random

import pyarrow as pa

from aae_batch.errors import ManifestError, shown
from aae_batch.manifest.build.prompt import Prompt, Prompts

ANIMALS = (
    "cat", "dog", "bird", "bear", "lion", "horse", "elephant", "monkey", "frog", "turtle", "rabbit",
    "mouse",
)  # fmt: skip
OBJECTS = (
    "backpack", "glasses", "crown", "suitcase", "chair", "balloon", "bow", "car", "bowl", "bench",
    "clock", "apple",
)  # fmt: skip
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "black", "white",
)  # fmt: skip
WORN = ("glasses", "crown", "bow")
"""Objects that an animal is drawn with, in no colour."""

PAPER_SETS = ("animals", "animals-objects", "objects")
SHAPES_SETS = ("shapes", "coloured-shapes")
SIZES = {"animals": 66, "animals-objects": 144, "objects": 66}


@dataclass(frozen=True)
class Pair:
    """Two things in one prompt; `colours` of each, or None."""

    things: tuple[str, str]
    colours: tuple[str | None, str | None]
    joined: str = "and"

    @property
    def set(self) -> str:
        animals = sum(thing in ANIMALS for thing in self.things)
        return ("objects", "animals-objects", "animals")[animals]

    def __str__(self) -> str:
        named = (
            f"a {colour} {thing}" if colour else f"a {thing}"
            for thing, colour in zip(self.things, self.colours, strict=True)
        )
        return f" {self.joined} ".join(named)


def sets_of(name: str) -> tuple[str, ...]:
    """The sets that a name means: one, or `all` of the paper's.

    Raises:
        ManifestError: there is none of that name.
    """
    if name == "all":
        return PAPER_SETS
    if name not in (*PAPER_SETS, *SHAPES_SETS):
        known = ", ".join((*PAPER_SETS, "all", *SHAPES_SETS))
        raise ManifestError(f"There is no set {name!r}; use one of {known}.")
    return (name,)


def benchmark(
    sets: Sequence[str], colour_seed: int = 0, official: Sequence[Pair] | None = None
) -> Prompts:
    """The prompts of some sets, in the order of their words.

    Args:
        colour_seed: of the colours of the paper's objects. A prompt's colours do not depend on which
            sets are asked for.
        official: instead, the authors' own prompts.

    Raises:
        ManifestError: the official prompts have none of these sets.
    """
    pairs = list(official) if official is not None else list(_paper(Random(colour_seed)))
    shapes = [pair for name in sets for pair in _shapes(name)]
    by_set = [(pair.set, pair) for pair in pairs if pair.set in sets] + shapes
    if not by_set:
        raise ManifestError(f"The file has no prompts of {', '.join(sets)}; take another set.")
    things = [pair.things for _, pair in by_set]
    colours = [pair.colours for _, pair in by_set]
    return Prompts(
        [Prompt(str(pair), subjects=_subjects(name, pair)) for name, pair in by_set],
        {
            "set": pa.array([name for name, _ in by_set], pa.string()),
            **_columns("thing", things),
            **_columns("color", colours),
        },
    )


def read_official(text: str) -> list[Pair]:
    """The authors' file of prompts: JSON with lists of prompts in it, or a prompt on each line.

    Raises:
        ManifestError: a line is no prompt of the benchmark, or one is there twice.
    """
    pairs = [_parse(line) for line in _lines(text)]
    if not pairs:
        raise ManifestError("The file has no prompts; give the benchmark's, one on each line.")
    (pair, count) = Counter(map(str, pairs)).most_common(1)[0]
    if count > 1:
        raise ManifestError(f"Prompt {pair!r} is there {count} times; keep one.")
    return pairs


def _lines(text: str) -> list[str]:
    try:
        return list(_texts(json.loads(text)))
    except ValueError:
        return [line.strip() for line in text.split("\n") if line.strip()]


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


_PHRASE = rf"an? (?:({'|'.join(COLOURS)}) )?({'|'.join((*ANIMALS, *OBJECTS))})"
_PROMPT = re.compile(rf"{_PHRASE} (and|with) {_PHRASE}")


def _parse(line: str) -> Pair:
    match = _PROMPT.fullmatch(line.strip())
    if match is None:
        raise ManifestError(
            f"{shown(line)} is no prompt of the benchmark; they are like 'a cat and a red bowl'."
        )
    colour, thing, joined, other_colour, other = match.groups()
    return Pair((thing, other), (colour, other_colour), joined)


def _paper(random: Random) -> Iterator[Pair]:
    for pair in combinations(ANIMALS, 2):
        yield Pair(pair, (None, None))
    for animal in ANIMALS:
        for thing in OBJECTS:
            if thing in WORN:
                yield Pair((animal, thing), (None, None), "with")
            else:
                yield Pair((animal, thing), (None, random.choice(COLOURS)))
    for pair in combinations(OBJECTS, 2):
        yield Pair(pair, (random.choice(COLOURS), random.choice(COLOURS)))


def _shapes(name: str) -> list[tuple[str, Pair]]:
    """What the embedded model was trained on; see `aae_batch.shapes.world`."""
    from aae_batch.shapes.world import PAIRS, SHAPES

    if name == "shapes":
        return [(name, Pair(pair, (None, None))) for pair in combinations(SHAPES, 2)]
    if name == "coloured-shapes":
        return [
            (name, Pair((first.shape, second.shape), (first.colour, second.colour)))
            for first, second in PAIRS
        ]
    return []


def _subjects(name: str, pair: Pair) -> tuple[str, ...]:
    if name != "coloured-shapes":
        return pair.things
    return tuple(
        f"{colour} {thing}" for thing, colour in zip(pair.things, pair.colours, strict=True)
    )


def _columns(name: str, values: Sequence[tuple[str | None, str | None]]) -> dict[str, pa.Array]:
    return {
        f"{name}_{i + 1}": pa.array([value[i] for value in values], pa.string()) for i in (0, 1)
    }


def missing(prompts: Prompts, sets: Sequence[str]) -> dict[str, int]:
    """Of the paper's sets that are not whole: how many prompts there are."""
    counts = Counter(prompts.carried["set"].to_pylist())
    return {name: counts[name] for name in sets if SIZES.get(name, counts[name]) != counts[name]}
