"""Tables as pandas, polars, Spark, spreadsheets and others write them are read with the values they mean."""

from __future__ import annotations

import bz2
import gzip
import json
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from aae_batch.errors import ManifestError
from aae_batch.manifest.plain import plain_schema, plain_table
from aae_batch.manifest.reader import open_manifest
from aae_batch.manifest.row import Row, read_row, seed_of

UUIDS = ["8f14e45f-ceea-467f-a9af-3f1c5d9a0b11", "c9f0f895-fb98-4b91-99f4-1c24c4d12f3e"]
CSV = "prompt,subjects,n\na red cat and a dog,red cat;dog,1\na frog,frog,2\n"


def rows_of(path: str | Path) -> list[Row]:
    with open_manifest(path) as manifest:
        return list(manifest.rows())


def extras_of(path: str | Path) -> dict[str, list]:
    with open_manifest(path) as manifest:
        return manifest.read(0, len(manifest))[1].to_pydict()


def parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def extension(kind: pa.DataType, values: list, storage: pa.DataType | None = None) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, pa.array(values, storage or kind.storage_type))


def uuids(*values: str) -> pa.Array:
    return extension(pa.uuid(), [UUID(value).bytes for value in values])


# --- whole numbers -------------------------------------------------------------------------------


def test_whole_numbers_beside_empty_cells_are_read_alike_from_pandas_csv_and_parquet(tmp_path):
    frame = pd.DataFrame(
        {
            "prompt": ["a", "b", "c"],
            "seed": [7.0, None, 123456789012345678.0],
            "id": [1.0, None, 12345678901234567.0],
            "height": [64.0, None, 512.0],
        }
    )
    frame.to_csv(tmp_path / "m.csv", index=False)
    frame.to_parquet(tmp_path / "m.parquet")
    rows = rows_of(tmp_path / "m.csv")
    assert [row.error for row in rows] == [None] * 3
    assert [row.id for row in rows] == ["1", "00000001", "12345678901234568"]
    assert [row.request.seed for row in rows] == [7, seed_of("00000001"), 123456789012345680]
    assert rows == rows_of(tmp_path / "m.parquet")


def test_ids_that_only_look_like_versions_stay_as_they_are(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("prompt,id\na,1.0\nb,1.5\n")
    assert [row.id for row in rows_of(path)] == ["1.0", "1.5"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.uint8(), pa.uint64(), pa.int16(), pa.float16(), pa.float32(), pa.float64(),
        pa.decimal32(9, 2), pa.decimal128(20, 2), pa.decimal256(50, 0),
        pa.dictionary(pa.int8(), pa.int64()),
    ],
    ids=str,
)  # fmt: skip
def test_a_whole_number_is_one_in_any_type(tmp_path, kind):
    values = [Decimal(64)] if pa.types.is_decimal(kind) else [64]
    column = pa.array(values, kind)
    path = parquet(tmp_path / "m.parquet", prompt=["a"], id=column, seed=column, height=column)
    (row,) = rows_of(path)
    assert (row.error, row.id, row.request.seed, row.request.height) == (None, "64", 64, 64)


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_a_seed_of_64_bits_is_stored_as_the_signed_number_of_the_same_noise(tmp_path, seed):
    column = pa.array([seed], pa.uint64())
    (row,) = rows_of(parquet(tmp_path / "m.parquet", prompt=["a"], seed=column))
    assert row.error is None
    assert row.request.seed == seed - 2**64
    noise = [
        torch.randn(4, generator=torch.Generator().manual_seed(n)) for n in (seed, seed - 2**64)
    ]
    assert torch.equal(*noise)


def test_ids_that_differ_only_in_case_are_the_same_where_files_are(tmp_path):
    path = parquet(tmp_path / "m.parquet", prompt=["a"] * 3, id=["Ab", "b", "aB"])
    with open_manifest(path) as manifest:
        assert [row.error for row in manifest.rows()] == [None] * 3
        rows = list(manifest.folding_case().rows())
    assert [row.error is None for row in rows] == [True, True, False]
    assert "already used by row 1 of the manifest, but for upper and lower case" in str(
        rows[2].error
    )


