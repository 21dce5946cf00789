"""Whatever a manifest holds: it is refused in a sentence, or the row that is wrong is wrong alone."""

from __future__ import annotations

import datetime
import gzip
import json
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aae_batch.dataset.layouts import Files
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.writer import failed
from aae_batch.errors import ManifestError, RequestError, SubjectError
from aae_batch.manifest.reader import open_manifest
from aae_batch.manifest.row import Row, read_row
from aae_batch.request import Result
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.words import resolve_subjects
from aae_batch.store.open import open_storage
from training.networks import tokenizer

HALF_A_PAIR = "a \ud800 cat"
TOO_DEEP = "[" * 100_000 + "]" * 100_000

UNSAFE_IDS = [
    "../x", "../../etc/passwd", "a/b", "/abs", "..", ".", ".hidden", "-rf", "a\\b", "..\\x", "C:x",
    "a\0b", "a\nb", "a ", " ", "x" * 121, "x" * 1_000_000, "\U0001f438", "\u202egnp.exe", "\u00e9",
    "%2e%2e%2fx", "a:b", "a*", "s3://bucket/x", HALF_A_PAIR, "~", "$HOME", "`id`",
]  # fmt: skip
ODD_IDS = ["CON", "nul", "a.", "a..", "a..b", "a.png", "00000", "_", "x" * 120]

WRONG_VALUES = [
    {"prompt": 7}, {"prompt": ["a"]}, {"prompt": {"a": 1}}, {"prompt": True}, {"prompt": None},
    {"prompt": ""}, {"prompt": HALF_A_PAIR}, {"negative_prompt": HALF_A_PAIR},
    {"negative_prompt": 1}, {"subjects": [HALF_A_PAIR]}, {"subjects": {"cat": 1}},
    {"subjects": [["cat"]]}, {"subjects": TOO_DEEP}, {"subjects": "[1"},
    {"token_indices": [[[2]]]}, {"token_indices": [2**40]}, {"token_indices": {"a": 2}},
    {"token_indices": "[[2], x]"}, {"token_indices": TOO_DEEP}, {"seed": [1]}, {"seed": True},
    {"seed": "9" * 5000}, {"seed": 2**64}, {"seed": 0.5}, {"height": 10**400},
    {"height": 8 * 10**12}, {"width": 7}, {"width": -(10**400)},
    {"num_inference_steps": 10**9}, {"num_inference_steps": "many"}, {"guidance_scale": 10**400},
    {"guidance_scale": [7.5]}, {"guidance_scale": -1}, {"guidance_scale": True},
    {"method": ["stable-diffusion"]}, {"method": 1},
]  # fmt: skip
"""Each is wrong in the only column it has."""


def jsonl(folder: Path, *records: dict) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def parquet(folder: Path, **columns) -> Path:
    path = folder / "manifest.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def rows_of(path: Path) -> list[Row]:
    with open_manifest(path) as manifest:
        return list(manifest.rows())


def write_dataset(path: Path, root: Path) -> pa.Table:
    """The tables and, of rows that are not wrong, a picture each, as a job writes them."""
    storage, config = open_storage(root), GuidanceConfig()
    picture = Image.new("RGB", (8, 8))
    with open_manifest(path) as manifest:
        rows, extras = manifest.read(0, len(manifest))
        into = Files(storage, 0, "f")
        outcomes = [
            failed(row, config)
            if row.error
            else into.write_image(row, Result(row.request, picture), config)
            for row in rows
        ]
        into.commit(outcomes, extras)
    return Dataset(root).metadata()


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- one row is wrong ----------------------------------------------------------------------------


def test_no_id_leads_out_of_the_output(tmp_path):
    ids = [*UNSAFE_IDS, *ODD_IDS]
    path = jsonl(tmp_path, *({"prompt": "a cat", "id": name} for name in ids))
    table = write_dataset(path, tmp_path / "deep" / "out")
    status = dict(zip(ids, table["status"].to_pylist(), strict=True))
    assert {name for name in ids if status[name] == "failed"} == set(UNSAFE_IDS)
    assert files(tmp_path) == {
        "manifest.jsonl",
        "deep/out/metadata/00000.parquet",
        "deep/out/attention/00000.parquet",
        *(f"deep/out/images/00000/{name}.png" for name in ODD_IDS),
    }
    for error in table["error"].drop_null().to_pylist():
        assert "cannot be a file name" in error


