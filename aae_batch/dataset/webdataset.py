"""Pictures and what is said of them in one tar, as WebDataset reads it."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from aae_batch.dataset.layout import member_name


def tar_of(rows: pa.Table, images: Sequence[bytes | None], suffix: str) -> bytes:
    """A tar of `<id>.png` and `<id>.json` for each row with a picture, in their order.

    Args:
        rows: has a column `id`; the JSON has those of its columns whose values JSON has.
        images: a picture's bytes for each row, or None.
        suffix: of the pictures' names, with its dot.
    """
    described = json_columns(rows.schema)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for row, image in zip(rows.select(described).to_pylist(), images, strict=True):
            if image is not None:
                text = json.dumps(_finite(row), ensure_ascii=False).encode()
                add_member(tar, member_name(row["id"], suffix), image)
                add_member(tar, member_name(row["id"], ".json"), text)
    return buffer.getvalue()


def tar_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The members of a shard's tar, in order.

    Raises:
        tarfile.TarError: it is none.
    """
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            file = tar.extractfile(member)
            yield member.name, file.read() if file else b""


def json_columns(schema: pa.Schema) -> list[str]:
    """The columns whose values JSON has, which are those that a tar has."""
    return [column.name for column in schema if _is_json(column.type)]


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to a tar: the same bytes for the same file, whenever and by whomever it is added."""
    member = tarfile.TarInfo(name)  # of no time and of no owner
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _is_json(kind: pa.DataType) -> bool:
    """Does JSON have the values of this type as they are?"""
    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_json(kind.value_type)
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        unique = len({field.name for field in fields}) == len(fields)
        return unique and all(_is_json(field.type) for field in fields)
    plain = (pa.null(), pa.bool_(), pa.float32(), pa.float64(), pa.string(), pa.large_string())
    return pa.types.is_integer(kind) or kind in plain


def _finite(value: Any) -> Any:
    """`value` with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
