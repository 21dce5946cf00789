"""From a prompt to the phrases that a method encodes by themselves: conjuncts, and noun phrases.

There is no parser here: English prompts are cut at conjunctions, prepositions and determiners, and
the subjects that a row names say which cuts matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from aae_batch.sampling.words import (
    CONJUNCTIONS,
    DETERMINERS,
    PREPOSITIONS,
    Subject,
    Token,
    Tokenizer,
    TokenTable,
    split_words,
    token_table,
)

COORDINATORS = ("and", "&", ",")
"""They also join adjectives: "a red and blue bird", "a large, fluffy cat"."""

_BREAKS = {*CONJUNCTIONS, *PREPOSITIONS, *DETERMINERS}


@dataclass(frozen=True)
class Phrase:
    """A part of a prompt.

    Attributes:
        text: its words, as the prompt has them.
        positions: of its tokens in the prompt, as far as the text encoder sees them there. Encoded by
            itself, the phrase has these tokens at 1, 2, ...
    """

    text: str
    positions: range


@dataclass(frozen=True)
class _Word:
    """A whole word, in lower case, with its tokens."""

    text: str
    tokens: tuple[Token, ...]

    @property
    def start(self) -> int:
        return self.tokens[0].index


def conjuncts(
    tokenizer: Tokenizer, prompt: str, subjects: Sequence[Subject] = ()
) -> tuple[Phrase, ...]:
    """The conjuncts of "a cat and a dog": "a cat" and "a dog". Together they hold every subject.

    With subjects, the prompt is cut once between any two that follow each other with a conjunction
    ("and", "&", "with", ",", "|") between them, so that "a red and blue bird and a cat" is cut
    before the cat only: of several alike at the last that a determiner follows, else at the first. What
    joins adjectives of one subject is no place to cut ("a cat on a red and blue bench").
    Without subjects it is cut at every "and". A prompt with "|", the authors' notation, is cut at
    each of these and nowhere else.

    Returns:
        At least one phrase. A prompt that is not cut is the only one, all of it.
    """
    table = token_table(tokenizer, prompt)
    words = _words(table)
    barred = any(word.text == "|" for word in words)
    cuts = _between(words, subjects) if subjects and not barred else _everywhere(words)
    edges = [-1, *sorted(cuts), len(words)]
    pieces = [_trimmed(words[start + 1 : stop]) for start, stop in pairwise(edges)]
    pieces = [piece for piece in pieces if piece]
    if len(pieces) < 2:
        return (Phrase(prompt, range(1, table.end)),)
    return tuple(_phrase(table, piece) for piece in pieces)


def noun_phrases(
    tokenizer: Tokenizer, prompt: str, subjects: Sequence[Subject] = ()
) -> tuple[Phrase, ...]:
    """The noun phrases of "a red frog on a bench": "a red frog" and "a bench".

    A phrase begins at a determiner or after a conjunction or preposition. With subjects only the
    phrases that hold one count, each up to its last subject: "a cat sitting on a bench" with the
    subject "cat" has "a cat"; and an "and" or a comma between a subject's adjectives belongs to the
    phrase, as in "a red and blue bird". Without, all of them count, and each of these begins one: "a
    large, fluffy cat" cannot be told from "a cat, digital art".
    """
    table = token_table(tokenizer, prompt)
    named = {index for subject in subjects for index in subject.token_indices}
    phrases = []
    for piece in _chunks(_words(table), named):
        if subjects:
            held = [i for i, word in enumerate(piece) if _is_named(word, named)]
            piece = piece[: held[-1] + 1] if held else []
        if piece and piece[0].start < table.end:
            phrases.append(_phrase(table, piece))
    return tuple(phrases)


def _words(table: TokenTable) -> list[_Word]:
    return [_Word(table.text(word).lower(), tuple(word)) for word in split_words(table.spoken)]


def _between(words: list[_Word], subjects: Sequence[Subject]) -> set[int]:
    """The words at which to cut so that subjects part, at most one between two of them."""
    spans = sorted((min(s.token_indices), max(s.token_indices)) for s in subjects)
    named = {index for s in subjects for index in s.token_indices}
    joined = _joining(words, named, after_determiner=True)
    cuts = set()
    reached = spans[0][1]
    for first, last in spans[1:]:
        found = [
            (CONJUNCTIONS[word.text], *((1, i) if _is_determined(words, i + 1) else (0, -i)))
            for i, word in enumerate(words)
            if reached < word.start < first and word.text in CONJUNCTIONS and i not in joined
        ]
        if found:
            cuts.add(abs(max(found)[-1]))
        reached = max(reached, last)
    return cuts


def _is_determined(words: list[_Word], i: int) -> bool:
    return i < len(words) and words[i].text in DETERMINERS


def _everywhere(words: list[_Word]) -> set[int]:
    """The words at which to cut where no subject says which: no "with", and no comma."""
    strength = {i: CONJUNCTIONS.get(word.text, 0) for i, word in enumerate(words)}
    strongest = max([CONJUNCTIONS["and"], *strength.values()])
    return {i for i, value in strength.items() if value == strongest}


def _trimmed(piece: list[_Word]) -> list[_Word]:
    """Without conjunctions at its ends, such as the comma before an "and"."""
    while piece and piece[0].text in CONJUNCTIONS:
        piece = piece[1:]
    while piece and piece[-1].text in CONJUNCTIONS:
        piece = piece[:-1]
    return piece


def _is_named(word: _Word, named: set[int]) -> bool:
    return any(token.index in named for token in word.tokens)


def _joining(words: list[_Word], named: set[int], after_determiner: bool = False) -> set[int]:
    """The words that join adjectives of one subject: "and" in "a red and blue bench", where "bench" is
    named. Before them a phrase has begun and named nothing, and after them comes neither a determiner nor
    the end of a subject ("a cat on a mat and dogs"). None where nothing is named.

    Args:
        after_determiner: only in phrases that a determiner began. A comma joins in these alone: "a large,
            fluffy cat", and not "digital art, fluffy cat".
    """
    joining: set[int] = set()
    determined = begun = holds_subject = False
    for i, word in enumerate(words if named else []):
        if _is_named(word, named):
            if word.text in COORDINATORS:  # a subject such as "salt and pepper"
                joining.add(i)
            holds_subject = True
        elif (
            word.text in COORDINATORS
            and begun
            and not holds_subject
            and (determined or not (after_determiner or word.text == ","))
            and not _is_determined(words, i + 1)
            and words[i + 1 :]
            and not _ends_subject(words[i + 1 :], named)
        ):
            joining.add(i)
        elif word.text in _BREAKS:
            determined, begun, holds_subject = word.text in DETERMINERS, False, False
        else:
            begun = True
    return joining


def _ends_subject(rest: list[_Word], named: set[int]) -> bool:
    """Whether the first word is the last of a subject."""
    return _is_named(rest[0], named) and not (len(rest) > 1 and _is_named(rest[1], named))


def _chunks(words: list[_Word], named: set[int]) -> list[list[_Word]]:
    chunks: list[list[_Word]] = [[]]
    joining = _joining(words, named)
    for i, word in enumerate(words):
        if i in joining or word.text not in _BREAKS:
            chunks[-1].append(word)
        else:
            chunks.append([word] if word.text in DETERMINERS else [])
    return [chunk for chunk in chunks if chunk]


def _phrase(table: TokenTable, words: list[_Word]) -> Phrase:
    first, last = words[0].tokens[0], words[-1].tokens[-1]
    positions = range(min(first.index, table.end), min(last.index + 1, table.end))
    return Phrase(table.prompt[first.start : last.stop], positions)