# --- lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        str(["red cat", "dog's"]),
        str(np.array(["red cat", "dog's"])),
        "['red cat'\n \"dog's\"]",
        json.dumps(["red cat", "dog's"]),
        " red cat ; dog's ",
    ],
)
def test_a_list_may_be_written_as_pandas_numpy_and_json_write_it(text):
    row = read_row(0, {"prompt": "a", "subjects": text})
    assert row.request.subjects == ("red cat", "dog's")


@pytest.mark.parametrize(
    "text", ["[[2, 3], [5]]", "[[2 3]\n [5]]", "[(2, 3), 5]", "[[2.0, 3.0] 5]"]
)
def test_positions_may_be_written_likewise(text):
    assert read_row(0, {"prompt": "a", "token_indices": text}).request.token_indices == (
        (2, 3),
        (5,),
    )


@pytest.mark.parametrize(
    "text", ["[red cat, dog]", "['red cat' ...]", "['a'", "[list(['a'])]", "[nan]"]
)
def test_of_a_list_that_cannot_be_understood_the_writings_that_can_are_named(text):
    error = str(read_row(0, {"prompt": "a", "subjects": text}).error)
    assert """write ["cat", "frog"], ['cat', 'frog'] or cat;frog""" in error


def test_a_column_of_lists_that_pandas_wrote_into_csv_is_read(tmp_path):
    frame = pd.DataFrame({"prompt": ["a cat and a dog"], "subjects": [["cat", "dog"]]})
    frame.to_csv(tmp_path / "m.csv", index=False)
    assert rows_of(tmp_path / "m.csv")[0].request.subjects == ("cat", "dog")


# --- types of Arrow ------------------------------------------------------------------------------

TEXTS = {
    "large": pa.array(["a cat", None], pa.large_string()),
    "view": pa.array(["a cat", None], pa.string_view()),
    "bytes": pa.array([b"a cat", None]),
    "bytes view": pa.array([b"a cat", None], pa.binary_view()),
    "dictionary": pa.array(["a cat", None]).dictionary_encode(),
    "json": extension(pa.json_(), ["a cat", None]),
}
LISTS = {
    "large": pa.array([["cat"], None], pa.large_list(pa.large_string())),
    "of views": pa.array([["cat"], None], pa.list_(pa.string_view())),
    "view": pa.array([["cat"], None], pa.list_view(pa.string())),
    "large view": pa.array([["cat"], None], pa.large_list_view(pa.string_view())),
    "fixed size": pa.array([["cat"], None], pa.list_(pa.string(), 1)),
}


@pytest.mark.parametrize("column", TEXTS.values(), ids=TEXTS)
def test_text_is_read_from_every_type_that_holds_it(tmp_path, column):
    path = parquet(tmp_path / "m.parquet", prompt=column, negative_prompt=column, other=column)
    rows = rows_of(path)
    assert [row.request.prompt for row in rows] == ["a cat", ""]
    assert [row.request.negative_prompt for row in rows] == ["a cat", None]
    assert extras_of(path)["other"] == column.to_pylist()


@pytest.mark.parametrize("column", LISTS.values(), ids=LISTS)
def test_lists_are_read_from_every_type_that_holds_them(tmp_path, column):
    path = parquet(tmp_path / "m.parquet", prompt=["a cat", "a"], subjects=column, other=column)
    rows = rows_of(path)
    assert [row.error for row in rows] == [None, None]
    assert [row.request.subjects for row in rows] == [("cat",), None]
    assert extras_of(path)["other"] == column.to_pylist()


def test_extension_types_become_what_they_store_and_a_uuid_its_text(tmp_path):
    columns = {
        "id": uuids(*UUIDS),
        "uuid": uuids(*UUIDS),
        "uuids": pa.ListArray.from_arrays([0, 1, 2], uuids(*UUIDS)),
        "json": extension(pa.json_(), ['{"a": 1}', None]),
        "flag": extension(pa.bool8(), [1, 0]),
        "tensor": extension(pa.fixed_shape_tensor(pa.float32(), [2]), [[1, 2], [3, 4]]),
    }
    path = parquet(tmp_path / "m.parquet", prompt=["a", "b"], **columns)
    assert [(row.id, row.error) for row in rows_of(path)] == [(uuid, None) for uuid in UUIDS]
    assert extras_of(path) == {
        "uuid": UUIDS,
        "uuids": [[uuid] for uuid in UUIDS],
        "json": ['{"a": 1}', None],
        "flag": [True, False],
        "tensor": [[1, 2], [3, 4]],
    }


