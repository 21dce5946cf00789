from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aae_batch.errors import ManifestError, PromptError, RequestError
from aae_batch.manifest.reader import open_manifest
from aae_batch.manifest.row import Row, read_row, seed_of
from aae_batch.methods import METHODS


def rows_of(path: str | Path) -> list[Row]:
    with open_manifest(path) as manifest:
        return list(manifest.rows())


def jsonl(path: Path, *records: dict) -> Path:
    file = path / "manifest.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def parquet(path: Path, records: list[dict], **options) -> Path:
    file = path / "manifest.parquet"
    pq.write_table(pa.Table.from_pylist(records), file, **options)
    return file


def test_the_three_formats_say_the_same(tmp_path):
    records = [
        {
            "id": "a",
            "prompt": "a cat and a dog",
            "subjects": ["cat", "dog"],
            "seed": 3,
            "height": 64,
        },
        {"id": "b", "prompt": "a red frog", "subjects": ["red frog"], "seed": None, "height": None},
    ]
    table = tmp_path / "manifest.csv"
    table.write_text(
        "id,prompt,subjects,seed,height\n"
        "a,a cat and a dog,cat;dog,3,64\n"
        'b,a red frog,"[""red frog""]",,\n'
    )
    first = rows_of(parquet(tmp_path, records))
    assert [row.error for row in first] == [None, None]
    assert first[0].request.subjects == ("cat", "dog")
    assert first[1].request.seed == seed_of("b")
    assert rows_of(jsonl(tmp_path, *records)) == first
    assert rows_of(table) == first


def test_ids_and_seeds_have_defaults_that_depend_on_nothing_else(tmp_path):
    row = rows_of(jsonl(tmp_path, {"prompt": "a cat"}))[0]
    assert row.id == "00000000"
    assert row.request.seed == seed_of("00000000") == 2114396121


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"seed": "abc"}, "column seed: 'abc' is not a whole number"),
        ({"seed": 1.5}, "column seed: 1.5 is not a whole number"),
        ({"seed": 2**64}, "use a smaller number"),
        ({"prompt": None}, "column prompt: is empty"),
        ({"prompt": 5}, "column prompt: 5 is not text"),
        ({"height": 100}, "column height: 100 is not a multiple of 8; use 96"),
        ({"width": -8}, "column width: -8 is not a multiple of 8"),
        ({"method": "magic"}, f"use {' or '.join(METHODS)}"),
        ({"num_inference_steps": 0}, "use 1 to 1000"),
        ({"guidance_scale": "much"}, "column guidance_scale: 'much' is not a number from 0"),
        ({"guidance_scale": float("inf")}, "is not a number from 0"),
        ({"subjects": 5}, "column subjects: 5 is not a list"),
        ({"subjects": [5]}, "is not a list of words"),
        ({"subjects": '["cat"'}, "starts like a list but is not one"),
        ({"token_indices": ["x"]}, "is not a list of token positions"),
        ({"id": "../escape"}, "cannot be a file name"),
        ({"id": ".hidden"}, "cannot be a file name"),
        ({"id": "x" * 121}, "cannot be a file name"),
    ],
)
def test_a_bad_value_is_named_with_its_row_and_column(values, said):
    row = read_row(4, {"id": "name", "prompt": "a cat", **values})
    assert isinstance(row.error, RequestError)
    assert str(row.error).startswith(f"row {row.id}: column ")
    assert said in str(row.error)


def test_a_blank_prompt_is_an_error_of_the_prompt():
    assert isinstance(read_row(0, {"prompt": "  "}).error, PromptError)


def test_all_that_is_wrong_with_a_row_is_said_at_once():
    error = read_row(0, {"prompt": "a cat", "seed": "x", "height": 3}).error
    assert "seed" in str(error)
    assert "height" in str(error)


def test_numbers_may_come_as_floats_or_text_as_other_tools_write_them():
    row = read_row(0, {"prompt": "a", "seed": 3.0, "height": "64", "width": float("nan"), "id": 7})
    assert row.error is None
    assert (row.id, row.request.seed, row.request.height, row.request.width) == ("7", 3, 64, None)


@pytest.mark.parametrize("given", [[2, 5], [[2], [5]], "[2, 5]", "2;5"])
def test_token_indices_may_be_flat_or_nested(given):
    assert read_row(0, {"prompt": "a", "token_indices": given}).request.token_indices == (
        (2,),
        (5,),
    )


