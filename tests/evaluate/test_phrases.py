from __future__ import annotations

import pytest

from aae_batch.evaluate.phrases import phrases


@pytest.mark.parametrize(
    ("prompt", "subjects", "expected"),
    [
        ("a cat and a frog", ["cat", "frog"], ["a cat", "a frog"]),
        ("a cat and a frog", ["frog", "cat"], ["a frog", "a cat"]),
        ("a frog with a yellow bowl", ["frog", "bowl"], ["a frog", "a yellow bowl"]),
        ("a cat, a dog and a bird", ["cat", "dog", "bird"], ["a cat", "a dog", "a bird"]),
        ("a cat, a dog, and a bird", ["cat", "dog", "bird"], ["a cat", "a dog", "a bird"]),
        ("a cat, with a hat", ["cat", "hat"], ["a cat", "a hat"]),
        ("a cat, android and a dog", ["android", "dog"], ["android", "a dog"]),
        ("a red cat and a blue cat", ["cat", "cat"], ["a red cat", "a blue cat"]),
        ("A Cat and a Frog", ["cat", "frog"], ["A Cat", "a Frog"]),
        ("a cat on a mat", ["cat", "mat"], ["cat", "mat"]),
        ("a cat on a mat and a dog", ["cat", "mat", "dog"], ["cat", "mat", "a dog"]),
        ("a catfish and a cat", ["cat"], ["a cat"]),
        ("a dog", ["cat"], ["cat"]),
        ("a salt and pepper mill", ["salt and pepper mill"], ["salt and pepper mill"]),
        ("a sandy band and a hat", ["band", "hat"], ["a sandy band", "a hat"]),
    ],
)
def test_a_subject_is_told_by_the_part_of_the_prompt_that_speaks_of_it(prompt, subjects, expected):
    assert phrases(prompt, subjects) == expected
