"""From words to tokens: find a subject's positions in the text that a network attends to.

A network may read a prompt by several tokenizers: Stable Diffusion 3 attends to CLIP's tokens and
then to T5's. Each is a `Stream`. Subjects are found in the prompt by their letters, and their tokens
in every stream by character offsets.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal, Protocol

from aae_batch.errors import PromptError, RequestError, SubjectError, shown
from aae_batch.request import Request

TokenKind = Literal["start", "word", "end", "truncated"]

_HYPHENS = "-\u2010\u2011"
_IN_NUMBERS = ".,:/'\u2019\u00a0"
"""Characters that may stand between two digits of one number."""

_SPACE = "\u2581"
"""SentencePiece's piece of a word's first space, where the vocabulary has none for space and letter."""

_UNKNOWN = "<unk>"
"""T5's token for any letters that its vocabulary lacks, however many."""

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

_PLAIN = re.compile(r"[a-z]+(?: [a-z]+)*")
_SEPARATORS = re.compile(r"\s*[,|/&+\n]\s*|\s+and\s+")
"""What people write between subjects. Between subjects in text stands `;`."""

KNOWN_WORDS = "known_words"
"""Key in a tokenizer's configuration: the only words that its model was trained on."""


class Tokenizer(Protocol):
    """The part of transformers' fast tokenizers used here."""

    model_max_length: int
    init_kwargs: dict[str, Any]

    def __call__(self, text: str, **kwargs): ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...


@dataclass(frozen=True)
class Stream:
    """The tokens of one tokenizer, as a part of the text that a network attends to.

    Attributes:
        tokenizer: its tokenizer.
        length: its number of positions, e.g. 77.
        offset: the position in the whole text at which it begins.
        name: what reports call it; empty if it is the only one.
        embeddings: tokens added by textual inversion, and what the pipeline writes for each before it
            encodes a prompt: `<toy>` stands for `<toy> <toy>_1` if it has two vectors.
    """

    tokenizer: Tokenizer
    length: int
    offset: int = 0
    name: str = ""
    embeddings: Mapping[str, str] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """Position in the whole text of a prompt's first token: CLIP has a start token before it,
        T5 has none."""
        return self.offset + len(self.tokenizer("").input_ids) - 1

    def written(self, prompt: str) -> str:
        """Return the text that the pipeline encodes for a prompt: with every vector of its embeddings."""
        return _written(self, prompt)[0] if self.embeddings else prompt

    def count(self, prompt: str) -> int:
        """Return how many positions a prompt would take, with start and end."""
        return len(self.tokenizer(self.written(prompt)).input_ids)


Reads = Tokenizer | Sequence[Stream]
"""How a network reads a prompt; a tokenizer alone is its only stream."""


def streams_of(reads: Reads) -> Sequence[Stream]:
    """Return the streams of a network that reads prompts in this way."""
    if isinstance(reads, Sequence):
        return reads
    return (Stream(reads, reads.model_max_length),)


def embeddings_of(tokenizer: Any) -> dict[str, str]:
    """Return the embeddings that a tokenizer of transformers was given by textual inversion, as diffusers
    names them (`TextualInversionLoaderMixin`); see `Stream.embeddings`."""
    added = {str(one) for one in tokenizer.added_tokens_decoder.values() if not one.special}
    found = {}
    for token in added:
        vectors = [token]
        while (vector := f"{token}_{len(vectors)}") in added:
            vectors.append(vector)
        found[token] = " ".join(vectors)
    return found


