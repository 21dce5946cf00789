"""Subjects and phrases in real English, by Stable Diffusion's own vocabulary.

Expected positions are counted from the text: the tokens before a subject's first letter, and those of
its own letters.
"""

from __future__ import annotations

import re

import pytest

from aae_batch import GuidanceConfig, Request
from aae_batch.errors import SubjectError
from aae_batch.manifest.build.benchmark import benchmark, sets_of
from aae_batch.manifest.judge import Judge
from aae_batch.sampling.phrases import conjuncts, noun_phrases
from aae_batch.sampling.words import resolve_subjects, token_table
from tests.clip_vocabulary import clip_tokenizer

TOKENIZER = clip_tokenizer()


def length(text: str) -> int:
    return len(TOKENIZER(text, add_special_tokens=False).input_ids)


def positions(prompt: str, start: int, stop: int) -> tuple[int, ...]:
    """Of what stands from character `start` to `stop`; 0 is the start token."""
    first = 1 + length(prompt[:start])
    return tuple(range(first, first + length(prompt[start:stop])))


def found(prompt: str, subjects: list[str], tokenizer=TOKENIZER) -> list[tuple[int, ...]]:
    request = Request(prompt, subjects=subjects)
    return [subject.token_indices for subject in resolve_subjects(tokenizer, request)]


def fast() -> Judge:
    """What `validate` judges with."""
    return Judge(TOKENIZER, GuidanceConfig())


