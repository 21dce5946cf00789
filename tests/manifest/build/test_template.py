from __future__ import annotations

import pytest

from aae_batch.errors import ManifestError
from aae_batch.manifest.build.template import expand

LISTS = {"animal": ["cat", "dog"], "color": ["red", "blue"], "object": ["car", "bowl", "bench"]}


def test_every_gap_takes_every_entry_and_the_last_gap_changes_first():
    made = expand(["a {animal} and a {color} {object}"], LISTS)
    texts = [prompt.text for prompt in made.prompts]
    assert len(texts) == 12
    assert texts[:4] == [
        "a cat and a red car",
        "a cat and a red bowl",
        "a cat and a red bench",
        "a cat and a blue car",
    ]
    assert not any(prompt.has_subjects for prompt in made.prompts)


def test_what_fills_a_gap_is_carried_in_a_column_of_its_name():
    made = expand(
        ["a {color} {animal}", "one {animal}"], {k: LISTS[k] for k in ("animal", "color")}
    )
    assert list(made.carried) == ["color", "animal"]
    assert made.carried["color"].to_pylist() == ["red", "red", "blue", "blue", None, None]
    assert made.carried["animal"].to_pylist() == ["cat", "dog"] * 3


def test_a_gap_that_occurs_twice_is_filled_alike():
    made = expand(["a {animal} beside a {animal}"], {"animal": ["cat", "dog"]})
    assert [prompt.text for prompt in made.prompts] == ["a cat beside a cat", "a dog beside a dog"]


def test_numbered_gaps_take_different_entries_each_set_once():
    made = expand(["a {animal.1} and a {animal.2}"], {"animal": ["cat", "dog", "frog"]})
    assert [prompt.text for prompt in made.prompts] == [
        "a cat and a dog",
        "a cat and a frog",
        "a dog and a frog",
    ]


def test_subjects_are_filled_as_the_template_is_and_go_where_their_gaps_are():
    made = expand(
        ["a {color} {object}", "a {animal}"], LISTS, subjects=["{color} {object}", "{animal}"]
    )
    assert made.prompts[0].subjects == ("red car",)
    assert made.prompts[-1].subjects == ("dog",)


def test_a_template_with_the_gaps_of_no_subject_leaves_them_to_be_found():
    lists = {"animal": ["cat"], "object": ["car"]}
    made = expand(["a {animal}", "a {object}"], lists, subjects=["{animal}"])
    assert [prompt.subjects for prompt in made.prompts] == [("cat",), None]


@pytest.mark.parametrize(
    ("template", "lists", "subjects", "said"),
    [
        (
            "a {cat}",
            {"animal": ["cat"]},
            [],
            "placeholder {cat} but no list for it; the lists are animal",
        ),
        ("a {}", {"animal": ["cat"]}, [], "has a placeholder {} but no list"),
        ("a {animal!r}", {"animal": ["cat"]}, [], "has a placeholder {animal!r} but no list"),
        ("a cat", {"animal": ["cat"]}, [], "No template uses the list animal"),
        ("a {seed}", {"seed": ["1"]}, [], "name of a column .* rename it, e.g. to my_seed"),
        ("a {error}", {"error": ["1"]}, [], "name of a column"),
        ("a {animal}", {"animal": ["cat"]}, ["{dog}"], "placeholder {dog} that no template has"),
        (" ", {}, [], "The template is empty"),
        ("{a}{b}{c}", dict.fromkeys("abc", ["x"] * 200), [], "8,000,000 prompts"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template, lists, subjects, said):
    with pytest.raises(ManifestError, match=said):
        expand([template], lists, subjects)
