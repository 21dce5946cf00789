"""Parses one manifest row: values of any type -> a `Request`, or the reason why they are invalid."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from aae_batch.errors import PromptError, RequestError, RowError, shown
from aae_batch.methods import METHODS
from aae_batch.request import Request

ID_DIGITS = 8
MOST_PIXELS = 16_384
MOST_STEPS = 1000
_SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}")
_NUMBER = re.compile(r"[+-]?\d{1,100}(?P<float>\.\d{0,100})?(?P<exponent>[eE][+-]?\d{1,3})?")
_PIECE = re.compile(
    r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d*)?|[][(),]|\s+""", re.DOTALL
)
"""Of a list as Python or numpy writes it: a text, a number, a sign, or space."""


@dataclass(frozen=True)
class Row:
    """One row of a manifest.

    Attributes:
        index: position in the manifest, from 0.
        request: the parsed request; for an invalid row, the values that could be parsed.
        error: why the row cannot be generated, or None.
        unread: columns of an invalid row whose values could not be parsed.
    """

    index: int
    request: Request
    error: RowError | None = None
    unread: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        return self.request.name


def is_safe_id(row_id: str) -> bool:
    """Return whether an id is a valid file name on disk and in every object store."""
    return _SAFE_ID.fullmatch(row_id) is not None


def seed_of(row_id: str) -> int:
    """Return the default seed of a row: a hash of its id, independent of time and row order."""
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:4], "big")


def read_row(index: int, values: dict[str, Any]) -> Row:
    """Check the values of one row, which may have any type, and build its request."""
    given = {name: value for name, value in values.items() if not is_missing(value)}
    row_id = id_of(index, given.pop("id", None))
    read, unfit = read_values(given)
    problems: list[tuple[type[RowError], str]] = []
    if not is_safe_id(row_id):
        reason = (
            f"column id: {shown(row_id)} cannot be a file name; use up to 120 letters, digits, '.', "
            "'_' and '-', not beginning with '.' or '-'"
        )
        problems.append((RequestError, reason))
    problems += [(RequestError, f"column {name}: {reason}") for name, reason in unfit.items()]
    if "prompt" not in given:
        problems.insert(0, (RequestError, "column prompt: is empty; write what the image shows"))
    elif isinstance(given["prompt"], str) and not given["prompt"].strip():
        problems.insert(0, (PromptError, "column prompt: is blank; write what the image shows"))
    if "seed" not in given:
        read["seed"] = seed_of(row_id)
    request = Request(id=row_id, **{"prompt": "", **read})
    if not problems:
        return Row(index, request)
    kind = problems[0][0]
    error = kind(row_id, "; ".join(reason for _, reason in problems))
    return Row(index, request, error, unread=frozenset(given.keys() - read.keys()))


def read_values(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Parse values of any type that are not missing, by column.

    Returns:
        Those that could be parsed, and what is wrong with each of the others.
    """
    read: dict[str, Any] = {}
    unfit: dict[str, str] = {}
    for name, reader in _READERS.items():
        if name in given:
            try:
                read[name] = reader(given[name])
            except _UnfitError as error:
                unfit[name] = f"{shown(given[name])} {error}"
    return read, unfit


class _UnfitError(Exception):
    """The message completes a sentence that starts with the column and the value."""


def is_missing(value: Any) -> bool:
    """Return whether a value stands for none: None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


class Unreadable:
    """Placeholder for a value that Python cannot represent, e.g. text that is not UTF-8."""

    def __repr__(self) -> str:
        return "<unreadable>"


def default_id(index: int) -> str:
    """Return the id of a row without one: its position, zero-padded."""
    return f"{index:0{ID_DIGITS}d}"


def id_of(index: int, value: Any) -> str:
    """Return the id of a row as valid UTF-8; see `is_safe_id` for use as a file name."""
    if is_missing(value) or value in ("", b""):
        return default_id(index)
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if not isinstance(value, str) and (number := whole_number(value)) is not None:
        value = number
    return str(value).encode("utf-8", "backslashreplace").decode()


def whole_number(value: Any) -> int | None:
    """Return a whole number that a table gives in any type, such as 7.0 in a column with empty cells;
    None for anything else."""
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value.strip())
        if match is None:
            return None
        value = float(match[0]) if match["float"] or match["exponent"] else int(match[0])
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    if not isinstance(value, (float, Decimal)) or not math.isfinite(value):
        return None
    return int(value) if value == int(value) else None


