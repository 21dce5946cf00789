"""A manifest, one row per image: Parquet, or CSV and JSONL, which are converted to it.

The columns are `columns.MANIFEST_COLUMNS`, of which only `prompt` is required; others are carried to
the metadata table as they are. What is wrong with the manifest as a whole is a `ManifestError`;
what is wrong with one row stays with that row.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from aae_batch.columns import ALIASES, NAMES, RESERVED
from aae_batch.errors import ManifestError, OutputError, RequestError
from aae_batch.manifest import row_groups
from aae_batch.manifest.repeats import Repeats
from aae_batch.manifest.row import Row, Unreadable, default_id, id_of, read_row
from aae_batch.manifest.row_groups import RowGroups
from aae_batch.store.base import is_url
from aae_batch.store.fetch import fetch
from aae_batch.store.scratch import scratch_folder

_ENCODING = b"aae_batch.encoding"
_IS_JSON = {_ENCODING: b"json"}
_LINES_AT_ONCE = 20_000
_ROWS_AT_ONCE = 1_000


@dataclass(frozen=True)
class Part:
    """Some rows of a manifest as they stand in it. Cheap to make and to send; to look at every value is
    left to whoever generates the rows.

    Attributes:
        start: the place of its first row.
        repeats: of its rows whose id an earlier row of the manifest has: that row.
    """

    start: int
    table: pa.Table
    extra_names: tuple[str, ...]
    repeats: dict[int, int]

    def __len__(self) -> int:
        return self.table.num_rows

    def rows(self) -> list[Row]:
        table = self.table
        values = {
            own: _values(table[field.name], field)
            for field in table.schema
            if (own := _column_of(field.name)) is not None
        }
        rows = []
        for i in range(len(self)):
            row = read_row(self.start + i, {name: column[i] for name, column in values.items()})
            first = self.repeats.get(row.index)
            if row.error is None and first is not None:
                reason = f"column id: already used by row {first + 1} of the manifest; ids must be unique"
                row = replace(row, error=RequestError(row.id, reason))
            rows.append(row)
        return rows

    @property
    def extras(self) -> pa.Table:
        """The columns that are none of ours."""
        return self.table.select(list(self.extra_names))


@dataclass(frozen=True)
class Manifest:
    """An open manifest. It stays on disk but for the rows around those that were read last.

    Attributes:
        path: the file that was opened, or its URL. It was copied, and nothing is read from it again.
        digest: SHA-256 of the file.
        extras: the columns that are none of ours.
    """

    path: str
    digest: str
    extras: pa.Schema
    _groups: RowGroups
    _repeats: Repeats
    _states: set[tuple[int, int, int]]
    """Of the file: modified, size, inode; those at which it had this content."""

    @property
    def own(self) -> frozenset[str]:
        """The columns that it has and that are ours."""
        names = self._groups.schema.names
        return frozenset(own for name in names if (own := _column_of(name)) is not None)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return Path(self.path).name

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def changed(self) -> bool:
        """The file has other content by now than what was opened. Of a URL it is not known."""
        try:
            if not self._states or (state := _state(self.path)) in self._states:
                return False
            if _digest(self.path) != self.digest:
                return True
            self._states.add(state)  # only its time is another
        except OSError:  # it is gone, or out of reach: its rows are here
            pass
        return False

    def part(self, start: int, stop: int) -> Part:
        """The rows from `start` up to `stop`, not looked at yet."""
        with _readable(self.path):
            table = self._groups.read(start, stop)
        return Part(start, table, tuple(self.extras.names), self._repeats.within(start, stop))

    def read(self, start: int, stop: int) -> tuple[list[Row], pa.Table]:
        """The rows from `start` up to `stop`, and their extra columns."""
        part = self.part(start, stop)
        return part.rows(), part.extras

    def rows(self) -> Iterator[Row]:
        """All rows in order."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from self.read(start, min(start + _ROWS_AT_ONCE, len(self)))[0]


