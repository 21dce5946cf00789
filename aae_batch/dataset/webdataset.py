"""Tars of images and their JSON, in the format that WebDataset reads."""

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
    """Return a tar with `<id>.png` and `<id>.json` for each row with an image, in the rows' order.

    Args:
        rows: must have a column `id`. The JSON contains the columns of `json_columns`.
        images: each row's encoded image, or None.
        suffix: of the image files, with its dot.
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
    """Yield the name and content of each member of a tar, in order.

    Raises:
        tarfile.TarError: the data is not a tar.
    """
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            file = tar.extractfile(member)
            yield member.name, file.read() if file else b""


def json_columns(schema: pa.Schema) -> list[str]:
    """Return the columns whose values JSON can represent; only these go into a tar."""
    return [column.name for column in schema if _is_json(column.type)]


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to a tar. The bytes depend only on name and content."""
    member = tarfile.TarInfo(name)  # without time and owner
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _is_json(kind: pa.DataType) -> bool:
    """Return whether JSON can represent values of this type without conversion."""
    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_json(kind.value_type)
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        unique = len({field.name for field in fields}) == len(fields)
        return unique and all(_is_json(field.type) for field in fields)
    plain = (pa.null(), pa.bool_(), pa.float32(), pa.float64(), pa.string(), pa.large_string())
    return pa.types.is_integer(kind) or kind in plain


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON cannot represent, by None."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
