"""A manifest, one row per image: Parquet, or CSV and JSONL, which are converted to it.

The columns are `layout.MANIFEST_COLUMNS`, of which only `prompt` is required; others are carried to
the metadata table as they are. What is wrong with the manifest as a whole is a `ManifestError`;
what is wrong with one row stays with that row.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from aae_batch.dataset.layout import MANIFEST_COLUMNS, RESERVED
from aae_batch.errors import ManifestError, RequestError
from aae_batch.row import ID_DIGITS, Row, id_text, read_row

COLUMNS = tuple(column.name for column in MANIFEST_COLUMNS)
ALIASES = {"subject_indices": "token_indices"}

_ENCODING = b"aae_batch.encoding"
_LINES_AT_ONCE = 20_000


@dataclass(frozen=True)
class Manifest:
    """An open manifest. Rows are read a row group at a time.

    Attributes:
        path: the file that was opened.
        digest: SHA-256 of the file.
        extras: the columns that are none of ours.
    """

    path: Path
    digest: str
    extras: pa.Schema
    _file: pq.ParquetFile
    _group_starts: tuple[int, ...]
    _first_uses: dict[int, int]
    """Of each row whose id was used before: the row that used it first."""

    def __len__(self) -> int:
        return self._group_starts[-1]

    def read(self, start: int, stop: int) -> tuple[list[Row], pa.Table]:
        """The rows from `start` up to `stop`, and their extra columns."""
        table = self._slice(start, stop)
        own = [name for name in table.column_names if ALIASES.get(name, name) in COLUMNS]
        values = {ALIASES.get(name, name): _decode(table, name) for name in own}
        rows = []
        for i in range(table.num_rows):
            row = read_row(start + i, {name: column[i] for name, column in values.items()})
            if row.error is None and row.index in self._first_uses:
                first = self._first_uses[row.index] + 1
                reason = (
                    f"column id: already used by row {first} of the manifest; ids must be unique"
                )
                row = replace(row, error=RequestError(row.id, reason))
            rows.append(row)
        return rows, table.select(self.extras.names)

    def rows(self) -> Iterator[Row]:
        """All rows in order."""
        for start, stop in zip(self._group_starts, self._group_starts[1:], strict=False):
            yield from self.read(start, stop)[0]

    def _slice(self, start: int, stop: int) -> pa.Table:
        groups = [
            group
            for group, first in enumerate(self._group_starts[:-1])
            if first < stop and self._group_starts[group + 1] > start
        ]
        with _readable(self.path):
            table = self._file.read_row_groups(groups)
        return table.slice(start - self._group_starts[groups[0]], stop - start)


@contextmanager
def open_manifest(path: str | Path) -> Iterator[Manifest]:
    """Open a manifest by its suffix: `.parquet`, `.csv`, `.jsonl`.

    Raises:
        ManifestError: it cannot be read, has no rows, lacks `prompt`, or has a column that would
            clash with one the run adds.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"Manifest {path} does not exist; check the path.")
    converters = {".parquet": None, ".csv": _convert_csv, ".jsonl": _convert_jsonl}
    suffix = path.suffix.lower()
    if suffix not in converters:
        raise ManifestError(
            f"Manifest {path} is none of {', '.join(converters)}; convert it to one."
        )
    with ExitStack() as stack:
        with _readable(path):
            digest = _digest(path)
            parquet, convert = path, converters[suffix]
            if convert is not None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="aae-batch-"))
                parquet = Path(folder) / "manifest.parquet"
                convert(path, parquet)
            file = stack.enter_context(pq.ParquetFile(parquet, memory_map=True))
            _check_columns(path, file.schema_arrow)
            manifest = _opened(path, digest, file)
        yield manifest


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as error:
        raise ManifestError(f"Manifest {path} cannot be read: {_first_line(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"Manifest {path} cannot be read: {error}.") from error


def _opened(path: Path, digest: str, file: pq.ParquetFile) -> Manifest:
    starts = [0]
    for group in range(file.num_row_groups):
        starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
    if starts[-1] == 0:
        raise ManifestError(f"Manifest {path} has no rows.")
    extras = [f for f in file.schema_arrow if ALIASES.get(f.name, f.name) not in COLUMNS]
    return Manifest(path, digest, pa.schema(extras), file, tuple(starts), _repeated_ids(file))


def _check_columns(path: Path, schema: pa.Schema) -> None:
    names = schema.names
    if "prompt" not in names:
        raise ManifestError(
            f"Manifest {path} has no column prompt, only {', '.join(names) or 'none'}; name the "
            "column with the texts prompt."
        )
    for name in names:
        if names.count(name) > 1:
            raise ManifestError(f"Manifest {path} has column {name} twice; rename one.")
        if name in RESERVED:
            raise ManifestError(
                f"Manifest {path} has a column {name}, which is a name that the run gives to a "
                f"column of its own; rename it, e.g. to my_{name}."
            )
        if ALIASES.get(name) in names:
            raise ManifestError(
                f"Manifest {path} has both {name} and {ALIASES[name]}, which mean the same; keep one."
            )


def _repeated_ids(file: pq.ParquetFile) -> dict[int, int]:
    """Of each row whose id an earlier row has: that row. Ids stay in Arrow; only repeats come out."""
    if "id" not in file.schema_arrow.names:
        return {}
    table = file.read(["id"])
    if _encoding(table.schema, "id") == b"json" or not pa.types.is_string(
        table.schema.field("id").type
    ):
        ids = pa.array((id_text(value) for value in _decode(table, "id")), pa.string())
    else:
        ids = table["id"]
    default = pc.utf8_lpad(pa.array(range(len(ids))).cast(pa.string()), ID_DIGITS, padding="0")
    ids = pc.coalesce(ids, default)
    counts = pc.value_counts(ids)
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated) == 0:
        return {}
    which = pc.index_in(ids, repeated)
    rows = pc.indices_nonzero(pc.is_valid(which)).to_pylist()
    first: dict[int, int] = {}
    uses = {}
    for row, value in zip(rows, which.drop_null().to_pylist(), strict=True):
        if value in first:
            uses[row] = first[value]
        else:
            first[value] = row
    return uses