def test_it_is_clips_vocabulary():
    assert TOKENIZER("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_every_subject_of_the_papers_276_prompts_is_found_where_it_stands():
    prompts = benchmark(sets_of("all")).prompts
    assert len(prompts) == 276
    judge = fast()
    for prompt in prompts:
        expected = []
        for subject in prompt.subjects:
            (match,) = re.finditer(rf"\b{subject}\b", prompt.text)
            expected.append(positions(prompt.text, *match.span()))
        assert found(prompt.text, [*prompt.subjects]) == expected, prompt.text
        table = token_table(TOKENIZER, prompt.text)
        for subject, indices in zip(prompt.subjects, expected, strict=True):
            assert table.text([table.tokens[i] for i in indices]) == subject
        judge.prepare([prompt.text])
        assert judge.plainly_has(Request(prompt.text, subjects=prompt.subjects)), prompt.text


# Each subject is marked in its prompt: [n:words] is the n-th of the subjects.
HARD = [
    "[0:a red cat] and [1:a cat]",
    "a [0:red cat] and a [1:cat]",
    "a [1:cat] and a [0:red cat]",
    "a [0:hot dog] and a [1:dog]",
    "a [1:dog] eating a [0:hot dog]",
    "a [1:teddy bear] and a [0:bear]",
    "a [0:bear] hugging a [1:teddy bear]",
    "a [0:cat] chasing a [1:cat] past a [2:cat]",
    "a [0:red] [1:frog]",
    "a [2:red frog] beside a [0:frog] and a [1:red] box",
    "an [0:axolotl] and an [1:octopus]",
    "two [0:axolotls]",
    "a [0:chihuahua] with a [1:blueberry muffin]",
    "a [0:pterodactyl] over [1:Reykjavík]",
    "a [0:CAT] and a [1:Dog]",
    "A [0:Golden Retriever] and a [1:golden eagle]",
    "a [0:café] at night",
    "a [0:cafe\u0301] at night",
    "[0:猫] and [1:狗]",
    "[0:クラゲ]",
    "a [0:naïve] painting of a [1:piñata]",
    "[0:Ångström] and [1:Éclair]",
    "[0:лиса] и [1:ёж]",
    "[0:القط] والكلب",
    "a [0:\u1100\u1169\u110b\u1163\u11bc\u110b\u1175] and a [1:강아지]",
    "a [0:😀] and a [1:🐸]",
    "a [0:👨‍👩‍👧] in a park",
    "a [0:cat's] tail",
    "a [0:cat]'s tail",
    "the [0:dogs]' toys",
    "a [0:cat], a [1:dog], and a [2:frog].",
    "[0:cat]/[1:dog]",
    "([0:cat]) [[1:dog]]",
    '"[0:cat]" and “[1:dog]”',
    "[0:cat]—[1:dog]",
    "[0:cat] - [1:dog]",
    "a [0:cat-like] robot and a [1:cat]",
    "a [0:well-known] [1:dog]",
    "an [0:ice-cream cone]",
    "an [0:ice cream] [1:cone]",
    "a [0:T-shirt] on a [1:shirt] rack",
    "[0:10 dogs]",
    "10 dogs and [0:0 dogs]",
    "3 [0:cats] and 13 [1:birds]",
    "1,000 [0:birds]",
    "a [0:3d] model of a [1:d] key",
    "a [0:2-door] car and a [1:door]",
    "a [0:cat_dog] and a [1:cat]",
    "a cat_dog and a [0:dog]",
    "_cat_ and a [0:cat]",
    "a [0:v1.5] rocket",
    "a [0:scarf] and a [1:car] with a [2:cat]",
    "a caterpillar, a [0:cat]",
    "a [0:cat]\tand\n a [1:dog]",
    "  a   [0:red   frog]  ",
    "a [0:rock 'n' roll] band",
    "a [0:salt and pepper] shaker and [1:pepper]",
    "a [0:black and white cat] and a [1:white cat]",
    "[0:Mickey's] hat and [1:Minnie]'s bow",
    "[0:don't] stop",
    "a [0:half-dog] and a [1:dog] and a [2:half]",
    "a [0:pineapple] on an [1:apple] by a [2:pine]",
    "[0:mother-in-law] and [1:mother]",
    "a [0:e-bike] and a [1:bike]",
    "a [0:wolf] in [1:sheep]'s [2:clothing]",
    "a [1:dog] , a [0:cat] ; a [2:frog] !",
    "[0:C++] code on a [1:screen]",
    "a [0:R2-D2] toy",
    "#[0:cat] @[1:dog]",
    "[0:l'arbre] et [1:l'eau]",
]  # fmt: skip


def parsed(marked: str) -> tuple[str, list[str], list[tuple[int, ...]]]:
    """Prompt, subjects, and their positions."""
    prompt, spans = "", {}
    rest = marked
    while match := re.search(r"\[(\d):([^\]]*)\]", rest):
        prompt += rest[: match.start()]
        spans[int(match[1])] = (len(prompt), len(prompt) + len(match[2]))
        prompt += match[2]
        rest = rest[match.end() :]
    prompt += rest
    ordered = [spans[i] for i in range(len(spans))]
    return (
        prompt,
        [prompt[start:stop] for start, stop in ordered],
        [positions(prompt, start, stop) for start, stop in ordered],
    )


@pytest.mark.parametrize("marked", HARD)
def test_subjects_of_hard_prompts_are_found_where_they_stand(marked):
    prompt, subjects, expected = parsed(marked)
    assert found(prompt, subjects) == expected
    judge = fast()
    judge.prepare([prompt])
    assert found(prompt, subjects, judge.streams) == expected, "validate finds others"
    if judge.plainly_has(Request(prompt, subjects=subjects)):
        assert len(set(sum(expected, ()))) == len(sum(expected, ()))


def test_there_are_enough_hard_prompts():
    assert len(HARD) >= 60


@pytest.mark.parametrize("marked", HARD)
def test_what_indices_point_at_is_called_as_the_prompt_has_it(marked):
    prompt, subjects, expected = parsed(marked)
    request = Request(prompt, token_indices=expected)
    names = [subject.name for subject in resolve_subjects(TOKENIZER, request)]
    assert names == [" ".join(name.split()) for name in subjects] or names == subjects


@pytest.mark.parametrize(
    ("prompt", "subjects", "why"),
    [
        ("10 dogs", ["0 dogs"], "only inside '10 dogs'"),
        ("1,000 birds", ["000 birds"], "only inside '1,000 birds'"),
        ("a cat_dog", ["cat"], "only inside 'cat_dog'"),
        ("a cat-like robot", ["cat"], "only inside 'cat-like'"),
        ("a v1.5 rocket", ["5"], "only inside 'v1.5'"),
        ("1/2 dogs", ["2 dogs"], "only inside '1/2 dogs'"),
        ("at 10:30", ["30"], "only inside '10:30'"),
        ("10'000 dogs", ["000 dogs"], 'only inside "10\'000 dogs"'),
        ("a cat\u2011dog", ["cat"], "only inside"),
        ("a red cat and a cat", ["cat", "red cat", "cat"], "stands 2 times"),
        ("a teddy-bear", ["bear"], "only inside 'teddy-bear'"),
        ("a red cat", ["red cat", "cat"], "has no place left in the prompt"),
        ("a hot dog", ["dog", "hot dog"], "has no place left in the prompt"),
        ("a red cat and a cat", ["cat", "cat", "red cat"], "has no place left in the prompt"),
        ("a cat and a dog", ["cat", "cat"], "only once"),
        ("a caterpillar", ["cat"], "is not in the prompt"),
        ("a cat", ["cats"], "is not in the prompt"),
    ],
)
def test_a_subject_that_has_no_place_of_its_own_is_refused(prompt, subjects, why):
    for tokenizer in (TOKENIZER, fast().streams):
        with pytest.raises(SubjectError, match=re.escape(why)):
            found(prompt, subjects, tokenizer)
    judge = fast()
    judge.prepare([prompt])
    assert not judge.plainly_has(Request(prompt, subjects=subjects))


def test_tokens_are_shown_as_the_prompt_has_them():
    shown = [token.text for token in token_table(TOKENIZER, "a Café for 猫").words]
    assert shown[:3] == ["a", "Café", "for"]
    assert set(shown[3:]) == {"猫"}
    (subject,) = resolve_subjects(TOKENIZER, Request("a Café", token_indices=[2]))
    assert (subject.name, subject.tokens) == ("Café", ("Café",))


def parts(find, prompt: str, *subjects: str) -> list[str]:
    named = resolve_subjects(TOKENIZER, Request(prompt, subjects=subjects)) if subjects else ()
    return [phrase.text for phrase in find(TOKENIZER, prompt, named)]


@pytest.mark.parametrize(
    ("prompt", "subjects", "expected"),
    [
        ("a cat on a red and blue bench", ["cat", "bench"], ["a cat on a red and blue bench"]),
        ("a cat near a large, fluffy dog", ["cat", "dog"], ["a cat near a large, fluffy dog"]),
        ("a cat and a large, fluffy dog", ["cat", "dog"], ["a cat", "a large, fluffy dog"]),
        ("a large, fluffy cat and a dog", ["cat", "dog"], ["a large, fluffy cat", "a dog"]),
        ("a cat on a mat and dogs", ["cat", "dogs"], ["a cat on a mat", "dogs"]),
        ("a red and blue bird with a cat", ["bird", "cat"], ["a red and blue bird", "a cat"]),
        ("a cat on a red and blue bench", ["cat", "blue bench"], ["a cat on a red and blue bench"]),
        ("cats and dogs", ["cats", "dogs"], ["cats", "dogs"]),
        ("a cat sitting and small dog", ["cat", "dog"], ["a cat sitting", "small dog"]),
        ("a cat sleeping, big dog", ["cat", "dog"], ["a cat sleeping", "big dog"]),
        ("cat wearing hat and red dog", ["cat", "dog"], ["cat wearing hat", "red dog"]),
        ("a cat on grass, brown dog", ["cat", "dog"], ["a cat on grass", "brown dog"]),
        ("a cat with red ball and blue dog", ["cat", "dog"], ["a cat with red ball", "blue dog"]),
    ],
)
def test_conjuncts_keep_noun_phrases_whole(prompt, subjects, expected):
    assert parts(conjuncts, prompt, *subjects) == expected


@pytest.mark.parametrize(
    ("prompt", "subjects", "expected"),
    [
        ("a large, fluffy cat", ["cat"], ["a large, fluffy cat"]),
        ("a large, fluffy, white cat and a dog", ["cat", "dog"], ["a large, fluffy, white cat", "a dog"]),
        ("a cat on a red and blue bench", ["cat", "bench"], ["a cat", "a red and blue bench"]),
        ("a cat, a dog", ["cat", "dog"], ["a cat", "a dog"]),
        ("a cat, digital art", ["cat"], ["a cat"]),
        ("a salt and pepper shaker", ["salt and pepper"], ["a salt and pepper"]),
        ("a cat, digital art", [], ["a cat", "digital art"]),
        ("masterpiece, best quality, red cat", ["cat"], ["red cat"]),
        ("a man smiling and old woman", ["man", "woman"], ["a man", "old woman"]),
        ("a cat on grass, brown dog", ["cat", "dog"], ["a cat", "brown dog"]),
        ("black and white dogs", ["dogs"], ["black and white dogs"]),
        ("a Café in Paris", ["Café"], ["a Café"]),
    ],
)  # fmt: skip
def test_noun_phrases_keep_adjectives_together(prompt, subjects, expected):
    assert parts(noun_phrases, prompt, *subjects) == expected
