"""The benchmark prompts of Attend-and-Excite, and similar ones for the embedded model.

Chefer et al. 2023 (arXiv 2301.13826, section 5) pair 12 animals and 12 objects: all pairs of animals, of
an animal and an object, and of objects (66 + 144 + 66 prompts). Objects have a random colour, except those
that an animal wears ("a frog with a crown"). Only the authors' prompt file has their colours; here a seed
determines them. As in the paper, the article is always "a" ("a elephant"). The subjects are the nouns.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations, product
from random import Random

import pyarrow as pa

from aae_batch.errors import ManifestError, shown
from aae_batch.manifest.build.prompt import Prompt, Prompts

_WORDS = json.loads((files(__package__) / "benchmark.json").read_text(encoding="utf-8"))
ANIMALS, OBJECTS, COLOURS = _WORDS["animals"], _WORDS["objects"], _WORDS["colours"]
WORN = _WORDS["worn"]
"""Objects that an animal wears, joined by "with" and without a colour."""

PAPER_SETS = ("animals", "animals-objects", "objects")
SHAPES_SETS = ("shapes", "coloured-shapes", "report-shapes")
SIZES = {"animals": 66, "animals-objects": 144, "objects": 66}


@dataclass(frozen=True)
class Pair:
    """A prompt that names two things, each with an optional colour."""

    set: str
    things: tuple[str, str]
    colours: tuple[str | None, str | None] = (None, None)
    joined: str = "and"

    @property
    def phrases(self) -> tuple[str, ...]:
        named = zip(self.things, self.colours, strict=True)
        return tuple(f"{colour} {thing}" if colour else thing for thing, colour in named)

    @property
    def subjects(self) -> tuple[str, ...]:
        return self.phrases if self.set in ("coloured-shapes", "report-shapes") else self.things

    def __str__(self) -> str:
        return f" {self.joined} ".join(f"a {phrase}" for phrase in self.phrases)


def sets_of(name: str) -> tuple[str, ...]:
    """Return the prompt sets that a name stands for: one set, or for `all` those of the paper.

    Raises:
        ManifestError: the name is unknown.
    """
    if name == "all":
        return PAPER_SETS
    if name not in (*PAPER_SETS, *SHAPES_SETS):
        known = ", ".join((*PAPER_SETS, "all", *SHAPES_SETS))
        raise ManifestError(f"Unknown set {name!r}; use one of {known}.")
    return (name,)


def benchmark(
    sets: Sequence[str], colour_seed: int = 0, official: Sequence[Pair] | None = None
) -> Prompts:
    """Return the prompts of the given sets, in word-list order.

    Args:
        colour_seed: seed of the object colours in the paper's sets. A prompt's colours do not depend on
            `sets`.
        official: the authors' own prompts, to use instead.

    Raises:
        ManifestError: the official prompts include none of these sets.
    """
    paper = _paper(Random(colour_seed)) if official is None else official
    pairs = [pair for pair in paper if pair.set in sets]
    pairs += (pair for name in sets for pair in _shapes(name))
    if not pairs:
        raise ManifestError(f"The file has no prompts of {', '.join(sets)}; take another set.")
    columns = {"set": [pair.set for pair in pairs]}
    for name, field in (("thing", "things"), ("color", "colours")):
        for i in (0, 1):
            columns[f"{name}_{i + 1}"] = [getattr(pair, field)[i] for pair in pairs]
    return Prompts(
        [Prompt(str(pair), subjects=pair.subjects) for pair in pairs],
        {name: pa.array(values, pa.string()) for name, values in columns.items()},
    )


def _paper(random: Random) -> Iterator[Pair]:
    for things in combinations(ANIMALS, 2):
        yield Pair("animals", things)
    for animal, thing in product(ANIMALS, OBJECTS):
        if thing in WORN:
            yield Pair("animals-objects", (animal, thing), joined="with")
        else:
            yield Pair("animals-objects", (animal, thing), (None, random.choice(COLOURS)))
    for things in combinations(OBJECTS, 2):
        yield Pair("objects", things, (random.choice(COLOURS), random.choice(COLOURS)))


def _shapes(name: str) -> Iterator[Pair]:
    """Yield the prompts of a set for the embedded model; see `aae_batch.shapes.world`."""
    from aae_batch.shapes.splits import SPLITS
    from aae_batch.shapes.world import PAIRS, SHAPES

    if name == "shapes":
        yield from (Pair(name, things) for things in combinations(SHAPES, 2))
    elif name in SHAPES_SETS:
        for one, other in SPLITS["report"].pairs if name == "report-shapes" else PAIRS:
            yield Pair(name, (one.shape, other.shape), (one.colour, other.colour))


def read_official(text: str) -> list[Pair]:
    """Parse the authors' prompt file: JSON with lists of prompts, or one prompt per line.

    Raises:
        ManifestError: a line is not a prompt of the benchmark, or a prompt occurs twice.
    """
    pairs = [_parse(line) for line in _lines(text)]
    if not pairs:
        raise ManifestError("The file has no prompts; give the benchmark's, one on each line.")
    (pair, count) = Counter(map(str, pairs)).most_common(1)[0]
    if count > 1:
        raise ManifestError(f"Prompt {pair!r} occurs {count} times; keep one.")
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
            f"{shown(line)} is not a prompt of the benchmark; write e.g. 'a cat and a red bowl'."
        )
    colour, thing, joined, other_colour, other = match.groups()
    animals = sum(word in ANIMALS for word in (thing, other))
    name = ("objects", "animals-objects", "animals")[animals]
    return Pair(name, (thing, other), (colour, other_colour), joined)


def missing(prompts: Prompts, sets: Sequence[str]) -> dict[str, int]:
    """Return the number of prompts of each incomplete set of the paper."""
    counts = Counter(prompts.carried["set"].to_pylist())
    return {name: counts[name] for name in sets if SIZES.get(name, counts[name]) != counts[name]}
