"""Reads a manifest, one row per image, from Parquet, or from CSV or JSONL converted to Parquet.

The columns are `columns.MANIFEST_COLUMNS`, of which only `prompt` is required. Other columns are copied
to the metadata table unchanged. A `ManifestError` concerns the manifest as a whole; an error in one row
is stored with that row.
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
    """A slice of a manifest, not parsed yet. It is cheap to create and to send: the worker that
    generates the rows parses them.

    Attributes:
        start: position of its first row in the manifest.
        repeats: duplicate rows in this part -> the first row of the manifest with the same id.
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
        """The columns that are not manifest columns."""
        return self.table.select(list(self.extra_names))


@dataclass(frozen=True)
class Manifest:
    """An open manifest. It stays on disk, except for the row groups read last.

    Attributes:
        path: path or URL that was opened. The rows come from a copy made when it was opened.
        digest: SHA-256 of the file.
        extras: the columns that are not manifest columns.
    """

    path: str
    digest: str
    extras: pa.Schema
    _groups: RowGroups
    _repeats: Repeats
    _states: set[tuple[int, int, int]]
    """(mtime, size, inode) of the file at which it is known to have this content; empty for a URL."""

    @property
    def own(self) -> frozenset[str]:
        """The manifest columns that it has, aliases resolved."""
        names = self._groups.schema.names
        return frozenset(own for name in names if (own := _column_of(name)) is not None)

    @property
    def name(self) -> str:
        return Path(self.path).name

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def changed(self) -> bool:
        """Whether the file changed since it was opened; False for a URL or a missing file."""
        try:
            if not self._states or (state := _state(self.path)) in self._states:
                return False
            if _digest(self.path) != self.digest:
                return True
            self._states.add(state)  # only the mtime differs
        except OSError:  # deleted or unreachable: the copy has its rows
            pass
        return False

    def part(self, start: int, stop: int) -> Part:
        """Return rows `start` to `stop - 1`, not parsed yet."""
        with _readable(self.path):
            table = self._groups.read(start, stop)
        return Part(start, table, tuple(self.extras.names), self._repeats.within(start, stop))

    def read(self, start: int, stop: int) -> tuple[list[Row], pa.Table]:
        """Return rows `start` to `stop - 1`, parsed, and their extra columns."""
        part = self.part(start, stop)
        return part.rows(), part.extras

    def rows(self) -> Iterator[Row]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from self.read(start, min(start + _ROWS_AT_ONCE, len(self)))[0]


@contextmanager
def open_manifest(path: str | Path, s3_endpoint: str | None = None) -> Iterator[Manifest]:
    """Open a manifest by its suffix: `.parquet`, `.csv` or `.jsonl`.

    Args:
        path: path or URL of the file.
        s3_endpoint: URL of an S3-compatible store, for an `s3://` path.

    Raises:
        ManifestError: the manifest cannot be read, has no rows, lacks `prompt`, or has a column that
            clashes with one the run adds.
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
            f"Manifest {path} must end in one of {', '.join(converters)}; convert it to one."
        )
    with ExitStack() as stack:
        with _readable(path):
            folder = stack.enter_context(scratch_folder())
            copies = folder / "source"
            copies.mkdir()
            if is_url(path):
                states, source = set(), fetch(path, copies, s3_endpoint)
            else:  # copy first, so that the bytes hashed are the bytes read
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
    """Return the manifest column that a name stands for, or None for an extra column."""
    name = ALIASES.get(name, name)
    return name if name in NAMES else None


def _check_columns(path: str, schema: pa.Schema) -> None:
    names = schema.names
    if "prompt" not in names:
        raise ManifestError(
            f"Manifest {path} has no column prompt, only {', '.join(names) or 'none'}; name the "
            "column with the texts prompt."
        )
    # Rows are selected with SQL, whose column names are case-insensitive.
    known = {name.lower(): name for name in (*NAMES, *ALIASES, *RESERVED)}
    for name in names:
        if names.count(name) > 1:
            raise ManifestError(f"Manifest {path} has column {name} twice; rename one.")
        if name in RESERVED:
            raise ManifestError(
                f"Manifest {path} has a column {name}, a name that is reserved for a column "
                f"that the run adds; rename it, e.g. to my_{name}."
            )
        if (taken := known.setdefault(name.lower(), name)) != name:
            raise ManifestError(
                f"Manifest {path} has a column {name}, which differs from {taken} only in case; "
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
    """Convert CSV to Parquet: manifest columns stay text and are parsed per row, other types are inferred."""
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
        if pa.types.is_binary(field.type):  # inferred only for text that is not UTF-8
            raise _ContentError(f"column {field.name} is not UTF-8; save it as UTF-8 text.")
    pq.write_table(table, target, row_group_size=_LINES_AT_ONCE)


def _convert_jsonl(source: Path, target: Path) -> None:
    """Convert JSONL to Parquet: manifest columns become JSON text, so that a wrong type fails only its
    row; each extra column gets the type that fits all its values, or becomes JSON text if no type does."""
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
                if _has_empty_struct(kind):  # Parquet cannot store one
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
    """The content of the file is invalid; `_readable` adds its path to the message."""


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
    """Return a column as Python values, with `Unreadable` for each value that Python cannot represent."""
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
"""Raised for e.g. text that is not UTF-8, a date in the year 10,000, or nanoseconds."""


def _state(path: str) -> tuple[int, int, int]:
    seen = os.stat(path)
    return seen.st_mtime_ns, seen.st_size, seen.st_ino


def _digest(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