def _written(stream: Stream, prompt: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text that the pipeline encodes for a prompt, and for each of its characters the start
    and stop of what it stands for in the prompt."""
    text, spans = prompt, [(i, i + 1) for i in range(len(prompt))]
    for token, vectors in stream.embeddings.items():
        is_there = re.search(rf"{re.escape(token)}(?!_\d)", text)
        if token == vectors or not is_there:
            continue
        before, *after = text.split(token)
        written, at = spans[: len(before)], len(before)
        for part in after:
            stop = at + len(token)
            written += [(spans[at][0], spans[stop - 1][1])] * len(vectors)
            written += spans[stop : stop + len(part)]
            at = stop + len(part)
        text, spans = vectors.join([before, *after]), written
    return text, spans


@dataclass(frozen=True)
class Token:
    """One position of the text that a network attends to.

    Attributes:
        index: the position; 0 is the start token, if there is one.
        token: its spelling in the vocabulary, e.g. `"frog</w>"`.
        kind: `"truncated"` tokens are beyond what the text encoder sees.
        text: its part of the prompt, which a space before a word has not. If several tokens spell one character, as may be for "猫", each
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
    def is_unknown(self) -> bool:
        """True if it stands for letters that the vocabulary lacks."""
        return self.token == _UNKNOWN


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
    """A prompt tokenized by one stream, as its text encoder receives it.

    Attributes:
        prompt: the text.
        tokens: all tokens from the first to the end token, then the truncated ones.
        first: the position of the prompt's first token.
        end: the position of the end token; padding follows it.
        stop: the position after the last.
        name: the stream's name.
    """

    prompt: str
    tokens: tuple[Token, ...]
    first: int
    end: int
    stop: int
    name: str = ""

    @property
    def is_cut(self) -> bool:
        return self.tokens[-1].kind == "truncated"

    def between(self, start: int, stop: int) -> list[Token]:
        """Return the prompt's tokens, including truncated ones, that have a character in [start,
        stop)."""
        return [token for token in self.spanning(start, stop) if token.start < token.stop]

    def spanning(self, start: int, stop: int) -> list[Token]:
        """Return the same, and the spaces that are tokens before their words."""
        return [
            token
            for token in self.spoken
            if token.start < stop and max(token.stop, token.start + 1) > start
        ]

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


def token_table(reads: Reads, prompt: str) -> TokenTable:
    """Tokenize `prompt` by the first stream."""
    return token_tables(reads, prompt)[0]


def token_tables(reads: Reads, prompt: str) -> list[TokenTable]:
    """Tokenize `prompt` by every stream as the pipeline does, but keep truncated tokens."""
    return [_table(stream, prompt) for stream in streams_of(reads)]


def _table(stream: Stream, prompt: str) -> TokenTable:
    text, spans = _written(stream, prompt)
    encoded = stream.tokenizer(text, verbose=False, return_offsets_mapping=True)
    names = stream.tokenizer.convert_ids_to_tokens(encoded.input_ids)
    starts_at = [start for start, _ in spans] + [len(prompt)]
    pieces = [
        (name, starts_at[start], spans[stop - 1][1] if start < stop else starts_at[start])
        for name, start, stop in (
            (name, *_span(text, name, *offsets))
            for name, offsets in zip(names, encoded.offset_mapping, strict=True)
        )
    ]
    first = stream.first - stream.offset
    end = min(len(pieces), stream.length) - 1
    if end < len(pieces) - 1:  # the end token replaces the first truncated word
        pieces = [*pieces[:end], pieces[-1], *pieces[end:-1]]

    starts: list[TokenKind] = ["start"] * first
    words: list[TokenKind] = ["word"] * (end - first)
    cut: list[TokenKind] = ["truncated"] * (len(pieces) - 1 - end)
    kinds: list[TokenKind] = [*starts, *words, "end", *cut]
    tokens = tuple(
        Token(stream.offset + i, name, kind, prompt[start:stop] or name, start, stop)
        for i, (kind, (name, start, stop)) in enumerate(zip(kinds, pieces, strict=True))
    )
    stop = stream.offset + stream.length
    return TokenTable(prompt, tokens, stream.first, stream.offset + end, stop, stream.name)


def _span(prompt: str, name: str, start: int, stop: int) -> tuple[int, int]:
    """Return a token's offsets without spaces at its ends, which some tokenizers include. A piece for
    a space alone has the offsets of the letter after it, and stands before that."""
    if name == _SPACE:
        return start, start
    stop = _after_marks(prompt, stop)
    text = prompt[start:stop]
    if not text or text.isspace():
        return start, stop
    return start + len(text) - len(text.lstrip()), stop - len(text) + len(text.rstrip())


def why_unknown(reads: Reads, text: str) -> str | None:
    """Return what is wrong with a text that has words unknown to the model, else None.

    Only small models such as the embedded one list the words they know (`KNOWN_WORDS`); with other
    words they would draw something else.
    """
    stream = streams_of(reads)[0]
    known = stream.tokenizer.init_kwargs.get(KNOWN_WORDS)
    if not known:
        return None
    for embedding in sorted(stream.embeddings, key=len, reverse=True):
        text = text.replace(embedding, " ")
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


def resolve_subjects(reads: Reads, request: Request) -> tuple[Subject, ...]:
    """Return the subjects of `request` with their token positions; empty if it names none.

    A subject that a stream truncates, or has no letters for, has its positions in the other streams
    only.

    Raises:
        PromptError: the prompt is empty, or has words that the model does not know.
        RequestError: the negative prompt has such words.
        SubjectError: a subject is not in the prompt, no stream has letters for it, it shares a token
            with another, an index does not point at a word, or indices are given for a network with
            several streams.
    """
    row, prompt = request.name, request.prompt
    if not prompt.strip():
        raise PromptError(row, "the prompt is empty; write what the image shows")
    if unknown := why_unknown(reads, prompt):
        raise PromptError(row, f"the prompt {unknown}")
    if request.negative_prompt and (unknown := why_unknown(reads, request.negative_prompt)):
        raise RequestError(row, f"negative_prompt {unknown}")
    tables = token_tables(reads, prompt)
    by_words = by_index = None
    if request.subjects is not None:
        by_words = _find_phrases(tables, row, request.subjects)
    if request.token_indices is not None:
        if len(tables) > 1:
            raise SubjectError(
                row,
                "token_indices cannot be used: this model reads a prompt by "
                f"{' and '.join(table.name for table in tables)}, and a word has other positions in "
                "each; name it in subjects instead",
            )
        by_index = tuple(_at(tables[0], row, entry) for entry in request.token_indices)
    if by_words is not None and by_index is not None:
        words, index = (sorted(s.token_indices for s in found) for found in (by_words, by_index))
        if words != index:
            raise SubjectError(
                row,
                f"subjects stand at {words} but token_indices say {index}; give one of the two, "
                "or make them agree",
            )
    return by_words or by_index or ()


def plainly_named(prompt: str, subjects: Sequence[str]) -> bool:
    """Return True if a cheap check proves that each subject has a place of its own in the prompt, as is
    usual: they are words of letters separated by spaces, and share no word. On False, `places_of` decides."""
    spaced = f" {prompt.lower()} "
    subjects = [subject.lower() for subject in subjects]
    words = [word for subject in subjects for word in subject.split()]
    return len(set(words)) == len(words) and all(
        _PLAIN.fullmatch(subject) and (f" {subject} " in spaced or f" {subject}," in spaced)
        for subject in subjects
    )


def places_of(
    prompt: str, row: str, phrases: Sequence[str], table: TokenTable | None = None
) -> list[tuple[int, int]]:
    """Give each phrase an occurrence of its own in the prompt, and return its start and stop.

    Longer phrases choose first, so that "cat" does not take the one in "red cat"; among equally
    long ones, those with the fewest occurrences choose first.

    Args:
        table: the prompt's tokens, for the message.

    Raises:
        SubjectError: a phrase has no occurrence of its own.
    """
    folded = _Folded.of(prompt)
    wanted = [_Folded.of(phrase.strip()).text for phrase in phrases]
    for phrase, text in zip(phrases, wanted, strict=True):
        if not text:
            raise SubjectError(
                row, f"subject {shown(phrase)} has no words; remove it or name something"
            )
    places = [
        [place for place in folded.places(text) if _stands_alone(prompt, *place)] for text in wanted
    ]
    taken: dict[int, tuple[int, int]] = {}
    for i in sorted(range(len(phrases)), key=lambda i: (-len(wanted[i]), len(places[i]))):
        free = (p for p in places[i] if not any(_overlap(p, q) for q in taken.values()))
        if (place := next(free, None)) is None:
            raise SubjectError(row, _why_missing(prompt, phrases, i, wanted, places[i], table))
        taken[i] = place
    return [taken[i] for i in range(len(phrases))]


def _find_phrases(
    tables: Sequence[TokenTable], row: str, phrases: Sequence[str]
) -> tuple[Subject, ...]:
    """Return the subject that each phrase names, at its place in the prompt."""
    found = []
    places = places_of(tables[0].prompt, row, phrases, tables[0])
    for phrase, place in zip(phrases, places, strict=True):
        seen = [table.between(*place) for table in tables]
        known = [
            (tokens, table)
            for tokens, table in zip(seen, tables, strict=True)
            if _are_known(tokens)
        ]
        if not known:
            raise SubjectError(row, _why_unread(phrase))
        whole = [tokens for tokens, table in known if tokens and tokens[-1].index < table.end]
        if not whole:
            raise SubjectError(row, _why_cut(tables, phrase))
        found.append(_subject(phrase, whole))
    subjects = tuple(found)
    owner: dict[int, Subject] = {}
    for index, subject in ((index, one) for one in subjects for index in one.token_indices):
        other = owner.setdefault(index, subject)
        if other is not subject:
            raise SubjectError(
                row,
                f"subjects {shown(other.name)} and {shown(subject.name)} share a token of the text "
                "encoder; put a space between them in the prompt, or name both as one subject",
            )
    return subjects


def _are_known(tokens: Sequence[Token]) -> bool:
    """False if the tokens do not tell what they stand for."""
    return not tokens or not all(token.is_unknown for token in tokens)


def _why_unread(subject: str) -> str:
    return (
        f"subject {shown(subject)} has only letters or signs that the text encoder does not know; "
        "write it as words in Latin letters, in the prompt too"
    )


@dataclass(frozen=True)
class _Folded:
    """A text as tokenizers compare it: in lower case, composed, every gap a single space.

    Attributes:
        text: that text.
        starts: of each of its characters, and of its end, the offset in the original.
    """

    text: str
    starts: tuple[int, ...]

    @classmethod
    def of(cls, original: str) -> _Folded:
        pieces: list[str] = []
        starts: list[int] = []
        at = 0
        while at < len(original):
            stop = at + 1
            if original[at].isspace():
                while stop < len(original) and original[stop].isspace():
                    stop += 1
                piece = " "
            else:
                stop = _after_marks(original, stop)
                piece = unicodedata.normalize("NFC", original[at:stop]).lower()
            pieces.append(piece)
            starts += [at] * len(piece)
            at = stop
        return cls("".join(pieces), (*starts, len(original)))

    def places(self, wanted: str) -> list[tuple[int, int]]:
        """Return where `wanted`, folded, is in the original: start and stop of each occurrence."""
        found, at = [], self.text.find(wanted)
        while at >= 0:
            found.append((self.starts[at], self.starts[at + len(wanted)]))
            at = self.text.find(wanted, at + 1)
        return found


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _why_cut(tables: Sequence[TokenTable], phrase: str) -> str:
    most = max(table.end - table.first for table in tables)
    return (
        f"subject {shown(phrase)} is cut off: the text encoder sees only the first {most} tokens of "
        "the prompt; shorten it or move the subject forward"
    )


def _subject(name: str, streams: Sequence[Sequence[Token]]) -> Subject:
    """Return a subject from its tokens in each stream."""
    tokens = [token for one in streams for token in one]
    words, *others = (_without_gaps(one) for one in streams)
    same = [words, *(other for other in others if len(other) == len(words))]
    found = noun_phrase(["".join(token.text for token in word) for word in words])
    *modifiers, head = (tuple(index for one in same for index in _spoken(one[i])) for i in found)
    return Subject(
        name,
        tuple(token.index for token in tokens),
        tuple(token.text for token in tokens),
        head,
        tuple(modifiers),
    )


def _without_gaps(tokens: Sequence[Token]) -> list[Sequence[Token]]:
    """Group tokens that a reader sees as one word, as in "T-shirt" and "cat's", which the tokenizer
    takes apart."""
    gaps = [i for i in range(1, len(tokens)) if tokens[i].start > tokens[i - 1].stop]
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


def _stands_alone(prompt: str, start: int, stop: int) -> bool:
    """True if prompt[start:stop] is whole words to a reader."""
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
    prompt: str,
    phrases: Sequence[str],
    i: int,
    wanted: Sequence[str],
    places: Sequence[tuple[int, int]],
    table: TokenTable | None,
) -> str:
    """Explain why phrase `i`, which stands at `places`, has no occurrence of its own."""
    phrase, found = shown(phrases[i]), len(places)
    times = "once" if found == 1 else f"{found} times"
    if 0 < found < wanted.count(wanted[i]):
        return f"subject {phrase} is in the prompt only {times}; name it as often as it occurs"
    if found:
        return (
            f"subject {phrase} has no place left in the prompt, where it stands {times}: each "
            "occurrence belongs to one subject, the longest first, so name one subject less there, "
            "or give token_indices"
        )
    if within := _Folded.of(prompt).places(wanted[i]):
        return (
            f"subject {phrase} is not in the prompt as a word of its own, only inside "
            f"{shown(_around(prompt, *within[0]))}; name that, or give token_indices"
        )
    missing = f"subject {phrase} is not in the prompt"
    parts = [part for part in _SEPARATORS.split(phrases[i].strip()) if part]
    if len(parts) > 1 and any(_Folded.of(prompt).places(_Folded.of(part).text) for part in parts):
        named = " and ".join(map(shown, parts))
        return f"{missing}; did you mean {named}? Put ; between subjects: {shown(';'.join(parts))}"
    if near := _nearest(prompt, phrases[i]):
        return f"{missing}; did you mean {shown(near)}?"
    return missing + (f"; its tokens are {table}" if table else "; use the prompt's own words")