@pytest.mark.parametrize(
    "values",
    WRONG_VALUES,
    ids=lambda values: str(values)[:60].encode("ascii", "replace").decode(),
)
def test_a_wrong_value_is_its_row_s_alone_and_can_be_written_down(tmp_path, values):
    good = {"prompt": "a cat", "subjects": ["cat"], "id": "good"}
    path = jsonl(tmp_path, good, {"prompt": "a cat", "id": "bad"} | values, good | {"id": "last"})
    table = write_dataset(path, tmp_path / "out")
    assert table["status"].to_pylist() == ["ok", "failed", "ok"]
    (column,) = values
    error = table["error"][1].as_py()
    assert error.startswith(f"row bad: column {column}: ")
    assert len(error) < 500
    assert table["id"].to_pylist() == ["good", "bad", "last"]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("prompt", pa.array([1.5, None])),
        ("prompt", pa.array([b"\xff", b"\xff"])),
        ("prompt", pa.nulls(2)),
        ("prompt", pa.array([b"\xff\xfe", b"\x80"]).view(pa.string())),
        ("seed", pa.array([datetime.date(2020, 1, 1), None])),
        ("seed", pa.array([2**50, 2**51]).cast(pa.timestamp("ms"))),
        ("seed", pa.array([1, 2]).cast(pa.timestamp("ns"))),
        ("id", pa.array([b"\xff", b"\xfe"]).view(pa.string())),
        ("id", pa.array([[1], [2]])),
        ("subjects", pa.array([{"a": 1}, {"a": 2}])),
        ("height", pa.array([True, True])),
    ],
    ids=lambda value: str(getattr(value, "type", value)),
)
def test_a_parquet_column_of_any_type_is_read_row_by_row(tmp_path, column, values):
    columns = {"prompt": pa.array(["a cat", "a cat"]), "other": pa.array([1, 2])} | {column: values}
    table = write_dataset(parquet(tmp_path, **columns), tmp_path / "out")
    assert table["status"][0].as_py() == "failed"
    assert f"column {column}" in table["error"][0].as_py()
    assert table["other"].to_pylist() == [1, 2]


def test_an_empty_id_is_none(tmp_path):
    rows = rows_of(jsonl(tmp_path, *({"prompt": "a", "id": name} for name in ("", "", None))))
    assert [row.id for row in rows] == ["00000000", "00000001", "00000002"]
    assert not any(row.error for row in rows)
    (row,) = rows_of(parquet(tmp_path, prompt=["a"], id=[b""]))
    assert (row.id, row.error) == ("00000000", None)


def test_ids_are_compared_as_they_are_written(tmp_path):
    rows = rows_of(jsonl(tmp_path, *({"prompt": "a", "id": name} for name in (7, "7", 7.0, "7.0"))))
    assert [row.id for row in rows] == ["7", "7", "7", "7.0"]
    assert [row.error is None for row in rows] == [True, False, False, True]


@pytest.mark.parametrize("filler", ["red " * 25_000, "r" * 100_000, "\U0001f438" * 25_000])
def test_a_prompt_of_100_kb_is_cut_off_as_the_text_encoder_does(filler):
    words = tokenizer()
    early = read_row(0, {"prompt": f"a circle {filler}", "subjects": ["circle"]})
    assert [subject.token_indices for subject in resolve_subjects(words, early.request)] == [(2,)]
    late = read_row(1, {"prompt": f"{filler} circle", "subjects": ["circle"]})
    with pytest.raises(SubjectError, match="subject 'circle' is cut off") as caught:
        resolve_subjects(words, late.request)
    assert len(str(caught.value)) < 500
    wordy = read_row(2, {"prompt": "a circle", "subjects": [filler]})
    with pytest.raises(SubjectError, match="is not in the prompt") as caught:
        resolve_subjects(words, wordy.request)
    assert len(str(caught.value)) < 500