def test_runs_and_maps_have_a_plain_form():
    table = pa.table(
        {
            "run": pc.run_end_encode(pa.array(["a", "a", "b"])),
            "map": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int32())),
        }
    )
    schema = plain_schema(table.schema)
    assert plain_table(table, schema).to_pydict() == {
        "run": ["a", "a", "b"],
        "map": [[{"key": "a", "value": 1}], [], None],
    }
    assert plain_schema(schema) == schema


# --- text files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.tsv", CSV.replace(",", "\t")),
        ("m.TSV", CSV.replace(",", "\t")),
        ("m.csv", CSV.replace(",", "\t")),
        ("m.csv", "prompt;subjects;n\na red cat and a dog;\"red cat;dog\";1\na frog;frog;2\n"),
        ("m.csv", '\ufeffprompt;subjects;n\r\na red cat and a dog;"red cat;dog";1\r\na frog;frog;2\r\n'),
        ("m.csv", "sep=;\r\n" + CSV.replace(";", "\0").replace(",", ";").replace("red cat\0dog", '"red cat;dog"')),
        ("m.csv", CSV.replace(",", ", ")),
        ("m.csv", CSV.replace(",", " , ")),
        ("m.csv", 'prompt, subjects, n\na red cat and a dog, "red cat;dog", 1\na frog, "frog", 2\n'),
        ("m.ndjson", "".join(
            json.dumps({"prompt": prompt, "subjects": subjects, "n": n}) + "\n"
            for prompt, subjects, n in (("a red cat and a dog", ["red cat", "dog"], 1), ("a frog", ["frog"], 2))
        )),
    ],
    ids=["tsv", "TSV", "tabs", "semicolons", "excel", "sep", "spaces", "more spaces", "quotes", "ndjson"],
)  # fmt: skip
def test_a_table_is_read_like_a_csv_with_commas(tmp_path, name, text):
    (tmp_path / "plain.csv").write_text(CSV)
    path = tmp_path / name
    path.write_bytes(text.encode())
    rows = rows_of(path)
    assert [row.request.subjects for row in rows] == [("red cat", "dog"), ("frog",)]
    assert rows == rows_of(tmp_path / "plain.csv")
    assert extras_of(path) == {"n": [1, 2]}


def zstandard(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("m.csv.gz", gzip.compress),
        ("m.csv.bz2", bz2.compress),
        ("m.csv.zst", zstandard),
        ("m.csv", gzip.compress),
        ("m.CSV.GZ", lambda data: gzip.compress(data[:30]) + gzip.compress(data[30:])),
        ("m.csv.gz", bytes),
    ],
)
def test_a_compressed_table_is_read_whatever_its_name_says(tmp_path, name, pack):
    (tmp_path / "plain.csv").write_text(CSV)
    (tmp_path / name).write_bytes(pack(CSV.encode()))
    assert rows_of(tmp_path / name) == rows_of(tmp_path / "plain.csv")
    lines = b'{"prompt": "a cat"}\n{"prompt": "a dog"}\n'
    packed = tmp_path / name.lower().replace("csv", "jsonl")
    packed.write_bytes(pack(lines))
    assert [row.request.prompt for row in rows_of(packed)] == ["a cat", "a dog"]