@contextmanager
def open_manifest(path: str | Path, s3_endpoint: str | None = None) -> Iterator[Manifest]:
    """Open a manifest by its suffix: `.parquet`, `.csv`, `.jsonl`.

    Args:
        path: of a file, or its URL.
        s3_endpoint: URL of an S3-compatible store, for a manifest that lies there.

    Raises:
        ManifestError: it cannot be read, has no rows, lacks `prompt`, or has a column that would
            clash with one the run adds.
    """
    path = str(path)
    if not is_url(path) and Path(path).is_dir():
        raise ManifestError(f"Manifest {path} is a folder; name one file in it.")
    if not is_url(path) and not Path(path).is_file():
        raise ManifestError(f"Manifest {path} does not exist; check the path.")
    converters = {".parquet": None, ".csv": _convert_csv, ".jsonl": _convert_jsonl}
    suffix = PurePosixPath(path).suffix.lower()
    if suffix not in converters:
        raise ManifestError(
            f"Manifest {path} is none of {', '.join(converters)}; convert it to one."
        )
    with ExitStack() as stack:
        with _readable(path):
            folder = stack.enter_context(scratch_folder())
            copies = folder / "source"
            copies.mkdir()
            if is_url(path):
                states, source = set(), fetch(path, copies, s3_endpoint)
            else:  # what is hashed is what is read, whatever becomes of the file meanwhile
                states, source = {_state(path)}, copies / Path(path).name
                shutil.copyfile(path, source)
            parquet, convert = source, converters[suffix]
            if convert is not None:
                parquet = folder / "converted.parquet"
                convert(source, parquet)
            file = stack.enter_context(row_groups.opened(parquet))
            _check_columns(path, file.schema_arrow)
            if row_groups.too_large(file):
                row_groups.regroup(file, folder / "regrouped.parquet")
                file = stack.enter_context(row_groups.opened(folder / "regrouped.parquet"))
            groups = RowGroups(file)
            if len(groups) == 0:
                raise ManifestError(f"Manifest {path} has no rows.")
            extras = pa.schema([field for field in groups.schema if _column_of(field.name) is None])
            repeats = _repeated_ids(groups)
            manifest = Manifest(path, _digest(source), extras, groups, repeats, states)
        yield manifest


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except _ContentError as error:
        raise ManifestError(f"Manifest {path}: {error}") from None
    except (OutputError, pa.ArrowException, UnicodeError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        said = f"Manifest {path} cannot be read: {lines[0].rstrip('.')}."
        by_arrow = isinstance(error, pa.ArrowException) and "UTF8" in str(error)
        if by_arrow or isinstance(error, UnicodeError):
            said += " Save it as UTF-8 text."
        raise ManifestError(said) from error


def _column_of(name: str) -> str | None:
    """Which of our columns a manifest's column is; None for an extra one."""
    name = ALIASES.get(name, name)
    return name if name in NAMES else None


def _check_columns(path: str, schema: pa.Schema) -> None:
    names = schema.names
    if "prompt" not in names:
        raise ManifestError(
            f"Manifest {path} has no column prompt, only {', '.join(names) or 'none'}; name the "
            "column with the texts prompt."
        )
    # SQL, by which rows are chosen, knows no capitals.
    known = {name.lower(): name for name in (*NAMES, *ALIASES, *RESERVED)}
    for name in names:
        if names.count(name) > 1:
            raise ManifestError(f"Manifest {path} has column {name} twice; rename one.")
        if name in RESERVED:
            raise ManifestError(
                f"Manifest {path} has a column {name}, which is a name that the run gives to a "
                f"column of its own; rename it, e.g. to my_{name}."
            )
        if (taken := known.setdefault(name.lower(), name)) != name:
            raise ManifestError(
                f"Manifest {path} has a column {name}, which only its capitals tell from {taken}; "
                f"rename it, e.g. to my_{name}."
            )
        if ALIASES.get(name) in names:
            raise ManifestError(
                f"Manifest {path} has both {name} and {ALIASES[name]}, which mean the same; keep one."
            )


def _repeated_ids(groups: RowGroups) -> Repeats:
    if "id" not in groups.schema.names:
        return Repeats.among(list)
    kind = groups.schema.field("id")

    def ids() -> Iterator[list[str]]:
        start = 0
        for column in groups.column("id"):
            values = _values(column, kind)
            if pa.types.is_string(kind.type) and not _is_json(kind):
                yield [text or default_id(start + i) for i, text in enumerate(values)]
            else:
                yield [id_of(start + i, value) for i, value in enumerate(values)]
            start += len(values)

    return Repeats.among(ids)


# --- conversion ----------------------------------------------------------------------------------


def _refuse_gzip(source: Path) -> None:
    with source.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise _ContentError(
                "the file is compressed with gzip, whatever its name says; unpack it first."
            )


def _convert_csv(source: Path, target: Path) -> None:
    """Our columns stay text, to be read row by row; the types of others are inferred."""
    _refuse_gzip(source)
    with source.open(encoding="utf-8-sig") as file:
        header = pa.csv.read_csv(
            pa.BufferReader(file.readline().encode()),
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        ).column_names
    own = [name for name in header if _column_of(name) is not None]
    table = pa.csv.read_csv(
        source,
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(own, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    for field in table.schema:
        if pa.types.is_binary(field.type):  # what is no text anyone meant
            raise _ContentError(f"column {field.name} is not UTF-8; save it as UTF-8 text.")
    pq.write_table(table, target, row_group_size=_LINES_AT_ONCE)


def _convert_jsonl(source: Path, target: Path) -> None:
    """Our columns become JSON text, so that a wrong type is that row's alone; others get the one
    type that fits all their values, or JSON text where there is none."""
    _refuse_gzip(source)
    schema = pa.schema([])
    texts: set[str] = set()
    for records in _json_chunks(source):
        for name in dict.fromkeys(name for record in records for name in record):
            if _column_of(name) is not None:
                texts.add(name)
            if name in texts:
                continue
            try:
                kind = pa.array([record.get(name) for record in records]).type
                if _has_empty_struct(kind):  # Parquet has none
                    raise pa.ArrowInvalid
                schema = pa.unify_schemas(
                    [schema, pa.schema([(name, kind)])], promote_options="permissive"
                )
            except (ValueError, OverflowError, pa.ArrowException):
                texts.add(name)
    names = [*schema.names, *sorted(texts - set(schema.names))]
    fields = [
        pa.field(
            name,
            pa.string() if name in texts else schema.field(name).type,
            metadata=None if _column_of(name) is None else _IS_JSON,
        )
        for name in names
    ]
    whole = pa.schema(fields)
    with pq.ParquetWriter(target, whole) as writer:
        for records in _json_chunks(source):
            columns = [
                _json_texts(records, field.name)
                if field.name in texts
                else pa.array([record.get(field.name) for record in records], field.type)
                for field in whole
            ]
            writer.write_table(pa.table(columns, schema=whole))


def _has_empty_struct(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.num_fields == 0:
        return True
    return any(_has_empty_struct(kind.field(i).type) for i in range(kind.num_fields))


def _json_texts(records: list[dict], name: str) -> pa.Array:
    values = (record.get(name) for record in records)
    return pa.array((None if v is None else json.dumps(v) for v in values), pa.string())


def _json_chunks(source: Path) -> Iterator[list[dict]]:
    with source.open(encoding="utf-8-sig") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        while chunk := list(islice(lines, _LINES_AT_ONCE)):
            yield [_json_record(number, line) for number, line in chunk]


class _ContentError(Exception):
    """Something in the file is wrong. Which file's, `_readable` knows."""


def _json_record(number: int, line: str) -> dict:
    try:
        record = json.loads(line)
    except RecursionError:
        raise _ContentError(f"line {number} is nested too deeply; flatten it.") from None
    except ValueError as error:
        raise _ContentError(f"line {number} is not JSON: {error}.") from None
    if not isinstance(record, dict):
        raise _ContentError(f"line {number} is not a JSON object; write {{...}}.")
    return record


def _is_json(field: pa.Field) -> bool:
    return (field.metadata or {}).get(_ENCODING) == b"json"


def _values(column: pa.Array | pa.ChunkedArray, field: pa.Field) -> list[Any]:
    """A column as Python has it; what Python cannot have is `Unreadable`, alone."""
    try:
        values = column.to_pylist()
    except _NOT_FOR_PYTHON:
        values = [_value(scalar) for scalar in column]
    if _is_json(field):
        return [None if value is None else json.loads(value) for value in values]
    return values


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except _NOT_FOR_PYTHON:
        return Unreadable()


_NOT_FOR_PYTHON = (ValueError, OverflowError, ImportError, pa.ArrowException)
"""E.g. text that is not UTF-8, a date in the year 10,000, nanoseconds."""


def _state(path: str) -> tuple[int, int, int]:
    seen = os.stat(path)
    return seen.st_mtime_ns, seen.st_size, seen.st_ino


def _digest(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