def _text(value: Any) -> str:
    if isinstance(value, bytes):  # as engines write it that do not mark text in Parquet
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise _UnfitError("is not UTF-8 text") from None
    if not isinstance(value, str):
        raise _UnfitError("is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _UnfitError(
            "contains an unpaired surrogate, which is not valid text; remove it"
        ) from None
    return value


def _whole(value: Any) -> int:
    number = whole_number(value)
    if number is None:
        raise _UnfitError("is not a whole number")
    return number


def _seed(value: Any) -> int:
    """Return a seed as 64 bits with a sign: torch draws the same noise from `n` and `n - 2**64`."""
    number = _whole(value)
    if not -(2**63) <= number < 2**64:
        raise _UnfitError("does not fit 64 bits; use a smaller number")
    return number - 2**64 if number >= 2**63 else number


def _steps(value: Any) -> int:
    number = _whole(value)
    if not 1 <= number <= MOST_STEPS:
        raise _UnfitError(f"is not a number of steps; use 1 to {MOST_STEPS}")
    return number


def _pixels(value: Any) -> int:
    number = _whole(value)
    if number > MOST_PIXELS:
        raise _UnfitError(f"is too large; use up to {MOST_PIXELS}")
    if number <= 0 or number % 8:
        near = 8 if number <= 0 else max(8, round(number / 8) * 8)
        raise _UnfitError(f"is not a multiple of 8; use {near}")
    return number


def _scale(value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise _UnfitError("is not a number from 0")
    return number


def _method(value: Any) -> str:
    if not isinstance(value, str) or value not in METHODS:
        raise _UnfitError(f"is not a method; use {' or '.join(METHODS)}")
    return value


def _listed(value: Any) -> list[Any]:
    """Parse a list given as a list, as JSON, Python's or numpy's text, or as text separated by `;`."""
    if isinstance(value, bytes):
        value = _text(value)
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return [part.strip() for part in value.split(";") if part.strip()]
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = _python_list(value.strip())
    if not isinstance(value, list):
        raise _UnfitError('is not a list; write ["cat", "frog"], or cat;frog in a CSV')
    return value


def _python_list(text: str) -> list[Any]:
    """Parse a list as `str` writes it: `['a', 'b']`, or `['a' 'b']` of numpy's array."""
    pieces = _PIECE.findall(text)
    joined = ""
    for piece in pieces:
        if not piece.isspace():
            between = joined and joined[-1] not in "[(," and piece not in ("]", ")", ",")
            joined += "," * bool(between) + piece
    try:
        if "".join(pieces) == text:
            return ast.literal_eval(joined)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    raise _UnfitError(
        "starts like a list but is not one; write [\"cat\", \"frog\"], ['cat', 'frog'] or cat;frog"
    )


def _subjects(value: Any) -> tuple[str, ...]:
    subjects = _listed(value)
    if not all(isinstance(subject, (str, bytes)) for subject in subjects):
        raise _UnfitError("is not a list of words of the prompt")
    return tuple(_text(subject) for subject in subjects)


def _token_indices(value: Any) -> tuple[tuple[int, ...], ...]:
    if isinstance(value, (int, float)):  # one position, as tables store a list of one
        value = [value]
    try:
        return tuple(
            tuple(map(_index, entry)) if isinstance(entry, (list, tuple)) else (_index(entry),)
            for entry in _listed(value)
        )
    except _UnfitError:
        raise _UnfitError(
            "is not a list of token positions; write [2, 5], or [[2, 3], [5]]"
        ) from None


def _index(value: Any) -> int:
    number = _whole(value)
    if abs(number) >= 2**31:
        raise _UnfitError("is too large")
    return number


_READERS = {
    "prompt": _text,
    "subjects": _subjects,
    "token_indices": _token_indices,
    "seed": _seed,
    "method": _method,
    "negative_prompt": _text,
    "guidance_scale": _scale,
    "num_inference_steps": _steps,
    "height": _pixels,
    "width": _pixels,
}
