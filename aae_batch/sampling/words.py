"""From words to tokens: find a subject's positions in the tokenizer's output."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

from aae_batch.errors import PromptError, RequestError, SubjectError, shown
from aae_batch.request import Request

TokenKind = Literal["start", "word", "end", "truncated"]

_HYPHENS = "-\u2010\u2011"
_IN_NUMBERS = ".,:/'\u2019\u00a0"
"""Characters that may stand between two digits of one number."""

CONJUNCTIONS = {"with": 1, ",": 1, "and": 2, "&": 2, "|": 3}
"""Where a prompt can be cut into conjuncts. Of several between two subjects, the strongest is
cut."""

# fmt: off
PREPOSITIONS = {
    "about", "above", "across", "against", "around", "at", "behind", "below", "beneath", "beside",
    "between", "by", "for", "from", "in", "inside", "into", "near", "next", "of", "on", "onto",
    "over", "through", "to", "under", "without",
}
DETERMINERS = {
    "a", "an", "the", "this", "that", "these", "those", "my", "your", "his", "her", "its", "our",
    "their", "some", "several", "many", "two", "three", "four", "five", "six", "seven", "eight",
    "nine", "ten",
}
# fmt: on

_BETWEEN_WORDS = {*CONJUNCTIONS, *PREPOSITIONS, *DETERMINERS}

KNOWN_WORDS = "known_words"
"""Key in a tokenizer's configuration: the only words that its model was trained on."""


class Tokenizer(Protocol):
    """The part of transformers' CLIP tokenizer used here."""

    model_max_length: int
    init_kwargs: dict[str, Any]

    def __call__(self, text: str, **kwargs): ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...


@dataclass(frozen=True)
class Token:
    """One position of the text encoder's input.

    Attributes:
        index: the position; 0 is the start token.
        token: its spelling in the vocabulary, e.g. `"frog</w>"`.
        kind: `"truncated"` tokens are beyond what the text encoder sees.
        text: its part of the prompt. If several tokens spell one character, as may be for "猫", each
            has the whole character.
        start, stop: that part's character offsets in the prompt.
    """

    index: int
    token: str
    kind: TokenKind
    text: str
    start: int
    stop: int

    @property
    def ends_word(self) -> bool:
        return self.token.endswith("</w>")


@dataclass(frozen=True)
class Subject:
    """Something that the image must show.

    Attributes:
        name: its words.
        token_indices: the positions of its tokens.
        tokens: each token's text.
        head: the positions of its noun: "bird" in "a red and blue bird with a hat".
        modifiers: the positions of each word that modifies the noun: "red", "blue".
    """

    name: str
    token_indices: tuple[int, ...]
    tokens: tuple[str, ...]
    head: tuple[int, ...]
    modifiers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TokenTable:
    """A tokenized prompt, as the text encoder receives it.

    Attributes:
        prompt: the text.
        tokens: all tokens from the start token to the end token, then the truncated ones.
        end: the position of the end token; padding follows it.
        length: the number of positions, e.g. 77.
    """

    prompt: str
    tokens: tuple[Token, ...]
    end: int
    length: int

    def text(self, tokens: Iterable[Token]) -> str:
        """Return the prompt's text at `tokens`, with a space wherever tokens are skipped."""
        spans: list[tuple[int, int, int]] = []  # index of the last token, start, stop
        for token in tokens:
            if spans and spans[-1][0] + 1 == token.index:
                spans[-1] = (token.index, spans[-1][1], token.stop)
            else:
                spans.append((token.index, token.start, token.stop))
        return " ".join(self.prompt[start:stop] for _, start, stop in spans)

    @property
    def words(self) -> list[Token]:
        """The tokens that can belong to a subject."""
        return [token for token in self.tokens if token.kind == "word"]

    @property
    def spoken(self) -> list[Token]:
        """The tokens of the whole prompt, including truncated ones."""
        return [token for token in self.tokens if token.kind in ("word", "truncated")]

    def __str__(self) -> str:
        return ", ".join(f"{token.index} {token.text!r}" for token in self.words)


def token_table(tokenizer: Tokenizer, prompt: str) -> TokenTable:
    """Tokenize `prompt` as the pipeline does, but keep truncated tokens."""
    encoded = tokenizer(prompt, verbose=False, return_offsets_mapping=True)
    names = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    pieces = [
        (name, start, _after_marks(prompt, stop))
        for name, (start, stop) in zip(names, encoded.offset_mapping, strict=True)
    ]
    end = min(len(pieces), tokenizer.model_max_length) - 1
    if end < len(pieces) - 1:  # the end token replaces the first truncated word
        pieces = [*pieces[:end], pieces[-1], *pieces[end:-1]]

    words: list[TokenKind] = ["word"] * (end - 1)
    cut: list[TokenKind] = ["truncated"] * (len(pieces) - 1 - end)
    kinds: list[TokenKind] = ["start", *words, "end", *cut]
    tokens = tuple(
        Token(i, name, kind, prompt[start:stop] or name, start, stop)
        for i, (kind, (name, start, stop)) in enumerate(zip(kinds, pieces, strict=True))
    )
    return TokenTable(prompt, tokens, end, tokenizer.model_max_length)


