"""From words to token positions, and what is said when a word is not there."""

from __future__ import annotations

import pytest
import torch

from aae_batch import GuidanceConfig, Request
from aae_batch.errors import PromptError, SubjectError
from aae_batch.manifest.judge import Judge
from aae_batch.manifest.row import Row
from aae_batch.sampling.model.family import network_of
from aae_batch.sampling.model.loading import load_streams
from aae_batch.sampling.phrases import conjuncts
from aae_batch.sampling.words import Stream, resolve_subjects, token_table, token_tables
from tests.conftest import TEXT_WIDTH, small_pipeline
from training.flow import t5_tokenizer
from training.networks import tokenizer

TOKENIZER = tokenizer()  # 16 positions; the world's words are one token each, others several


def indices(prompt: str, **named) -> list[tuple[int, ...]]:
    request = Request(prompt, id="r7", **named)
    return [subject.token_indices for subject in resolve_subjects(TOKENIZER, request)]


def refusal(prompt: str, **named) -> str:
    with pytest.raises(SubjectError) as refused:
        indices(prompt, **named)
    assert str(refused.value).startswith("row r7: ")
    return refused.value.reason


def test_a_word_is_found_at_its_position():
    assert indices("a red circle and a blue square", subjects=["circle", "square"]) == [(3,), (7,)]


def test_case_does_not_matter():
    assert indices("A Red CIRCLE", subjects=["Circle"]) == [(3,)]


def test_a_phrase_is_one_subject_of_several_tokens():
    assert indices("a star and a blue square", subjects=["blue square"]) == [(5, 6)]


def test_a_word_of_several_tokens_is_one_subject():
    (found,) = indices("a red cat", subjects=["cat"])
    assert found == (3, 4, 5)


def test_a_word_is_not_found_inside_another():
    assert "is not in the prompt" in refusal("a scat", subjects=["cat"])


def test_a_word_named_twice_takes_its_occurrences_in_order():
    assert indices("a circle and a circle", subjects=["circle", "circle"]) == [(2,), (5,)]
    assert "only once" in refusal("a circle and a star", subjects=["circle", "circle"])


def test_a_missing_word_is_told_with_the_words_there_are():
    assert refusal("a red circle", subjects=["frog"]) == (
        "subject 'frog' is not in the prompt; its tokens are 1 'a', 2 'red', 3 'circle'"
    )


@pytest.mark.parametrize(
    ("subject", "meant"),
    [
        ("red cirlce", "'red circle'"),
        ("red circles", "'red circle'"),
        ("Stars", "'star'"),
        ("red circle, blue star", "'red circle' and 'blue star'? Put ; between subjects: 'red circle;blue star'"),
        ("red circle|blue star", "'red circle' and 'blue star'? Put ;"),
        ("red circle and blue star", "'red circle' and 'blue star'? Put ;"),
    ],
)  # fmt: skip
def test_a_word_that_is_nearly_there_is_suggested(subject, meant):
    said = refusal("a red circle and a blue star", subjects=[subject])
    assert said.startswith(f"subject '{subject}' is not in the prompt; did you mean {meant}")


def test_a_subject_that_was_cut_off_is_told_so():
    prompt = "a circle and " * 5 + "a star"
    assert "cut off" in refusal(prompt, subjects=["star"])
    assert "where the prompt is cut off" in refusal(prompt, token_indices=[15])


def test_token_indices_are_taken_as_they_are():
    assert indices("a red circle", token_indices=[3]) == [(3,)]
    assert indices("a red circle", token_indices=[[2, 3]]) == [(2, 3)]


@pytest.mark.parametrize(
    ("index", "what"),
    [
        (0, "the start token"),
        (4, "the end token"),
        (5, "padding"),
        (16, "outside"),
        (-1, "outside"),
    ],
)
def test_an_index_that_is_no_word_is_refused_by_name(index, what):
    assert f"token index {index} is {what}" in refusal("a red circle", token_indices=[index])


def test_subjects_and_indices_may_both_be_given_if_they_agree():
    assert indices("a circle", subjects=["circle"], token_indices=[2]) == [(2,)]
    assert "make them agree" in refusal("a circle", subjects=["circle"], token_indices=[1])


def test_an_empty_prompt_is_refused():
    with pytest.raises(PromptError, match="row r7: the prompt is empty"):
        indices("  ", token_indices=[1])


def test_the_token_table_shows_what_was_cut():
    table = token_table(TOKENIZER, "a circle and " * 5 + "a star")
    assert table.end == 15
    cut = [token.text for token in table.tokens if token.kind == "truncated"]
    assert cut == ["and", "a", "star"]
    assert [token.kind for token in table.tokens[:2]] == ["start", "word"]
    assert table.tokens[15].kind == "end"


@pytest.mark.parametrize(
    ("prompt", "subject", "modifiers", "head"),
    [
        ("a red circle and a star", "red circle", ["red"], "circle"),
        ("a red and blue circle", "red and blue circle", ["red", "blue"], "circle"),
        ("a circle with a star", "circle with a star", [], "circle"),
        ("the red circle", "the red circle", ["red"], "circle"),
        ("a star", "star", [], "star"),
        ("a and a star", "a and a", [], "a"),
        ("a T-shirt and a star", "T-shirt", [], "T shirt"),
        ("a red T-shirt and a star", "red T-shirt", ["red"], "T shirt"),
        ("the cat's star", "cat's", [], "cat s"),
        ("a red, blue circle", "red, blue circle", ["red", "blue"], "circle"),
    ],
)
def test_a_subject_has_a_noun_and_what_modifies_it(prompt, subject, modifiers, head):
    (found,) = resolve_subjects(TOKENIZER, Request(prompt, [subject]))
    table = token_table(TOKENIZER, prompt)
    assert [table.text(table.tokens[i] for i in one) for one in found.modifiers] == modifiers
    assert table.text(table.tokens[i] for i in found.head) == head