def test_a_wrong_type_in_jsonl_is_that_row_s_alone(tmp_path):
    rows = rows_of(jsonl(tmp_path, *({"prompt": "a", "seed": seed} for seed in (1, "abc", 3))))
    assert [row.error is None for row in rows] == [True, False, True]


def test_the_second_row_with_an_id_fails(tmp_path):
    ids = ["x", "y", "x", None, "00000003"]
    rows = rows_of(jsonl(tmp_path, *({"prompt": "a", "id": name} for name in ids)))
    assert [row.error is None for row in rows] == [True, True, False, True, False]
    assert "already used by row 1 of the manifest" in str(rows[2].error)
    assert "already used by row 4 of the manifest" in str(rows[4].error)


def test_other_columns_are_carried_as_they_are(tmp_path):
    records = [{"prompt": "a", "price": i / 2, "tags": {"kind": str(i)}} for i in range(10)]
    with open_manifest(parquet(tmp_path, records)) as manifest:
        rows, extras = manifest.read(3, 5)
    assert [row.index for row in rows] == [3, 4]
    assert extras.to_pylist() == [
        {"price": 1.5, "tags": {"kind": "3"}},
        {"price": 2.0, "tags": {"kind": "4"}},
    ]


def test_mixed_types_of_another_column_become_json_text(tmp_path):
    path = jsonl(tmp_path, {"prompt": "a", "x": 1}, {"prompt": "a", "x": "y"}, {"prompt": "a"})
    with open_manifest(path) as manifest:
        assert manifest.read(0, 3)[1]["x"].to_pylist() == ["1", '"y"', None]


def test_a_slice_may_span_row_groups(tmp_path):
    path = parquet(tmp_path, [{"prompt": str(i)} for i in range(10)], row_group_size=4)
    with open_manifest(path) as manifest:
        rows, _ = manifest.read(3, 9)
        assert len(manifest) == 10
    assert [row.request.prompt for row in rows] == ["3", "4", "5", "6", "7", "8"]


def test_subject_indices_is_another_name_for_token_indices(tmp_path):
    row = rows_of(jsonl(tmp_path, {"prompt": "a", "subject_indices": [2]}))[0]
    assert row.request.token_indices == ((2,),)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.jsonl", '{"text": "a cat"}\n', "has no column prompt, only text"),
        ("m.jsonl", '{"prompt": "a"}\n{"prompt"\n', "line 2 is not JSON"),
        ("m.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("m.jsonl", '{"prompt": "a", "status": 1}\n', "rename it, e.g. to my_status"),
        ("m.jsonl", '{"prompt": "a", "token_indices": [2], "subject_indices": [2]}\n', "keep one"),
        ("m.jsonl", "", "no column prompt"),
        ("m.csv", "prompt,id\n", "has no rows"),
        ("m.csv", "prompt,id\na,b,c\n", "cannot be read"),
        ("m.csv", "prompt,prompt\na,b\n", "column prompt twice"),
        ("m.csv", "", "cannot be read"),
        ("m.parquet", "not parquet", "cannot be read"),
        ("m.txt", "prompt", "must end in one of .parquet, .csv, .tsv, .jsonl"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused_in_a_sentence(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ManifestError, match=said):
        rows_of(path)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(ManifestError, match="does not exist"):
        rows_of(tmp_path / "none.csv")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_manifest_may_lie_in_an_object_store(bucket, tmp_path, suffix):
    make = jsonl if suffix == ".jsonl" else lambda path, *records: parquet(path, list(records))
    local = make(tmp_path, {"prompt": "a cat", "seed": 1}, {"prompt": "a dog", "seed": 2})
    url = f"{bucket.url}/in/manifest{suffix}"
    bucket.client.upload_file(str(local), bucket.name, f"in/manifest{suffix}")
    with open_manifest(url) as manifest, open_manifest(local) as same:
        assert (manifest.path, manifest.name) == (url, f"manifest{suffix}")
        assert manifest.digest == same.digest
        assert list(manifest.rows()) == list(same.rows())


def test_what_is_wrong_with_a_manifest_in_an_object_store_is_said_with_its_url(bucket):
    url = f"{bucket.url}/in/manifest.jsonl"
    with pytest.raises(ManifestError, match=f"Manifest {url} cannot be read: .*no such object"):
        rows_of(url)
    bucket.client.put_object(Bucket=bucket.name, Key="in/manifest.jsonl", Body=b"[1]\n")
    with pytest.raises(ManifestError, match=f"^Manifest {url}: line 1 is not a JSON object"):
        rows_of(url)
