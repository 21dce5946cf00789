"""Reads a manifest, one row per image, from Parquet, or from other tables converted to Parquet.

The columns are `columns.MANIFEST_COLUMNS`, of which only `prompt` is required. Other columns are copied
to the metadata table unchanged. A `ManifestError` concerns the manifest as a whole; an error in one row
is stored with that row.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from aae_batch.columns import ALIASES, NAMES, RESERVED
from aae_batch.errors import ManifestError, OutputError, RequestError
from aae_batch.manifest import row_groups
from aae_batch.manifest.plain import plain_schema
from aae_batch.manifest.repeats import Repeats
from aae_batch.manifest.row import Row, Unreadable, default_id, id_of, read_row, whole_number
from aae_batch.manifest.row_groups import RowGroups
from aae_batch.store.base import expanded, is_url
from aae_batch.store.open import open_url
from aae_batch.store.scratch import scratch_folder

_ENCODING = b"aae_batch.encoding"
_IS_JSON = {_ENCODING: b"json"}
_LINES_AT_ONCE = 20_000
_ROWS_AT_ONCE = 1_000
_COPIED_AT_ONCE = 8
_SEPARATORS = (",", ";", "\t", "|")
_FLOAT = r"^-?\d+(\.0|(\.\d+)?e\+\d+)$"
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
"""What a compressed file begins with, and Arrow's name of the compression."""

_SAVE = "Save it as UTF-8, which a spreadsheet calls CSV UTF-8."
_COMPRESSED = (".gz", ".bz2", ".zst")
FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson")
"""Suffixes of a manifest. All but the first may have one of a compression after them."""