def _nearest(prompt: str, phrase: str) -> str | None:
    """Return what stands in the prompt and is written much like a phrase: a typo, or another number."""
    words = [word.strip('.,;:!?"()') for word in prompt.split()]
    length = len(phrase.split())
    spans = (" ".join(words[i : i + length]) for i in range(len(words) - length + 1))
    known = {span.lower(): span for span in spans}
    near = get_close_matches(phrase.lower().strip(), known, n=1, cutoff=0.7)
    return known[near[0]] if near else None


def _around(prompt: str, start: int, stop: int) -> str:
    """Return the text at [start, stop), extended to whole words."""
    before, after = re.split(r"\s", prompt[:start])[-1], re.split(r"\s", prompt[stop:])[0]
    return f"{before}{prompt[start:stop]}{after}".strip(".,;:!?")


def _at(table: TokenTable, row: str, entry: int | Sequence[int]) -> Subject:
    """Return the subject given by an entry of `token_indices`."""
    indices = (entry,) if isinstance(entry, int) else tuple(entry)
    if not indices:
        raise SubjectError(row, "token_indices has an empty subject; remove it")
    for index in indices:
        _check_index(table, row, index)
    tokens = [token for index in indices if (token := table.tokens[index]).start < token.stop]
    if not tokens:
        raise SubjectError(
            row,
            f"token index {indices[0]} is the space before a word; name the word's own tokens of {table}",
        )
    name = table.text(tokens)
    if not _are_known(tokens):
        raise SubjectError(row, _why_unread(name))
    return _subject(name, [tokens])


def _check_index(table: TokenTable, row: str, index: int) -> None:
    if table.first <= index < table.end:
        return
    if index < 0 or index >= table.stop:
        what = f"outside the {table.stop} positions of the text encoder"
    elif index < table.first:
        what = "the start token"
    elif index == table.end:
        what = "the end token" + (", where the prompt is cut off" if table.is_cut else "")
    else:
        what = "padding"
    raise SubjectError(row, f"token index {index} is {what}; the prompt's tokens are {table}")