def why_unknown(tokenizer: Tokenizer, text: str) -> str | None:
    """Return what is wrong with a text that has words unknown to the model, else None.

    Only small models such as the embedded one list the words they know (`KNOWN_WORDS`); with other
    words they would draw something else.
    """
    known = tokenizer.init_kwargs.get(KNOWN_WORDS)
    if not known:
        return None
    words = dict.fromkeys(re.findall(r"\w+|[^\w\s\x00-\x7f]+", text.lower()))
    unknown = [word for word in words if word not in known]
    if not unknown:
        return None
    return (
        f"has words that this model does not know: {', '.join(map(shown, unknown[:5]))}"
        f"{', ...' if len(unknown) > 5 else ''}; it knows only {', '.join(known)}, "
        "so use these, or a model for all words (--model)"
    )


def _after_marks(prompt: str, stop: int) -> int:
    """Move `stop` past combining marks of the letter before it, which the tokenizer's offsets
    leave out."""
    while 0 < stop < len(prompt) and _is_mark(prompt[stop]):
        stop += 1
    return stop


def resolve_subjects(tokenizer: Tokenizer, request: Request) -> tuple[Subject, ...]:
    """Return the subjects of `request` with their token positions; empty if it names none.

    Raises:
        PromptError: the prompt is empty, or has words that the model does not know.
        RequestError: the negative prompt has such words.
        SubjectError: a subject is not in the prompt, or an index does not point at a word.
    """
    row, prompt = request.name, request.prompt
    if not prompt.strip():
        raise PromptError(row, "the prompt is empty; write what the image shows")
    if unknown := why_unknown(tokenizer, prompt):
        raise PromptError(row, f"the prompt {unknown}")
    if request.negative_prompt and (unknown := why_unknown(tokenizer, request.negative_prompt)):
        raise RequestError(row, f"negative_prompt {unknown}")
    table = token_table(tokenizer, prompt)
    by_words = by_index = None
    if request.subjects is not None:
        by_words = _find_phrases(tokenizer, table, row, request.subjects)
    if request.token_indices is not None:
        by_index = tuple(_at(table, row, entry) for entry in request.token_indices)
    if by_words is not None and by_index is not None:
        words, index = (sorted(s.token_indices for s in found) for found in (by_words, by_index))
        if words != index:
            raise SubjectError(
                row,
                f"subjects stand at {words} but token_indices say {index}; give one of the two, "
                "or make them agree",
            )
    return by_words or by_index or ()


def _find_phrases(
    tokenizer: Tokenizer, table: TokenTable, row: str, phrases: Sequence[str]
) -> tuple[Subject, ...]:
    """Give each phrase an occurrence of its own.

    Longer phrases choose first, so that "cat" does not take the one in "red cat"; among equally
    long ones, those with the fewest occurrences choose first.
    """
    wanted = [_spelling(tokenizer, row, phrase) for phrase in phrases]
    places = [_occurrences(table, spelling) for spelling in wanted]
    free = [True] * len(table.tokens)
    found: dict[int, list[Token]] = {}
    for i in sorted(range(len(phrases)), key=lambda i: (-len(wanted[i]), len(places[i]))):
        place = next((p for p in places[i] if all(free[token.index] for token in p)), None)
        if place is None:
            raise SubjectError(row, _why_missing(table, phrases, i, wanted, len(places[i])))
        if place[-1].index >= table.end:
            raise SubjectError(
                row,
                f"subject {shown(phrases[i])} is cut off: the text encoder sees only the first "
                f"{table.end - 1} tokens of the prompt; shorten it or move the subject forward",
            )
        found[i] = place
        for token in place:
            free[token.index] = False
    return tuple(_subject(phrase, found[i]) for i, phrase in enumerate(phrases))


def _subject(name: str, tokens: Sequence[Token]) -> Subject:
    indices = tuple(token.index for token in tokens)
    words = _without_gaps(tokens)
    found = noun_phrase(["".join(token.text for token in word) for word in words])
    *modifiers, head = (_spoken(words[i]) for i in found)
    return Subject(name, indices, tuple(token.text for token in tokens), head, tuple(modifiers))


def _without_gaps(tokens: Sequence[Token]) -> list[Sequence[Token]]:
    """Group tokens that a reader sees as one word, as in "T-shirt" and "cat's", which the tokenizer
    takes apart."""
    gaps = [i for i in range(1, len(tokens)) if tokens[i].start != tokens[i - 1].stop]
    return [tokens[start:stop] for start, stop in pairwise([0, *gaps, len(tokens)])]


def _spoken(word: Sequence[Token]) -> tuple[int, ...]:
    """Return the positions of a word's tokens, without punctuation unless that is all."""
    spoken = [token.index for token in word if any(map(str.isalnum, token.text))]
    return tuple(spoken or [token.index for token in word])