def test_other_columns_may_hold_anything_json_can(tmp_path):
    values = [{}, [], {"a": {}}, [{}], HALF_A_PAIR, 2**80, None, 1.5, {"a": [1, "x"]}]
    path = jsonl(tmp_path, *({"prompt": "a cat", "meta": value} for value in values))
    table = write_dataset(path, tmp_path / "out")
    assert table["status"].to_pylist() == ["ok"] * len(values)
    written = table["meta"].to_pylist()
    assert [None if text is None else json.loads(text) for text in written] == values


# --- the whole file is wrong ---------------------------------------------------------------------


def some_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"prompt": [sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(1000)]}),
        sink,
    )
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.parquet", some_parquet()[:-100], "cannot be read"),
        ("m.parquet", some_parquet()[:1000], "cannot be read"),
        ("m.parquet", b"", "cannot be read"),
        ("m.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", "cannot be read"),
        ("m.csv", b"", "cannot be read"),
        (
            "m.csv",
            b"prompt,id\na cat,1\na cat,2,3\n",
            "cannot be read: .*Expected 2 columns, got 3",
        ),
        ("m.csv", b"prompt,id\na cat,1\na cat\n", "cannot be read: .*Expected 2 columns, got 1"),
        ("m.csv", "prompt\nun caf\u00e9\n".encode("latin-1"), "Save it as UTF-8"),
        ("m.csv", "prompt,caf\u00e9\na,b\n".encode("latin-1"), "Save it as UTF-8"),
        ("m.csv", b"prompt\n" + b"a\n" * 9_000 + b"caf\xe9\n", "Save it as UTF-8"),
        ("m.csv", b"prompt,x\n" + b"a,b\n" * 9_000 + b"a,\xe9\n", "column x is not UTF-8"),
        ("m.csv", "prompt,other\na,caf\u00e9\n".encode("latin-1"), "Save it as UTF-8"),
        ("m.csv", "prompt\na cat\n".encode("utf-16"), "Save it as UTF-8"),
        ("m.csv", gzip.compress(b"prompt\na cat\n", mtime=0)[:-9], "cannot be read"),
        ("m.jsonl.bz2", b"BZh9" + b"\0" * 99, "cannot be read"),
        ("m.csv.zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 99, "cannot be read"),
        ("m.jsonl", '{"prompt": "caf\u00e9"}\n'.encode("latin-1"), "Save it as UTF-8"),
        ("m.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"\n', "line 3 is not JSON"),
        ("m.jsonl", b'{"prompt": "a", "x": ' + TOO_DEEP.encode() + b"}\n", "line 1 is nested too"),
        ("m.jsonl", b'{"prompt": "a", "\\ud800": 1}\n', "Save it as UTF-8"),
        ("m.jsonl", b"\n\n", "no column prompt"),
        ("m.jsonl", b'"a cat"\n', "line 1 is not a JSON object"),
        ("m.jsonl", b"{}\n", "no column prompt"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else None,
)
def test_a_file_that_is_broken_is_refused_in_a_sentence(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=said) as caught:
        rows_of(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_table_without_rows_is_refused(tmp_path):
    with pytest.raises(ManifestError, match="has no rows"):
        rows_of(parquet(tmp_path, prompt=pa.array([], pa.string())))


def test_pages_that_are_damaged_are_refused_when_they_are_read(tmp_path):
    content = bytearray(some_parquet())
    content[40:20_000] = b"\xff" * 19_960
    path = tmp_path / "m.parquet"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match="cannot be read"):
        rows_of(path)


def test_a_folder_without_parquet_files_is_no_manifest(tmp_path):
    folder = tmp_path / "m.parquet"
    folder.mkdir()
    (folder / "m.csv").write_text("prompt\na cat\n")
    with pytest.raises(
        ManifestError, match="is a folder without Parquet files; name one file in it"
    ):
        rows_of(folder)


def test_a_csv_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "m.csv"
    path.write_bytes("\ufeffprompt,id\na caf\u00e9,x\n".encode())
    (row,) = rows_of(path)
    assert (row.request.prompt, row.id, row.error) == ("a caf\u00e9", "x", None)


def test_an_error_of_a_row_is_one_of_a_request(tmp_path):
    (row,) = rows_of(jsonl(tmp_path, {"prompt": "a", "id": "../x"}))
    assert isinstance(row.error, RequestError)