@dataclass(frozen=True)
class Part:
    """A slice of a manifest, not parsed yet. It is cheap to create and to send: the worker that
    generates the rows parses them.

    Attributes:
        start: position of its first row in the manifest.
        repeats: duplicate rows in this part -> the first row of the manifest with the same id.
        folds_case: whether ids that differ only in case are the same.
    """

    start: int
    table: pa.Table
    extra_names: tuple[str, ...]
    repeats: dict[int, int]
    folds_case: bool = False

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
                how = ", but for upper and lower case, which are one on its disk" * self.folds_case
                reason = f"column id: already used by row {first + 1} of the manifest{how}; ids must be unique"
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
        digest: SHA-256 of the file, or of the digests of a folder's parts.
        extras: the columns that are not manifest columns.
    """

    path: str
    digest: str
    extras: pa.Schema
    _groups: RowGroups
    _repeats: Repeats
    _states: set[_State]
    """At which it is known to have this content; empty for a URL."""
    folds_case: bool = False

    def folding_case(self) -> Manifest:
        """Return the same manifest, in which ids that differ only in case are the same."""
        return replace(self, folds_case=True, _repeats=_repeated_ids(self._groups, str.lower))

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
        """Whether it changed since it was opened; False for a URL or a missing file."""
        try:
            if not self._states or (state := _state(self.path)) in self._states:
                return False
            if _digest([Path(self.path, name) for name, *_ in state]) != self.digest:
                return True
            self._states.add(state)  # only the mtime differs
        except OSError:  # deleted or unreachable: the copy has its rows
            pass
        return False

    def part(self, start: int, stop: int) -> Part:
        """Return rows `start` to `stop - 1`, not parsed yet."""
        with _readable(self.path):
            table = self._groups.read(start, stop)
        repeats = self._repeats.within(start, stop)
        return Part(start, table, tuple(self.extras.names), repeats, self.folds_case)

    def read(self, start: int, stop: int) -> tuple[list[Row], pa.Table]:
        """Return rows `start` to `stop - 1`, parsed, and their extra columns."""
        part = self.part(start, stop)
        return part.rows(), part.extras

    def rows(self) -> Iterator[Row]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from self.read(start, min(start + _ROWS_AT_ONCE, len(self)))[0]


@contextmanager
def open_manifest(
    path: str | Path, s3_endpoint: str | None = None, may_have: Collection[str] = ()
) -> Iterator[Manifest]:
    """Open a manifest by its suffix, one of `FORMATS`, or a folder of Parquet files as one manifest.

    Of a folder, files whose names begin with `_` or `.` are left out; the others' rows follow each other
    in the order of their names, in which numbers count by their value.

    Args:
        path: path or URL of the file or folder.
        s3_endpoint: URL of an S3-compatible store, for an `s3://` path.
        may_have: reserved names that columns of it may have; see `names_of_its_manifest`.

    Raises:
        ManifestError: the manifest cannot be read, has no rows, lacks `prompt`, or has a column that
            clashes with one the run adds.
    """
    path = expanded(path)
    if not is_url(path) and not Path(path).exists():
        raise ManifestError(f"Manifest {path} does not exist; check the path.")
    with ExitStack() as stack:
        with _readable(path):
            folder = stack.enter_context(scratch_folder())
            states = (
                set() if is_url(path) else {_state(path)}
            )  # before the copy, whose bytes are hashed
            sources = _copies(path, folder / "source", s3_endpoint)
            digest = _digest(sources)
            parquet = _converted(path, sources, folder, RESERVED.difference(may_have))
            groups = RowGroups(stack.enter_context(row_groups.opened(parquet)))
            if len(groups) == 0:
                raise ManifestError(f"Manifest {path} has no rows.")
            extras = pa.schema([field for field in groups.schema if _column_of(field.name) is None])
            manifest = Manifest(path, digest, extras, groups, _repeated_ids(groups), states)
        yield manifest


def format_of(path: str) -> str | None:
    """Return the suffix in `FORMATS` that a path or URL has, before that of a compression; None without
    one."""
    name = PurePosixPath(path.lower())
    packed = name.suffix in _COMPRESSED
    suffix = PurePosixPath(name.stem).suffix if packed else name.suffix
    return suffix if suffix in FORMATS[packed:] else None


def _copies(path: str, folder: Path, s3_endpoint: str | None) -> list[Path]:
    """Copy a manifest to a new folder, and return its files there, in the order of their rows."""
    fetch: Callable[[str, Path], object]
    names = [(PurePosixPath if is_url(path) else Path)(path).name] if format_of(path) else []
    if is_url(path):
        storage = open_url(path.rstrip("/").rpartition("/")[0], s3_endpoint)
        if not names or not storage.exists(names[0]):
            prefix = open_url(path, s3_endpoint)
            if (parts := _parts(entry.name for entry in prefix.entries(""))) or not names:
                storage, names = prefix, parts
        fetch = storage.download
    else:
        is_folder = Path(path).is_dir()
        parent = Path(path) if is_folder else Path(path).parent
        names = _parts(os.listdir(path)) if is_folder else names

        def fetch(name: str, copy: Path) -> None:
            shutil.copyfile(parent / name, copy)

    if not names and not is_url(path) and is_folder:
        raise ManifestError(
            f"Manifest {path} is a folder without Parquet files; name one file in it, or a folder of Parquet "
            "files."
        )
    if not names:
        raise ManifestError(
            f"Manifest {path} must end in one of {', '.join(FORMATS)}, where all but the first may have "
            f"{', '.join(_COMPRESSED)} after them, or be a folder with Parquet files; convert it to one of "
            "these."
        )
    folder.mkdir()
    many = len(names) > 1
    copies = [folder / (f"{i:08d}.parquet" if many else name) for i, name in enumerate(names)]
    with ThreadPoolExecutor(_COPIED_AT_ONCE) as pool:
        list(pool.map(fetch, names, copies))
    return copies


def _parts(names: Iterable[str]) -> list[str]:
    """Return the Parquet files among the names in a folder, in order."""

    def order(name: str) -> tuple[list[str | int], str]:
        return [int(n) if n.isdecimal() else n for n in re.split(r"(\d+)", name)], name

    return sorted(
        (
            name
            for name in names
            if "/" not in name and name[:1] not in "._" and name.lower().endswith(FORMATS[0])
        ),
        key=order,
    )


def _converted(path: str, sources: Sequence[Path], folder: Path, reserved: Collection[str]) -> Path:
    """Return a Parquet file with the rows of all sources, in columns of plain types and in row groups that
    fit in memory."""
    convert = _CONVERTERS.get(format_of(sources[0].name) or "")
    if convert is not None:
        parquet = folder / "converted.parquet"
        convert(_unpacked(sources[0], folder), parquet)
        sources = [parquet]
    schema = _schema_of(path, sources)
    _check_columns(path, schema, reserved)
    if len(sources) == 1:
        with row_groups.opened(sources[0]) as file:
            if file.schema_arrow.equals(schema) and not row_groups.too_large(file):
                return sources[0]
    row_groups.regroup(sources, schema, folder / "regrouped.parquet")
    return folder / "regrouped.parquet"


def _schema_of(path: str, sources: Sequence[Path]) -> pa.Schema:
    """Return the schema that holds the rows of all sources."""
    schema = pa.schema([])
    for number, source in enumerate(sources, 1):
        with row_groups.opened(source) as file:
            own = plain_schema(file.schema_arrow)
        _refuse_repeats(path, own.names)
        if number == 1:
            schema = own
            continue
        schema, own = _decoded(schema, own), _decoded(own, schema)
        try:
            schema = pa.unify_schemas([schema, own], promote_options="permissive")
        except pa.ArrowException:
            name, kinds = next(
                (field.name, (schema.field(field.name).type, field.type))
                for field in own
                if field.name in schema.names and not _unify(schema.field(field.name), field)
            )
            raise ManifestError(
                f"Manifest {path} has a column {name} that is {kinds[0]} in its first parts and {kinds[1]} "
                f"in part {number}; write it in one type."
            ) from None
    return schema


def _decoded(schema: pa.Schema, other: pa.Schema) -> pa.Schema:
    """Return a schema with the values' type in place of each dictionary that another one does not share."""
    fields = [
        field.with_type(field.type.value_type)
        if pa.types.is_dictionary(field.type)
        and field.name in other.names
        and other.field(field.name).type != field.type
        else field
        for field in schema
    ]
    return pa.schema(fields, metadata=schema.metadata)