# --- conversion ----------------------------------------------------------------------------------


def _convert_csv(source: Path, target: Path) -> None:
    """Our columns stay text, to be read row by row; the types of others are inferred."""
    with source.open(encoding="utf-8-sig") as file:
        header = pa.csv.read_csv(
            pa.BufferReader(file.readline().encode()),
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        ).column_names
    own = [name for name in header if ALIASES.get(name, name) in COLUMNS]
    table = pa.csv.read_csv(
        source,
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(own, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    pq.write_table(table, target, row_group_size=_LINES_AT_ONCE)


def _convert_jsonl(source: Path, target: Path) -> None:
    """Our columns become JSON text, so that a wrong type is that row's alone; others get the one
    type that fits all their values, or JSON text where there is none."""
    schema = pa.schema([])
    texts: set[str] = set()
    for records in _json_chunks(source):
        for name in dict.fromkeys(name for record in records for name in record):
            if ALIASES.get(name, name) in COLUMNS:
                texts.add(name)
            if name in texts:
                continue
            try:
                kind = pa.array([record.get(name) for record in records]).type
                schema = pa.unify_schemas(
                    [schema, pa.schema([(name, kind)])], promote_options="permissive"
                )
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
                texts.add(name)
    names = [*schema.names, *sorted(texts - set(schema.names))]
    own = {b"aae_batch.encoding": b"json"}
    fields = []
    for name in names:
        if ALIASES.get(name, name) in COLUMNS:
            fields.append(pa.field(name, pa.string(), metadata=own))
        else:
            fields.append(pa.field(name, pa.string() if name in texts else schema.field(name).type))
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


def _json_texts(records: list[dict], name: str) -> pa.Array:
    values = (record.get(name) for record in records)
    return pa.array((None if v is None else json.dumps(v) for v in values), pa.string())


def _json_chunks(source: Path) -> Iterator[list[dict]]:
    with source.open(encoding="utf-8-sig") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        while chunk := list(islice(lines, _LINES_AT_ONCE)):
            yield [_json_record(source, number, line) for number, line in chunk]


def _json_record(source: Path, number: int, line: str) -> dict:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ManifestError(f"Manifest {source}: line {number} is not JSON: {error}.") from None
    if not isinstance(record, dict):
        raise ManifestError(
            f"Manifest {source}: line {number} is not a JSON object; write {{...}}."
        )
    return record


def _encoding(schema: pa.Schema, name: str) -> bytes | None:
    return (schema.field(name).metadata or {}).get(_ENCODING)


def _decode(table: pa.Table, name: str) -> list[Any]:
    values = table[name].to_pylist()
    if _encoding(table.schema, name) == b"json":
        return [None if value is None else json.loads(value) for value in values]
    return values


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return _sha256_of(file)


def _sha256_of(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") + "."
