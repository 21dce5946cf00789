"""Where prompts are cut into conjuncts, and where their noun phrases are."""

from __future__ import annotations

import pytest

from aae_batch import Request
from aae_batch.sampling.phrases import Phrase, conjuncts, noun_phrases
from aae_batch.sampling.words import Subject, resolve_subjects
from training.networks import tokenizer

TOKENIZER = tokenizer()
TOKENIZER.model_max_length = 77  # as CLIP's, so that words of several tokens fit


def subjects_of(prompt: str, named: list[str]) -> tuple[Subject, ...]:
    return resolve_subjects(TOKENIZER, Request(prompt, subjects=named)) if named else ()


def parts(prompt: str, *named: str) -> list[str]:
    return [p.text for p in conjuncts(TOKENIZER, prompt, subjects_of(prompt, [*named]))]


def phrases(prompt: str, *named: str) -> list[str]:
    return [p.text for p in noun_phrases(TOKENIZER, prompt, subjects_of(prompt, [*named]))]


@pytest.mark.parametrize("word", ["and", "with", "&", "|", ",", ", and"])
def test_a_conjunction_between_two_subjects_makes_two_conjuncts(word):
    assert parts(f"a red cat {word} a dog", "cat", "dog") == ["a red cat", "a dog"]


@pytest.mark.parametrize(
    ("prompt", "subjects", "expected"),
    [
        ("a cat, a dog and a frog", ["frog", "cat", "dog"], ["a cat", "a dog", "a frog"]),
        ("a red and blue bird and a cat", ["bird", "cat"], ["a red and blue bird", "a cat"]),
        ("a cat with a hat and a dog", ["cat", "dog"], ["a cat with a hat", "a dog"]),
        ("a dog and a cat with a hat", ["dog", "hat"], ["a dog", "a cat with a hat"]),
        ("a cat and a cat", ["cat", "cat"], ["a cat", "a cat"]),
        ("a cat and a black and white dog", ["cat", "dog"], ["a cat", "a black and white dog"]),
        ("red cat and black and white dog", ["cat", "dog"], ["red cat", "black and white dog"]),
        ("a star and a cross | dark", ["star", "cross"], ["a star and a cross", "dark"]),
    ],
)
def test_a_prompt_is_cut_once_between_two_subjects(prompt, subjects, expected):
    assert parts(prompt, *subjects) == expected


@pytest.mark.parametrize(
    ("prompt", "subjects"),
    [
        ("a red star", ["star"]),
        ("a cat on a bench", ["cat", "bench"]),
        ("a cat and a dog", ["cat"]),
        ("a cat and dog", ["cat and dog"]),
        ("a Cat, highly detailed", []),
    ],
)
def test_without_a_conjunction_between_subjects_the_prompt_is_one(prompt, subjects):
    assert parts(prompt, *subjects) == [prompt]


def test_without_subjects_a_prompt_is_cut_at_bars_or_else_at_every_and():
    assert parts("a cat and a dog with a hat and a frog") == ["a cat", "a dog with a hat", "a frog"]
    assert parts("a cat and a dog | a frog") == ["a cat and a dog", "a frog"]
    assert parts("| a cat |") == ["| a cat |"]


def test_a_conjunct_knows_its_positions_in_the_prompt():
    assert conjuncts(TOKENIZER, "a red circle and a blue square") == (
        Phrase("a red circle", (range(1, 4),)),
        Phrase("a blue square", (range(5, 8),)),
    )


def test_a_conjunct_is_whole_where_the_prompt_is_cut_off():
    short = tokenizer()  # 16 positions
    prompt = "a red circle and " * 3 + "a red and blue star"
    found = conjuncts(short, prompt, resolve_subjects(short, Request(prompt, subjects=["circle"])))
    assert found == (Phrase(prompt, (range(1, 15),)),)
    last = conjuncts(short, prompt)[-2:]
    assert last == (Phrase("a red", (range(13, 15),)), Phrase("blue star", (range(15, 15),)))


@pytest.mark.parametrize(
    ("prompt", "subjects", "expected"),
    [
        ("a cat and a red frog", ["cat", "frog"], ["a cat", "a red frog"]),
        ("a cat sitting on a bench", ["cat", "bench"], ["a cat", "a bench"]),
        ("a photo of the blue bird", ["bird"], ["the blue bird"]),
        ("a red circle", ["red", "circle"], ["a red circle"]),
        ("two dogs next to cats", ["dogs", "cats"], ["two dogs", "cats"]),
        ("a cat and a red and blue bird", ["cat", "bird"], ["a cat", "a red and blue bird"]),
        ("a cat and dog", ["cat", "dog"], ["a cat", "dog"]),
        ("a cat and a dog", [], ["a cat", "a dog"]),
        ("a photo of a cat in snow", [], ["a photo", "a cat", "snow"]),
    ],
)
def test_noun_phrases_go_from_a_determiner_to_their_subject(prompt, subjects, expected):
    assert phrases(prompt, *subjects) == expected


def test_a_noun_phrase_beyond_what_the_encoder_sees_is_left_out():
    short = tokenizer()
    found = noun_phrases(short, "a red circle and " * 3 + "a blue square and a star")
    assert [phrase.positions for phrase in found][-2:] == [(range(9, 12),), (range(13, 15),)]


def test_words_beyond_ascii_come_through():
    assert parts("une café and a naïve 😀", "café", "naïve") == ["une café", "a naïve 😀"]