def test_cells_of_a_spaced_csv_that_are_blank_are_empty(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("prompt, seed, method\na cat, , \n")
    (row,) = rows_of(path)
    assert (row.error, row.request.seed, row.request.method) == (None, seed_of("00000000"), None)


def test_a_column_that_differs_only_in_spaces_is_refused(tmp_path):
    path = parquet(tmp_path / "m.parquet", **{"prompt": ["a"], " subjects": ["a"]})
    with pytest.raises(ManifestError, match="differs from subjects only in spaces"):
        rows_of(path)


# --- a folder of parts ---------------------------------------------------------------------------


def parts(folder: Path, **named: dict) -> Path:
    folder.mkdir()
    for name, columns in named.items():
        parquet(folder / f"{name}.parquet", **columns)
    return folder


def test_a_folder_of_parquet_parts_is_one_manifest_in_the_order_of_names(tmp_path):
    names = ["part-10", "part-2", "part-1"]
    folder = parts(tmp_path / "m.parquet", **{name: {"prompt": [name], "x": [1]} for name in names})
    for other in ("_SUCCESS", ".part-1.parquet.crc", "_metadata.parquet", "00000_stats.json"):
        (folder / other).write_bytes(b"")
    (folder / "more").mkdir()
    assert [row.request.prompt for row in rows_of(folder)] == ["part-1", "part-2", "part-10"]
    assert [row.index for row in rows_of(f"{folder}/")] == [0, 1, 2]


def test_parts_may_differ_in_types_of_the_same_values_and_in_columns(tmp_path):
    folder = parts(
        tmp_path / "m",
        a={"prompt": ["a"], "x": pa.nulls(1), "seed": pa.array([1], pa.int8()), "w": pa.array([1])},
        b={"prompt": pa.array(["b"], pa.string_view()), "x": ["text"], "seed": pa.array([2.0])},
        c={"prompt": pa.array(["c"], pa.large_string()), "x": uuids(UUIDS[0])},
    )
    rows = rows_of(folder)
    assert [(row.request.prompt, row.request.seed) for row in rows] == [
        ("a", 1),
        ("b", 2),
        ("c", seed_of("00000002")),
    ]
    assert extras_of(folder) == {"x": [None, "text", UUIDS[0]], "w": [1, None, None]}


def test_parts_that_do_not_fit_are_refused_with_the_column(tmp_path):
    folder = parts(tmp_path / "m", a={"prompt": ["a"], "x": [1]}, b={"prompt": ["b"], "x": ["c"]})
    with pytest.raises(
        ManifestError, match="column x that is int64 in its first parts and string in part 2"
    ):
        rows_of(folder)


@pytest.mark.parametrize("first", [["prompt"], ["prompt", "x", "x"]])
def test_a_part_that_repeats_a_column_is_refused(tmp_path, first):
    for i, names in enumerate([first, ["prompt", "x", "x"]]):
        pq.write_table(pa.table([["a"]] * len(names), names=names), tmp_path / f"{i}.parquet")
    with pytest.raises(ManifestError, match="has column x twice; rename one"):
        rows_of(tmp_path)


@pytest.mark.parametrize("codes", [pa.int8(), pa.int16()])
def test_a_category_is_its_text_where_parts_write_it_otherwise(tmp_path, codes):
    kinds = (pa.dictionary(pa.int8(), pa.string()), pa.dictionary(codes, pa.string()), pa.string())
    columns = {
        f"p{i}": {"prompt": ["a"], "x": pa.array(["b"], kind)} for i, kind in enumerate(kinds)
    }
    assert extras_of(parts(tmp_path / "m", **columns)) == {"x": ["b", "b", "b"]}


def test_a_folder_changes_with_any_of_its_parts(tmp_path):
    folder = parts(tmp_path / "m", a={"prompt": ["a"]}, b={"prompt": ["b"]})
    with open_manifest(folder) as manifest:
        assert not manifest.changed
        content = (folder / "b.parquet").read_bytes()
        (folder / "b.parquet").write_bytes(content)  # the same, at another time
        (folder / "_SUCCESS").write_bytes(b"")
        assert not manifest.changed
        parquet(folder / "c.parquet", prompt=["c"])
        assert manifest.changed
        (folder / "c.parquet").unlink()
        parquet(folder / "b.parquet", prompt=["d"])
        assert manifest.changed


@pytest.mark.parametrize("place", ["in/parts", "in/parts/", "in/m.parquet"])
def test_parts_may_lie_in_an_object_store(bucket, tmp_path, place):
    folder = parts(tmp_path / "m", a={"prompt": ["a"]}, b={"prompt": ["b"]})
    for path in folder.iterdir():
        bucket.client.upload_file(str(path), bucket.name, f"{place.rstrip('/')}/{path.name}")
    bucket.client.put_object(Bucket=bucket.name, Key=f"{place.rstrip('/')}/_SUCCESS", Body=b"")
    with open_manifest(f"{bucket.url}/{place}") as manifest, open_manifest(folder) as same:
        assert manifest.digest == same.digest
        assert [row.request.prompt for row in manifest.rows()] == ["a", "b"]


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.csv").write_text(CSV)
    assert len(rows_of("~/m.csv")) == 2
