"""Types that every reader of Parquet knows, for columns of types that some lack.

Arrow has several types for the same values. Of text in views, lists in views, small decimals, maps and
extension types, tables of a run and exports hold the plain form: what Arrow's own functions and Hugging
Face's `datasets` read.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pyarrow as pa

_OF_EXTENSIONS = {"arrow.uuid": pa.string(), "arrow.bool8": pa.bool_()}
"""The plain form of an extension type, if it is not its storage."""


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Return a schema with the plain form of each type."""
    fields = [
        field if field.type == (kind := plain_type(field.type)) else pa.field(field.name, kind)
        for field in schema
    ]
    return pa.schema(fields, metadata=schema.metadata)


def plain_table(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table with the columns of `schema`, in its types; a column that it lacks is null."""
    columns = [
        _converted(table[field.name], field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the plain form of a type: a type of the same values."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _OF_EXTENSIONS.get(kind.extension_name) or plain_type(kind.storage_type)
    if types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if types.is_dictionary(kind):
        value = plain_type(kind.value_type)
        return kind if value == kind.value_type else value
    if types.is_string_view(kind):
        return pa.string()
    if types.is_binary_view(kind):
        return pa.binary()
    if types.is_decimal32(kind) or types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    if types.is_map(kind):
        entry = [("key", plain_type(kind.key_type)), ("value", plain_type(kind.item_type))]
        return pa.list_(pa.struct(entry))
    if types.is_struct(kind):
        return pa.struct([field.with_type(plain_type(field.type)) for field in kind])
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(_plain_entry(kind), kind.list_size)
    if types.is_list(kind):
        return pa.list_(_plain_entry(kind))
    if types.is_large_list(kind):
        return pa.large_list(_plain_entry(kind))
    return kind


def _plain_entry(kind: pa.DataType) -> pa.Field:
    return kind.value_field.with_type(plain_type(kind.value_type))


def _converted(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if column.type == kind:
        return column
    if not _is_cast_wrong(column.type):
        try:
            return column.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            pass
    chunks = [pa.array(map(_plain_value, chunk.to_pylist()), kind) for chunk in column.chunks]
    return pa.chunked_array(chunks, kind)


def _is_cast_wrong(kind: pa.DataType) -> bool:
    """Return whether Arrow's cast would take the bytes of a UUID for its text, or, as it does with null
    lists, the places of a view for those of a list."""
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return True
    if isinstance(kind, pa.BaseExtensionType):
        return kind.extension_name == "arrow.uuid" or _is_cast_wrong(kind.storage_type)
    return any(_is_cast_wrong(kind.field(i).type) for i in range(kind.num_fields))


def _plain_value(value: Any) -> Any:
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, list):
        return [_plain_value(entry) for entry in value]
    if isinstance(value, tuple):  # an entry of a map
        return dict(zip(("key", "value"), map(_plain_value, value), strict=True))
    if isinstance(value, dict):
        return {name: _plain_value(inner) for name, inner in value.items()}
    return value