# --- T5, which has a token for the space before a word that it spells ---

T5 = (Stream(t5_tokenizer(), 32),)


def test_a_space_of_its_own_is_no_part_of_the_word_after_it():
    """Of "a frog and the cat", T5 has "a", " ", "f", "r", "o", "g", "and", " ", "t", "h", "e", " ", ..."""
    prompt = "a frog and the red cat"
    table = token_table(T5, prompt)
    assert [token.text for token in table.words[:5]] == ["a", "\u2581", "f", "r", "o"]
    request = Request(prompt, subjects=["a frog", "the red cat"])
    frog, cat = resolve_subjects(T5, request)
    assert (frog.tokens, frog.head, frog.modifiers) == (("a", *"frog"), (2, 3, 4, 5), ())
    assert (cat.tokens, cat.modifiers) == ((*"the", "red", *"cat"), ((11,),))
    assert cat.head == (13, 14, 15)


def test_a_position_that_is_a_space_belongs_to_no_subject():
    by_index = Request("a frog", token_indices=[[0, 1, 2, 3, 4, 5]])
    by_words = Request("a frog", subjects=["a frog"])
    assert resolve_subjects(T5, by_index) == resolve_subjects(T5, by_words)
    with pytest.raises(SubjectError, match="token index 1 is the space before a word"):
        resolve_subjects(T5, Request("a frog", token_indices=[1]))


def test_a_phrase_begins_at_the_space_before_it():
    """It is encoded alone with that space."""
    prompt = "the frog and the cat"
    for phrase in conjuncts(T5, prompt):
        (place,) = phrase.positions
        alone, whole = (token_tables(T5, text)[0] for text in (phrase.text, prompt))
        own = [token.text for token in alone.words]
        assert [token.text for token in whole.tokens[place.start : place.stop]] == own


@pytest.mark.parametrize("named", [{"subjects": ["\u732b"]}, {"token_indices": [2]}])
def test_a_subject_whose_letters_t5_does_not_know_is_refused(named):
    with pytest.raises(SubjectError, match=r"subject '\u732b' has only letters .* Latin letters"):
        resolve_subjects(T5, Request("a \u732b", **named))
    assert resolve_subjects(T5, Request("a \u732b-cat", subjects=["\u732b-cat"]))


def test_a_subject_whose_letters_t5_does_not_know_has_clips_tokens():
    both = (Stream(TOKENIZER, 16, 0, "CLIP"), Stream(T5[0].tokenizer, 32, 16, "T5"))
    (cat,) = resolve_subjects(both, Request("a \u732b", subjects=["\u732b"]))
    assert max(cat.token_indices) < 16


def test_subjects_that_share_a_token_are_refused():
    """T5 has one token for the two characters in the middle."""
    prompt, named = "a red\u732b\U0001f438blue", ["red\u732b", "\U0001f438blue"]
    with pytest.raises(
        SubjectError, match=r"'red\u732b' and '\U0001f438blue' share a token .* space"
    ):
        resolve_subjects(T5, Request(prompt, subjects=named))
    assert len(resolve_subjects(TOKENIZER, Request(prompt, subjects=named))) == 2


# --- embeddings of textual inversion ---


@pytest.fixture(scope="module")
def with_embeddings(tmp_path_factory):
    """A saved pipeline with an embedding of three vectors and one of one, and its tokenizer's stream."""
    pipe = small_pipeline()
    for token, vectors in {"<toy>": 3, "<one>": 1}.items():
        pipe.load_textual_inversion(torch.randn(vectors, TEXT_WIDTH), token=token)
    folder = tmp_path_factory.mktemp("toy")
    pipe.save_pretrained(folder)
    return pipe, load_streams(str(folder))


@pytest.mark.parametrize(
    "prompt",
    [
        "a <toy> and a red circle",
        "<toy><toy>, a <one> star",
        "a <toy>_1 star",
        "one <toy> two <toy> three <toy> four <toy> five <toy> six",
        "a red circle",
    ],
)
def test_an_embedding_has_the_positions_that_the_pipeline_gives_its_vectors(
    with_embeddings, prompt
):
    pipe, streams = with_embeddings
    encoded = pipe.tokenizer(pipe.maybe_convert_prompt(prompt, pipe.tokenizer)).input_ids
    assert streams[0].count(prompt) == len(encoded)
    table = token_table(streams, prompt)
    seen = [token.token for token in table.tokens if token.kind != "truncated"]
    assert seen[:-1] == pipe.tokenizer.convert_ids_to_tokens(encoded)[: len(seen) - 1]
    vectors = [token for token in table.words if token.token[0] == "<"]
    assert all(token.text in ("<toy>", "<one>", "<toy>_1") for token in vectors)


def test_a_subject_after_an_embedding_is_found_behind_all_its_vectors(with_embeddings):
    _, streams = with_embeddings
    prompt = "a <toy> and a red circle"
    for reads in (
        streams,
        Judge(streams, GuidanceConfig()).streams,
        network_of(with_embeddings[0]).streams,
    ):
        found = resolve_subjects(reads, Request(prompt, subjects=["red circle", "<toy>"]))
        assert [subject.token_indices for subject in found] == [(7, 8), (2, 3, 4)]


def test_a_prompt_that_its_embeddings_lengthen_is_cut_off(with_embeddings):
    judge = Judge(with_embeddings[1], GuidanceConfig())
    late = "<toy> <toy> <toy> <toy> and a circle"
    with pytest.raises(SubjectError, match="'circle' is cut off"):
        judge.resolve(Row(0, Request(late, subjects=("circle",))))