def _unify(one: pa.Field, other: pa.Field) -> bool:
    try:
        pa.unify_schemas([pa.schema([one]), pa.schema([other])], promote_options="permissive")
    except pa.ArrowException:
        return False
    return True


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except _ContentError as error:
        raise ManifestError(f"Manifest {path}: {error}") from None
    except UnicodeError as error:
        raise ManifestError(f"Manifest {path} is not UTF-8 text. {_SAVE}") from error
    except (OutputError, pa.ArrowException, OSError, csv.Error) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        said = f"Manifest {path} cannot be read: {lines[0].rstrip('.')}."
        if isinstance(error, pa.ArrowException) and "UTF8" in str(error):
            said += f" {_SAVE}"
        raise ManifestError(said) from error


def _column_of(name: str) -> str | None:
    """Return the manifest column that a name stands for, or None for an extra column."""
    name = ALIASES.get(name, name)
    return name if name in NAMES else None


def _refuse_repeats(path: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ManifestError(f"Manifest {path} has column {name} twice; rename one.")


def _check_columns(path: str, schema: pa.Schema, reserved: Collection[str]) -> None:
    names = schema.names
    if "prompt" not in names:
        raise ManifestError(
            f"Manifest {path} has no column prompt, only {', '.join(names) or 'none'}; name the "
            "column with the texts prompt."
        )
    # Rows are selected with SQL, whose column names are case-insensitive. Spaces are overlooked by people.
    known = {name.lower(): name for name in (*NAMES, *ALIASES, *reserved)}
    for name in names:
        if name in reserved:
            raise ManifestError(
                f"Manifest {path} has a column {name}, a name that is reserved for a column "
                f"that the run adds; rename it, e.g. to my_{name}."
            )
        if (taken := known.setdefault(name.strip().lower(), name)) != name:
            how = "case" if name == name.strip() else "spaces"
            raise ManifestError(
                f"Manifest {path} has a column {name}, which differs from {taken} only in {how}; "
                f"rename it, e.g. to my_{name.strip()}."
            )
        if ALIASES.get(name) in names:
            raise ManifestError(
                f"Manifest {path} has both {name} and {ALIASES[name]}, which mean the same; keep one."
            )


def _repeated_ids(groups: RowGroups, key: Callable[[str], str] | None = None) -> Repeats:
    """Find the rows whose id, or whose id's `key`, an earlier row has."""
    if "id" not in groups.schema.names:
        return Repeats.among(list)
    kind = groups.schema.field("id")

    def ids() -> Iterator[list[str]]:
        start = 0
        for column in groups.column("id"):
            values = _values(column, kind)
            if pa.types.is_string(kind.type) and not _is_json(kind):
                names = [text or default_id(start + i) for i, text in enumerate(values)]
            else:
                names = [id_of(start + i, value) for i, value in enumerate(values)]
            yield names if key is None else [key(name) for name in names]
            start += len(values)

    return Repeats.among(ids)


# --- conversion ----------------------------------------------------------------------------------


def _unpacked(source: Path, folder: Path) -> Path:
    """Decompress a file if it is compressed, whatever its name says."""
    with source.open("rb") as file:
        begins = file.read(4)
    for magic, compression in _COMPRESSIONS.items():
        if begins.startswith(magic):
            target = folder / f"unpacked{format_of(source.name)}"
            with (
                pa.input_stream(str(source), compression=compression) as packed,
                target.open("wb") as file,
            ):
                shutil.copyfileobj(packed, file)
            return target
    return source


def _convert_csv(source: Path, target: Path) -> None:
    """Convert CSV to Parquet: manifest columns stay text and are parsed per row, other types are inferred."""
    with source.open(encoding="utf-8-sig") as file:
        line = file.readline()
        hint = re.fullmatch(r"sep=(.)\s*", line)  # of a spreadsheet
        if hint:
            line = file.readline()
    separator, names = _header(line, source.suffix.lower())
    if any(
        name != name.lstrip() for name in names
    ):  # Arrow takes a space for a part of what follows
        source = _without_spaces(source, separator)
    names = [name.strip() for name in names]
    own = [name for name in names if _column_of(name) is not None]
    table = pa.csv.read_csv(
        pa.OSFile(str(source)),  # by a path, Arrow would decompress by its suffix
        read_options=pa.csv.ReadOptions(column_names=names, skip_rows=2 if hint else 1),
        parse_options=pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(own, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    for i, field in enumerate(table.schema):
        if pa.types.is_binary(field.type):  # inferred only for text that is not UTF-8
            raise _ContentError(f"column {field.name} is not UTF-8; save it as UTF-8 text.")
        if field.name in own:
            texts = pc.utf8_trim_whitespace(table[i])
            texts = pc.if_else(pc.equal(texts, ""), None, texts)
            table = table.set_column(
                i, field, _without_points(texts) if field.name == "id" else texts
            )
    pq.write_table(table, target, row_group_size=_LINES_AT_ONCE)


def _header(line: str, suffix: str) -> tuple[str, list[str]]:
    """Return the separator of a table and its column names: the first separator between which one is
    `prompt`, else a comma, or a tab in a `.tsv`."""
    separators = sorted(
        _SEPARATORS, key=lambda separator: (separator == "\t") != (suffix == ".tsv")
    )
    found = [
        (separator, next(csv.reader([line], delimiter=separator, skipinitialspace=True), []))
        for separator in separators
    ]
    wanted = (pair for pair in found if "prompt" in (name.strip().lower() for name in pair[1]))
    separator, _ = next(wanted, found[0])
    return separator, next(csv.reader([line], delimiter=separator), [])


def _without_spaces(source: Path, separator: str) -> Path:
    target = source.with_name("without-spaces.csv")
    with (
        source.open(encoding="utf-8-sig", newline="") as file,
        target.open("w", encoding="utf-8", newline="") as out,
    ):
        rows = csv.reader(file, delimiter=separator, skipinitialspace=True)
        csv.writer(out, delimiter=separator).writerows(rows)
    return target


def _without_points(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return ids as whole numbers if all are floats, as pandas writes whole numbers beside empty cells."""
    if not pc.all(pc.match_substring_regex(ids, _FLOAT)).as_py():
        return ids
    numbers = ((text, whole_number(text)) for text in ids.to_pylist())
    texts = [text if number is None else str(number) for text, number in numbers]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _convert_jsonl(source: Path, target: Path) -> None:
    """Convert JSONL to Parquet: manifest columns become JSON text, so that a wrong type fails only its
    row; each extra column gets the type that fits all its values, or becomes JSON text if no type does."""
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


_CONVERTERS: dict[str, Callable[[Path, Path], None]] = {
    ".csv": _convert_csv,
    ".tsv": _convert_csv,
    ".jsonl": _convert_jsonl,
    ".ndjson": _convert_jsonl,
}

_State: TypeAlias = tuple[tuple[str, int, int, int], ...]
"""Of each file, or part of a folder: (name in the folder or nothing, mtime, size, inode)."""


def _state(path: str) -> _State:
    names = _parts(os.listdir(path)) if os.path.isdir(path) else [""]
    seen = [(name, os.stat(Path(path, name))) for name in names]
    return tuple((name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in seen)


def _digest(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of a file, or of several files' digests, in order."""
    digests = []
    for path in paths:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