def noun_phrase(words: Sequence[str]) -> list[int]:
    """Return the indices of a subject's modifiers, followed by that of its noun.

    These are the words before the first preposition, without determiners, conjunctions and
    punctuation; if none remain, the last word.
    """
    found: list[int] = []
    for i, word in enumerate(words):
        if found and (word.lower() in PREPOSITIONS or word.lower() == "with"):
            break
        if word.lower() not in _BETWEEN_WORDS and any(map(str.isalnum, word)):
            found.append(i)
    return found or [len(words) - 1]


def _spelling(tokenizer: Tokenizer, row: str, phrase: str) -> tuple[str, ...]:
    """Return the tokens of `phrase`."""
    ids = tokenizer(phrase, add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise SubjectError(
            row, f"subject {shown(phrase)} has no words; remove it or name something"
        )
    return tuple(tokenizer.convert_ids_to_tokens(ids))


def _occurrences(
    table: TokenTable, wanted: tuple[str, ...], alone: bool = True
) -> list[list[Token]]:
    """Return the occurrences of `wanted` in the whole prompt, in order.

    Args:
        alone: skip occurrences inside a longer word, compound or number.
    """
    tokens, length = table.spoken, len(wanted)
    names = tuple(token.token for token in tokens)
    starts = (i for i in range(len(names) - length + 1) if names[i : i + length] == wanted)
    places = [tokens[i : i + length] for i in starts]
    return [place for place in places if not alone or _stands_alone(table.prompt, place)]


def _stands_alone(prompt: str, place: Sequence[Token]) -> bool:
    """True if the tokens at `place` are whole words to a reader.

    The tokenizer cannot tell: it splits "10 dogs" before the 0, and "cat_dog" at the underscore.
    """
    start, stop = place[0].start, place[-1].stop
    before, after = prompt[max(0, start - 2) : start][::-1], prompt[stop : stop + 2]
    return not (_joined(prompt[start], before) or _joined(prompt[stop - 1], after))


def _joined(edge: str, outside: str) -> bool:
    """True if a subject's first or last letter belongs to one word with the text outside it, as in
    "cat_dog", "cat-like", "1,000" and "1/2". `outside` is read away from the subject."""
    if not (outside and _in_word(edge)):
        return False
    next_to, beyond = outside[0], outside[1:]
    if next_to in _HYPHENS and _in_word(beyond):
        return True
    if next_to in _IN_NUMBERS and beyond.isdigit() and edge.isdigit():
        return True
    return _in_word(next_to)


def _in_word(character: str) -> bool:
    """True for letters, digits, underscores, and combining marks."""
    return bool(character) and (character.isalnum() or character == "_" or _is_mark(character))


def _is_mark(character: str) -> bool:
    """True for characters that combine with the letter before them: accents, and the vowels and
    final consonants of a Korean syllable written in parts."""
    return unicodedata.category(character).startswith("M") or "\u1160" <= character <= "\u11ff"


def _why_missing(
    table: TokenTable, phrases: Sequence[str], i: int, wanted: Sequence[tuple[str, ...]], found: int
) -> str:
    """Explain why phrase `i`, which occurs `found` times, has no occurrence of its own."""
    phrase = shown(phrases[i])
    times = "once" if found == 1 else f"{found} times"
    if 0 < found < wanted.count(wanted[i]):
        return f"subject {phrase} is in the prompt only {times}; name it as often as it occurs"
    if found:
        return (
            f"subject {phrase} has no place left in the prompt, where it stands {times}: each "
            "occurrence belongs to one subject, the longest first, so name one subject less there, "
            "or give token_indices"
        )
    if within := _occurrences(table, wanted[i], alone=False):
        return (
            f"subject {phrase} is not in the prompt as a word of its own, only inside "
            f"{shown(_around(table.prompt, within[0]))}; name that, or give token_indices"
        )
    return f"subject {phrase} is not in the prompt; its tokens are {table}"


def _around(prompt: str, place: Sequence[Token]) -> str:
    """Return the text at `place`, extended to whole words."""
    start, stop = place[0].start, place[-1].stop
    before, after = re.split(r"\s", prompt[:start])[-1], re.split(r"\s", prompt[stop:])[0]
    return f"{before}{prompt[start:stop]}{after}".strip(".,;:!?")


def _at(table: TokenTable, row: str, entry: int | Sequence[int]) -> Subject:
    """Return the subject given by an entry of `token_indices`."""
    indices = (entry,) if isinstance(entry, int) else tuple(entry)
    if not indices:
        raise SubjectError(row, "token_indices has an empty subject; remove it")
    for index in indices:
        _check_index(table, row, index)
    tokens = [table.tokens[index] for index in indices]
    return _subject(table.text(tokens), tokens)


def _check_index(table: TokenTable, row: str, index: int) -> None:
    if 0 < index < table.end:
        return
    if index < 0 or index >= table.length:
        what = f"outside the {table.length} positions of the text encoder"
    elif index == 0:
        what = "the start token"
    elif index == table.end:
        cut = any(token.kind == "truncated" for token in table.tokens)
        what = "the end token" + (", where the prompt is cut off" if cut else "")
    else:
        what = "padding"
    raise SubjectError(row, f"token index {index} is {what}; the prompt's tokens are {table}")
