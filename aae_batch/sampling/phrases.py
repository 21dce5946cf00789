"""Split a prompt into the phrases that a method encodes separately: conjuncts or noun phrases.

There is no parser: English prompts are cut at conjunctions, prepositions and determiners, and the
subjects that a row names determine which cuts matter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from aae_batch.sampling.words import (
    CONJUNCTIONS,
    DETERMINERS,
    PREPOSITIONS,
    Reads,
    Subject,
    TokenTable,
    token_tables,
)

COORDINATORS = ("and", "&", ",")
"""Words that also join adjectives: "a red and blue bird", "a large, fluffy cat"."""

_BREAKS = {*CONJUNCTIONS, *PREPOSITIONS, *DETERMINERS}


@dataclass(frozen=True)
class Phrase:
    """A part of a prompt.

    Attributes:
        text: its words, as in the prompt.
        positions: per stream, its tokens' positions in the prompt, without truncated ones. If the
            phrase is encoded alone, these tokens are the first of each stream.
    """

    text: str
    positions: tuple[range, ...]


@dataclass(frozen=True)
class _Word:
    """A whole word in lower case: its character offsets, and the positions of its tokens."""

    text: str
    start: int
    stop: int
    indices: frozenset[int]


def conjuncts(reads: Reads, prompt: str, subjects: Sequence[Subject] = ()) -> tuple[Phrase, ...]:
    """Return the conjuncts of a prompt: "a cat" and "a dog" for "a cat and a dog".

    With subjects, the prompt is cut once between any two consecutive ones that have a conjunction
    ("and", "&", "with", ",", "|") between them, so that "a red and blue bird and a cat" is cut only
    before the cat. Of several equally strong conjunctions, the cut is at the last one followed by a
    determiner, else at the first. Conjunctions that join one subject's adjectives are not cut ("a
    cat on a red and blue bench"). Without subjects the prompt is cut at every "and". A prompt with
    "|", the authors' notation, is cut at each "|" and nowhere else.

    Returns:
        At least one phrase, which together contain every subject. A prompt that is not cut is
        returned whole.
    """
    tables = token_tables(reads, prompt)
    words = _words(tables)
    barred = any(word.text == "|" for word in words)
    cuts = _between(words, subjects) if subjects and not barred else _everywhere(words)
    edges = [-1, *sorted(cuts), len(words)]
    pieces = [_trimmed(words[start + 1 : stop]) for start, stop in pairwise(edges)]
    pieces = [piece for piece in pieces if piece]
    if len(pieces) < 2:
        return (whole(tables),)
    return tuple(_phrase(tables, piece) for piece in pieces)


def noun_phrases(reads: Reads, prompt: str, subjects: Sequence[Subject] = ()) -> tuple[Phrase, ...]:
    """Return the noun phrases of a prompt: "a red frog" and "a bench" for "a red frog on a bench".

    A phrase begins at a determiner or after a conjunction or preposition. With subjects, only
    phrases that contain one count, each up to its last subject: "a cat sitting on a bench" with the
    subject "cat" has "a cat". An "and" or a comma between a subject's adjectives belongs to the
    phrase, as in "a red and blue bird". Without subjects, all phrases count, and every "and" or
    comma begins a new
    one: "a large, fluffy cat" cannot be told from "a cat, digital art".
    """
    tables = token_tables(reads, prompt)
    named = {index for subject in subjects for index in subject.token_indices}
    phrases = []
    for piece in _chunks(_words(tables), named):
        if subjects:
            held = [i for i, word in enumerate(piece) if _is_named(word, named)]
            piece = piece[: held[-1] + 1] if held else []
        if piece and any(_sees(table, piece[0]) for table in tables):
            phrases.append(_phrase(tables, piece))
    return tuple(phrases)


def whole(tables: Sequence[TokenTable]) -> Phrase:
    """Return the whole prompt as one phrase."""
    return Phrase(tables[0].prompt, tuple(range(table.first, table.end) for table in tables))


def _words(tables: Sequence[TokenTable]) -> list[_Word]:
    prompt, words = tables[0].prompt, []
    for found in re.finditer(r"\w+|[^\w\s]+", prompt):
        start, stop = found.span()
        indices = {token.index for table in tables for token in table.between(start, stop)}
        words.append(_Word(found[0].lower(), start, stop, frozenset(indices)))
    return words


def _sees(table: TokenTable, word: _Word) -> bool:
    return any(table.first <= index < table.end for index in word.indices)


def _between(words: list[_Word], subjects: Sequence[Subject]) -> set[int]:
    """Return the indices of the words to cut at to separate the subjects: at most one between
    two."""
    held = [[w for w in words if w.indices & set(s.token_indices)] for s in subjects]
    spans = sorted((some[0].start, some[-1].start) for some in held if some)
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
    """Return the indices of the words to cut at without subjects: never at "with" or commas."""
    strength = {i: CONJUNCTIONS.get(word.text, 0) for i, word in enumerate(words)}
    strongest = max([CONJUNCTIONS["and"], *strength.values()])
    return {i for i, value in strength.items() if value == strongest}


def _trimmed(piece: list[_Word]) -> list[_Word]:
    """Remove conjunctions at both ends, such as the comma before an "and"."""
    while piece and piece[0].text in CONJUNCTIONS:
        piece = piece[1:]
    while piece and piece[-1].text in CONJUNCTIONS:
        piece = piece[:-1]
    return piece


def _is_named(word: _Word, named: set[int]) -> bool:
    return not word.indices.isdisjoint(named)


def _joining(words: list[_Word], named: set[int], after_determiner: bool = False) -> set[int]:
    """Return the indices of the words that join adjectives of one subject: "and" in "a red and blue
    bench" if "bench" is named.

    A joining word follows words of a phrase that has named nothing yet, and precedes neither a
    determiner nor the end of a subject ("a cat on a mat and dogs"). If nothing is named, there are
    none.

    Args:
        after_determiner: only in phrases that a determiner began. A comma joins only in these: "a
            large, fluffy cat", but not "digital art, fluffy cat".
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
    """True if the first word is the last of a subject."""
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


def _phrase(tables: Sequence[TokenTable], words: list[_Word]) -> Phrase:
    start, stop = words[0].start, words[-1].stop
    positions = []
    for table in tables:
        indices = [token.index for token in table.spanning(start, stop)] or [table.end]
        positions.append(range(min(indices[0], table.end), min(indices[-1] + 1, table.end)))
    return Phrase(tables[0].prompt[start:stop], tuple(positions))
