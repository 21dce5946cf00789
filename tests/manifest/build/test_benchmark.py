"""The paper's benchmark, by what the paper says of it."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from aae_batch.errors import ManifestError
from aae_batch.manifest.build import benchmark as paper
from aae_batch.manifest.build.benchmark import benchmark, read_official, sets_of
from aae_batch.request import Request
from aae_batch.sampling.words import resolve_subjects
from training.networks import tokenizer


def texts(*sets: str, **options) -> list[str]:
    return [prompt.text for prompt in benchmark(sets, **options).prompts]


def test_the_sets_have_the_paper_s_sizes_and_no_prompt_twice():
    made = benchmark(sets_of("all"))
    counts = Counter(made.carried["set"].to_pylist())
    assert counts == {"animals": 66, "animals-objects": 144, "objects": 66}
    assert len({prompt.text for prompt in made.prompts}) == 276


def test_the_wording_is_the_paper_s():
    assert texts("animals")[:2] == ["a cat and a dog", "a cat and a bird"]
    assert "a horse and a elephant" in texts("animals")
    mixed = texts("animals-objects")
    worn = [text for text in mixed if " with " in text]
    assert len(worn) == 36
    assert {"a bear with a glasses", "a elephant with a bow", "a frog with a crown"} <= set(worn)
    coloured = [text.split() for text in mixed if " and " in text]
    assert all(len(words) == 6 and words[4] in paper.COLOURS for words in coloured)
    for words in map(str.split, texts("objects")):
        assert words[1] in paper.COLOURS
        assert words[5] in paper.COLOURS


def test_the_subjects_are_the_nouns():
    first = benchmark(["objects"]).prompts[0]
    assert first.subjects == ("backpack", "glasses")


def test_a_seed_draws_the_colours_the_same_for_every_choice_of_sets():
    assert texts(*sets_of("all"))[-66:] == texts("objects")
    assert texts("objects") != texts("objects", colour_seed=1)
    assert texts("objects")[:2] == [
        "a gray backpack and a green glasses",
        "a green backpack and a white crown",
    ]


@pytest.mark.parametrize("layout", ["lines", "json"])
def test_the_authors_file_gives_their_colours(layout):
    own = ["a cat and a dog", "a dog and a black apple", "a red glasses and a red suitcase"]
    text = "\n".join(own) if layout == "lines" else json.dumps({"x": own[:2], "y": own[2:]})
    official = read_official(text)
    made = benchmark(sets_of("all"), official=official)
    assert [prompt.text for prompt in made.prompts] == own
    assert made.carried["set"].to_pylist() == ["animals", "animals-objects", "objects"]
    assert made.prompts[2].subjects == ("glasses", "suitcase")
    assert paper.missing(made, sets_of("all")) == dict.fromkeys(paper.PAPER_SETS, 1)
    assert paper.missing(benchmark(sets_of("all")), sets_of("all")) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a cat and a dog\na cow and a dog", "'a cow and a dog' is not a prompt of the benchmark"),
        ("a cat and a dog\na cat and a dog", "occurs 2 times"),
        ("\n", "has no prompts"),
        ("{}", "has no prompts"),
    ],
)
def test_another_file_is_refused(text, said):
    with pytest.raises(ManifestError, match=said):
        read_official(text)


def test_a_set_that_the_authors_file_lacks_is_refused():
    with pytest.raises(ManifestError, match="no prompts of objects"):
        benchmark(["objects"], official=read_official("a cat and a dog"))


def test_a_set_that_is_unknown_is_refused_with_those_there_are():
    with pytest.raises(
        ManifestError, match=r"Unknown set 'cars'; use one of animals, .*coloured-shapes"
    ):
        sets_of("cars")


def test_the_embedded_model_has_sets_that_its_tokenizer_knows():
    assert len(texts("shapes")) == 10
    made = benchmark(["coloured-shapes"])
    assert len(made.prompts) == 240
    words = tokenizer()
    for prompt in made.prompts[:20]:
        assert len(resolve_subjects(words, Request(prompt.text, prompt.subjects))) == 2
