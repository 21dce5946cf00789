"""Every block of docs/loading.md runs as it stands, on an output of the layout that it is about."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aae_batch.dataset.reader import Dataset
from aae_batch.export.export import ExportSettings, export
from aae_batch.export.formats import FORMATS
from aae_batch.store.open import open_storage

LOADING = Path(__file__).parents[2] / "docs" / "loading.md"
BLOCKS = re.findall(r"```python\n(.*?)```", LOADING.read_text(encoding="utf-8"), re.DOTALL)
LAYOUTS = ("files", "webdataset", "parquet")
TABLES = ("files", "parquet")
"""Layouts whose tables differ: those of `webdataset` are those of `files`."""
OK = ["a", "b", "c", "d.1"]


def run(index: int, **names) -> dict:
    """The names that a block leaves, given those that it uses."""
    exec(compile(BLOCKS[index], str(LOADING), "exec"), names)
    return names


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Of the library `datasets`, which would keep what it has read in the home folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def output_of(make_output):
    return lambda layout, *root: make_output(layout, *root).storage.root


def test_every_block_is_run_here():
    assert len(BLOCKS) == 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_a_notebook(output_of, layout):
    names = run(0, output=output_of(layout))
    assert list(names["rows"]["id"]) == ["a", "b", "c", "bad", "d.1"]
    assert names["picture"].size == names["map_of_dog"].size == (16, 8)


@pytest.mark.parametrize(("index", "layout"), [(1, "files"), (3, "parquet")])
def test_datasets_shows_pictures_and_columns(output_of, index, layout):
    rows = run(index, output=output_of(layout))["rows"]
    assert list(rows["id"]) == OK
    assert [image.getpixel((0, 0))[0] for image in rows["image"]] == [0, 40, 80, 160]
    assert rows[0]["subjects"] == ["cat", "dog"]
    assert {"prompt", "seed", "method", "final_loss", "neglected"} <= set(rows.column_names)


def test_datasets_reads_tars(output_of):
    rows = run(2, output=output_of("webdataset"))["rows"]
    assert [row["id"] for row in rows["json"]] == OK
    assert [image.getpixel((0, 0))[0] for image in rows["png"]] == [0, 40, 80, 160]


def test_datasets_reads_tars_whose_columns_have_their_first_value_late(make_output):
    rows = [{"id": f"r{i}", "prompt": "a cat", "method": "stable-diffusion"} for i in range(8)]
    rows[7] |= {"negative_prompt": "blur", "note": "late"}
    loaded = run(2, output=make_output("webdataset", rows=rows).storage.root)["rows"]
    assert [row["negative_prompt"] for row in loaded["json"]] == [None] * 7 + ["blur"]
    assert loaded[7]["json"]["note"] == "late"


def test_webdataset_iterates_the_tars(output_of):
    pairs = list(run(4, output=output_of("webdataset"))["pairs"])
    assert [row["id"] for _, row in pairs] == OK
    assert [image.getpixel((0, 0))[0] for image, _ in pairs] == [0, 40, 80, 160]


@pytest.mark.parametrize("layout", TABLES)
@pytest.mark.parametrize("where", ["disk", "s3"])
def test_pandas_reads_the_tables(output_of, layout, where, request):
    root = () if where == "disk" else (f"{request.getfixturevalue('bucket').url}/out",)
    names = run(5, output=output_of(layout, *root))
    assert list(names["rows"]["id"]) == ["a", "b", "c", "bad", "d.1"]
    assert list(names["seen"]["subject"]) == ["cat", "dog", "a cat", "cat"]


@pytest.mark.parametrize("layout", TABLES)
def test_duckdb_reads_the_tables_on_disk(make_output, layout):
    output = make_output(layout, losses={"c": 0.75}).storage.root
    assert run(6, output=output)["worst"][0] == ("a cat", 0.75)


@pytest.mark.parametrize("layout", TABLES)
def test_duckdb_reads_the_tables_in_s3(output_of, layout, bucket):
    names = run(7, output=output_of(layout, f"{bucket.url}/out"))
    assert names["counts"] == [
        ("attend-and-excite", "failed", 1),
        ("attend-and-excite", "ok", 3),
        ("stable-diffusion", "ok", 1),
    ]


def test_arrow_is_told_of_another_store(output_of, bucket, monkeypatch):
    output = output_of("files", f"{bucket.url}/out")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert run(8, output=output, endpoint=bucket.endpoint)["rows"].count_rows() == 5


@pytest.mark.parametrize("format", FORMATS)
def test_datasets_loads_an_export(output_of, tmp_path, format):
    to = tmp_path / "exported"
    export(Dataset(output_of("files")), open_storage(to), ExportSettings(format=format))
    rows = run(9, exported=str(to))["rows"]
    assert rows.num_rows == len(OK)
    assert rows[0]["png" if format == "webdataset" else "image"].size == (16, 8)
