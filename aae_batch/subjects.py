"""From words to tokens: which positions of the tokenizer's output a subject stands at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from aae_batch.errors import PromptError, SubjectError, shown
from aae_batch.request import Request

TokenKind = Literal["start", "word", "end", "truncated"]


class Tokenizer(Protocol):
    """What is used of a CLIP tokenizer of transformers."""

    model_max_length: int

    def __call__(self, text: str, **kwargs): ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Token:
    """One position of the text encoder's input.

    Attributes:
        index: the position; 0 is the start token.
        token: as the vocabulary spells it, e.g. `"frog</w>"`.
        kind: `"truncated"` tokens are beyond what the text encoder can see.
    """

    index: int
    token: str
    kind: TokenKind

    @property
    def text(self) -> str:
        return self.token.removesuffix("</w>")

    @property
    def ends_word(self) -> bool:
        return self.token.endswith("</w>")


@dataclass(frozen=True)
class Subject:
    """Something that must be drawn: its words, their positions, and the tokens there."""

    name: str
    token_indices: tuple[int, ...]
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class TokenTable:
    """A prompt as the text encoder gets it.

    Attributes:
        tokens: all tokens from the start token to the end token, and those that were truncated.
        end: the position of the end token; padding follows it.
        length: the number of positions, e.g. 77.
    """

    tokens: tuple[Token, ...]
    end: int
    length: int

    @property
    def words(self) -> list[Token]:
        return [token for token in self.tokens if token.kind == "word"]

    def __str__(self) -> str:
        return ", ".join(f"{token.index} {token.text!r}" for token in self.words)


def token_table(tokenizer: Tokenizer, prompt: str) -> TokenTable:
    """Tokenize `prompt` as the pipeline does, and keep what it would cut off."""
    names = tokenizer.convert_ids_to_tokens(tokenizer(prompt, verbose=False).input_ids)
    end = min(len(names), tokenizer.model_max_length) - 1
    if end < len(names) - 1:  # the end token takes the place of the first word that is cut off
        names = [*names[:end], names[-1], *names[end:-1]]

    def kind(index: int) -> TokenKind:
        if index == 0:
            return "start"
        if index == end:
            return "end"
        return "word" if index < end else "truncated"

    tokens = tuple(Token(index, name, kind(index)) for index, name in enumerate(names))
    return TokenTable(tokens, end, tokenizer.model_max_length)


def resolve_subjects(tokenizer: Tokenizer, request: Request) -> tuple[Subject, ...]:
    """The subjects of `request` with their token positions; none if it names none.

    Raises:
        PromptError: the prompt is empty, or nothing is named in a request to be guided.
        SubjectError: a subject is not in the prompt, or an index does not point at a word.
    """
    row, prompt = request.name, request.prompt
    if not prompt.strip():
        raise PromptError(row, "the prompt is empty; write what the picture shows")
    table = token_table(tokenizer, prompt)
    by_words = by_index = None
    if request.subjects is not None:
        by_words = _find_phrases(tokenizer, table, row, request.subjects)
    if request.token_indices is not None:
        by_index = _check_indices(table, row, request.token_indices)
    if by_words is not None and by_index is not None:
        _check_agreement(row, by_words, by_index)
    return by_words or by_index or ()


def _find_phrases(
    tokenizer: Tokenizer, table: TokenTable, row: str, phrases: Sequence[str]
) -> tuple[Subject, ...]:
    subjects = []
    seen: Counter[tuple[str, ...]] = Counter()
    for phrase in phrases:
        ids = tokenizer(phrase, add_special_tokens=False, verbose=False).input_ids
        wanted = tuple(tokenizer.convert_ids_to_tokens(ids))
        if not wanted:
            raise SubjectError(
                row, f"subject {shown(phrase)} has no words; remove it or name something"
            )
        places = _occurrences(table, wanted)
        if len(places) <= seen[wanted]:
            raise SubjectError(row, _why_missing(table, phrase, found=len(places)))
        start = places[seen[wanted]]
        seen[wanted] += 1
        indices = tuple(range(start, start + len(wanted)))
        if indices[-1] >= table.end:
            raise SubjectError(
                row,
                f"subject {shown(phrase)} is cut off: the text encoder sees only the first "
                f"{table.end - 1} tokens of the prompt; shorten it or move the subject forward",
            )
        subjects.append(Subject(phrase, indices, wanted))
    return tuple(subjects)


def _occurrences(table: TokenTable, wanted: tuple[str, ...]) -> list[int]:
    """Where `wanted` starts, at the beginning of a word, in the whole prompt.

    Positions beyond the end token are counted as if the prompt had not been cut.
    """
    words = [token for token in table.tokens if token.kind in ("word", "truncated")]
    names = tuple(token.token for token in words)
    return [
        i + 1  # the start token
        for i in range(len(names) - len(wanted) + 1)
        if names[i : i + len(wanted)] == wanted and (i == 0 or words[i - 1].ends_word)
    ]


def _why_missing(table: TokenTable, phrase: str, found: int) -> str:
    if found:
        times = "once" if found == 1 else f"{found} times"
        return (
            f"subject {shown(phrase)} is in the prompt only {times}; name it as often as it occurs"
        )
    return f"subject {shown(phrase)} is not in the prompt; its tokens are {table}"


def _check_indices(
    table: TokenTable, row: str, token_indices: Sequence[int] | Sequence[Sequence[int]]
) -> tuple[Subject, ...]:
    subjects = []
    for entry in token_indices:
        indices = (entry,) if isinstance(entry, int) else tuple(entry)
        if not indices:
            raise SubjectError(row, "token_indices has an empty subject; remove it")
        for index in indices:
            _check_index(table, row, index)
        tokens = tuple(table.tokens[index] for index in indices)
        name = "".join(token.text + " " * token.ends_word for token in tokens).strip()
        subjects.append(Subject(name, indices, tuple(token.token for token in tokens)))
    return tuple(subjects)


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


def _check_agreement(
    row: str, by_words: tuple[Subject, ...], by_index: tuple[Subject, ...]
) -> None:
    words = sorted(subject.token_indices for subject in by_words)
    index = sorted(subject.token_indices for subject in by_index)
    if words != index:
        raise SubjectError(
            row,
            f"subjects stand at {words} but token_indices say {index}; give one of the two, "
            "or make them agree",
        )
