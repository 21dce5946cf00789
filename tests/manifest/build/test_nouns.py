"""With the real tagger, whose model lies in its package."""

from __future__ import annotations

import builtins

import pytest

from aae_batch.errors import SettingsError
from aae_batch.manifest.build.benchmark import PAPER_SETS, benchmark
from aae_batch.manifest.build.nouns import Nouns


@pytest.fixture(scope="module")
def nouns() -> Nouns:
    return Nouns()


@pytest.mark.parametrize(
    ("prompt", "subjects"),
    [
        ("a cat and a frog", ("cat", "frog")),
        ("a black bear and a brown suitcase", ("bear", "suitcase")),
        ("two dogs and a dog", ("dogs", "dog")),
        ("a dog and a dog", ("dog", "dog")),
        ("a teddy bear next to a fire hydrant", ("teddy bear", "fire hydrant")),
        ("a photo of a cat", ("cat",)),
        ("an oil painting of a squirrel", ("squirrel",)),
        ("a cat in front of a car", ("cat", "car")),
        ("A Cat, a frog", ("Cat", "frog")),
        ("a cat, frog", ("cat", "frog")),
        ("running fast", ()),
        ("", ()),
        ("!?", ()),
    ],
)
def test_subjects_are_the_nouns_and_neighbours_are_one(nouns, prompt, subjects):
    assert nouns(prompt) == subjects


def test_they_are_those_of_the_paper_s_own_prompts(nouns):
    for prompt in benchmark(PAPER_SETS).prompts:
        assert nouns(prompt.text) == prompt.subjects


def test_ignored_words_are_never_subjects():
    assert Nouns(["Artstation"])("a cat, trending on artstation") == ("cat",)


def test_without_the_package_it_is_said_how_to_give_subjects(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **named):
        if name.startswith("HanTa"):
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingsError, match=r"pip install HanTa.*column subjects"):
        Nouns()


@pytest.mark.parametrize(
    ("prompt", "subjects"),
    [
        ("a red bird and a cat", ("red bird", "cat")),
        (
            "a red and blue bird on a large, wooden bench",
            ("red and blue bird", "large, wooden bench"),
        ),
        ("a small teddy bear", ("small teddy bear",)),
        ("a cat that is red and a dog", ("cat", "dog")),
    ],
)
def test_a_noun_brings_its_adjectives_on_request(prompt, subjects):
    assert Nouns(adjectives=True)(prompt) == subjects
