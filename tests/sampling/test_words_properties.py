"""Positions in CLIP's byte-level BPE, for any text: where a word stands is where its tokens are."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from aae_batch import Request
from aae_batch.sampling.words import resolve_subjects, token_table
from tests.clip_vocabulary import clip_tokenizer

WORDS = st.text("abcdefghijklmnopqrstuvwxyzéßñ猫🐸0123456789-'", min_size=1, max_size=9)
LETTERS = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=9)


@given(words=st.lists(WORDS, min_size=1, max_size=30))
def test_tokens_cover_the_prompt_from_left_to_right(words):
    prompt = " ".join(words)
    table = token_table(clip_tokenizer(), prompt)
    assert [token.index for token in table.tokens] == list(range(len(table.tokens)))
    assert [token.kind for token in table.tokens].count("end") == 1
    spelt = [token for token in table.tokens if token.kind in ("word", "truncated")]
    seen: set[int] = set()
    for before, token in zip([None, *spelt], spelt, strict=False):
        assert before is None or before.start <= token.start
        assert prompt[token.start : token.stop] == token.text
        seen.update(range(token.start, token.stop))
    assert {i for i, letter in enumerate(prompt) if not letter.isspace()} <= seen


@given(
    words=st.lists(LETTERS, min_size=1, max_size=12, unique=True),
    data=st.data(),
)
def test_a_word_is_found_at_the_tokens_that_spell_it(words, data):
    """Whatever its neighbours: each word's ids in the prompt are those that it has alone."""
    tokenizer = clip_tokenizer()
    prompt = " ".join(words)
    word = data.draw(st.sampled_from(words))
    ids = tokenizer(prompt).input_ids
    assume(len(ids) <= tokenizer.model_max_length)
    (subject,) = resolve_subjects(tokenizer, Request(prompt, subjects=[word]))
    alone = tokenizer(word).input_ids[1:-1]
    assert [ids[index] for index in subject.token_indices] == alone
    assert "".join(subject.tokens) == word


@given(words=st.lists(LETTERS, min_size=2, max_size=8, unique=True), data=st.data())
def test_no_two_subjects_share_a_token(words, data):
    prompt = " ".join(words)
    split = data.draw(st.integers(1, len(words) - 1))
    phrases = [" ".join(words[:split]), " ".join(words[split:])]
    first, second = resolve_subjects(clip_tokenizer(), Request(prompt, subjects=phrases))
    assert not set(first.token_indices) & set(second.token_indices)
    assert [first.name, second.name] == phrases
