"""Every way in which an output may be damaged, what is said of it, and what a repair deletes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pyarrow as pa
import pytest

from aae_batch.dataset import layout, verify, verify_shard
from aae_batch.dataset.problem import Problem
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.webdataset import add_member, tar_members
from aae_batch.manifest.reader import open_manifest
from tests.small_output import edit_table

LAYOUTS = ["files", "webdataset", "parquet"]


def told(problems: list[Problem]) -> list[tuple]:
    return [(problem.kind, problem.shard, problem.row) for problem in problems]


def edit(storage, name: str, change) -> None:
    """Change the rows of a table, as Python values."""
    edit_table(
        storage,
        name,
        lambda table: pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema),
    )


def metadata(of: int, index: int, **values):
    """A damage: other values in a metadata row."""

    def damage(storage) -> None:
        def change(rows):
            rows[index].update(values)
            return rows

        edit(storage, layout.metadata_name(of), change)

    return damage


def attention(shard: int, change):
    """A damage: other rows in an attention table."""
    return lambda storage: edit(storage, layout.attention_name(shard), change)


def write(name: str, data: bytes):
    return lambda storage: storage.write_bytes(name, data)


def delete(name: str):
    return lambda storage: storage.delete(name)


def copy(name: str, other: str):
    return lambda storage: storage.write_bytes(other, storage.read_bytes(name))


def run_says(**values):
    """A damage: `run.json` edited by hand."""

    def damage(storage) -> None:
        record = json.loads(storage.read_bytes("run.json"))
        storage.write_bytes("run.json", json.dumps(record | values).encode())

    return damage


def cut(name: str):
    return lambda storage: storage.write_bytes(name, storage.read_bytes(name)[:-200])


def undecodable(storage) -> None:
    """The bytes of picture c are none of a picture, and the metadata has their hash."""
    data = b"not a picture"
    storage.write_bytes("images/00001/c.png", data)
    metadata(1, 0, sha256=hashlib.sha256(data).hexdigest())(storage)


def without_a_column(storage) -> None:
    edit_table(storage, layout.metadata_name(1), lambda table: table.drop(["neglected"]))


def with_the_id_of_another(storage) -> None:
    """Shard 1 has a second picture of row a."""
    copy("images/00001/c.png", "images/00001/a.png")(storage)
    storage.delete("images/00001/c.png")
    metadata(1, 0, id="a", file_name="images/00001/a.png")(storage)
    attention(1, lambda rows: [row | {"id": "a"} for row in rows])(storage)


def rewrite_tar(change):
    """A damage: other members in the tar of shard 1."""

    def damage(storage) -> None:
        import io
        import tarfile

        members = change(dict(tar_members(storage.read_bytes("images/00001.tar"))))
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, data in members.items():
                add_member(tar, name, data)
        storage.write_bytes("images/00001.tar", buffer.getvalue())

    return damage


def without_the_first_map(rows):
    """What a run that keeps maps of fewer steps would have written."""
    size = len(rows[0]["map"])
    first = {"maps": rows[0]["maps"][size:]}
    return [rows[0] | first | {n: rows[0][n][1:] for n in ("map_steps", "map_scales")}]


def short(rows):
    rows[0]["entropy"] = rows[0]["entropy"][:-1]
    return rows


BROKEN = ("broken", 1, None)
OF_C = ("broken", 1, "c")
COMMIT = [
    "summary.json",
    "images/00001.tar",
    "attention/00001.parquet",
    "metadata/00001.parquet",
]
"""What there is of it."""
PICTURE_C = ["summary.json", "images/00001/c.png", *COMMIT[1:]]

DAMAGES = [
    # what is done to it, the problem, its words, what a repair deletes
    ("files", delete("run.json"), ("other", None, None), "There is no run.json", []),
    ("files", write("run.json", b"{"), ("other", None, None), "is not JSON", []),
    ("files", write("run.json", b"{}"), ("other", None, None), "does not say how", []),
    ("files", write("run.json", b"[]"), ("other", None, None), "is not a JSON object", []),
    ("files", write("run.json", b"null"), ("other", None, None), "is not a JSON object", []),
    ("files", run_says(rows=4), ("other", None, None), "changed after it was written", []),
    ("files", run_says(shard_size=9), ("other", None, None), "changed after it was written", []),
    ("files", run_says(rows="x"), ("other", None, None), "no run of aae-batch wrote it", []),
    ("files", delete("metadata/00001.parquet"), ("missing", 1, None), "1 of 3 shards", []),
    (
        "files",
        copy("metadata/00001.parquet", "metadata/00009.parquet"),
        ("other", None, None),
        "belongs to no shard: the run has 3",
        [],
    ),
    (
        "files",
        write("metadata/notes.txt", b""),
        ("other", None, None),
        "not a table of a shard",
        [],
    ),
    ("files", cut("metadata/00001.parquet"), BROKEN, "metadata/00001.parquet cannot be", COMMIT),
    ("files", without_a_column, BROKEN, "has other columns", COMMIT),
    (
        "files",
        lambda storage: edit(storage, "metadata/00001.parquet", lambda rows: rows[:1]),
        BROKEN,
        "it has 1 rows, and should have 2",
        COMMIT,
    ),
    ("files", with_the_id_of_another, ("broken", 1, "a"), "also that of a row of shard 0", COMMIT),
    ("files", metadata(1, 0, fingerprint="g"), BROKEN, "the column fingerprint is not", COMMIT),
    ("files", metadata(1, 1, shard=2), BROKEN, "the column shard is not 1", COMMIT),
    ("files", metadata(1, 0, file_name=None), OF_C, "should be images/00001/c.png", COMMIT),
    ("files", metadata(1, 0, width=24), OF_C, "16 x 8, and should be 24 x 8", PICTURE_C),
    ("files", metadata(1, 1, error=None), ("broken", 1, "bad"), "has no error", COMMIT),
    ("files", metadata(1, 1, file_name="x"), ("broken", 1, "bad"), "failed and has the f", COMMIT),
    ("files", delete("images/00001/c.png"), OF_C, "its image is missing", COMMIT),
    ("files", write("images/00001/c.png", b"x"), OF_C, "another sha256", PICTURE_C),
    ("files", undecodable, OF_C, "cannot be decoded", PICTURE_C),
    (
        "files",
        write("images/00001/x.png", b""),
        ("other", 1, None),
        "no run wrote images/00001/x.png: move it away",
        [],
    ),
    (
        "files",
        copy("images/00001/c.png", "images/00001/bad.png"),
        ("stray", 1, None),
        "images/00001/bad.png belong to rows that failed",
        ["summary.json", "images/00001/bad.png"],
    ),
    (
        "files",
        write("images/00001/bad.png", b"dear to someone"),
        ("other", 1, None),
        "no run wrote images/00001/bad.png",
        [],
    ),
    (
        "files",
        write("rewriting/00001.tar", b""),
        ("missing", 1, None),
        "rewriting/00001.tar is an unfinished rewrite",
        [],
    ),
    ("files", write("summary.json", b""), ("summary", None, None), "damaged", ["summary.json"]),
    ("files", delete("attention/00001.parquet"), BROKEN, "attention/00001.parquet is mi", COMMIT),
    ("files", cut("attention/00001.parquet"), BROKEN, "attention/00001.parquet cannot", COMMIT),
    ("files", attention(1, lambda rows: []), OF_C, "its subjects are ['cat']", COMMIT),
    ("files", attention(1, lambda rows: rows * 2), OF_C, "its subjects are ['cat']", COMMIT),
    (
        "files",
        attention(1, lambda rows: [*rows, rows[0] | {"id": "bad"}]),
        ("broken", 1, "bad"),
        "it has no image",
        COMMIT,
    ),
    ("files", attention(1, short), OF_C, "an entry for every step", COMMIT),
    (
        "files",
        attention(1, lambda rows: [row | {"map": b"1234"} for row in rows]),
        OF_C,
        "attention map has another size",
        COMMIT,
    ),
    (
        "files",
        write("summary.json", b'{"rows": 5, "images": 4, "failed": 1, "failures": {}}'),
        ("summary", None, None),
        "says failures {}, the tables have {'RequestError': 1}",
        ["summary.json"],
    ),
    ("webdataset", delete("images/00001.tar"), BROKEN, "images/00001.tar is missing", COMMIT),
    ("webdataset", write("images/00001.tar", b"x"), BROKEN, "its images cannot be", COMMIT),
    (
        "webdataset",
        rewrite_tar(lambda members: {"c.json": members["c.json"]}),
        OF_C,
        "its image is missing",
        COMMIT,
    ),
    (
        "webdataset",
        rewrite_tar(lambda members: {"c.png": members["c.png"]}),
        OF_C,
        "c.json is missing in images/00001.tar",
        COMMIT,
    ),
    (
        "webdataset",
        rewrite_tar(lambda members: members | {"c.json": b"{}"}),
        OF_C,
        "c.json is not the JSON of its row",
        COMMIT,
    ),
    (
        "webdataset",
        rewrite_tar(lambda members: members | {"bad.png": members["c.png"]}),
        BROKEN,
        "has bad.png, which no row names",
        COMMIT,
    ),
    (
        "webdataset",
        write("images/00009.tar", b""),
        ("other", None, None),
        "no run wrote images/00009.tar",
        [],
    ),
    ("parquet", metadata(1, 0, image=None), OF_C, "its image is missing", COMMIT),
    (
        "parquet",
        metadata(1, 0, image={"bytes": b"x", "path": "c.png"}),
        OF_C,
        "another sha256",
        COMMIT,
    ),
    (
        "parquet",
        metadata(1, 1, image={"bytes": b"x", "path": "bad.png"}),
        ("broken", 1, "bad"),
        "has an image and is not ok",
        COMMIT,
    ),
    (
        "parquet",
        write("images/x.png", b""),
        ("other", None, None),
        "no run wrote images/x.png",
        [],
    ),
]


@pytest.mark.parametrize("maps", ["last", "every:2"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_an_output_is_proved(make_output, kind, maps):
    output = make_output(kind, attention_maps=maps)
    done = []
    with open_manifest(output.manifest) as manifest:
        found = verify.verify(output.storage, manifest, lambda *counts: done.append(counts))
    assert found.problems == []
    assert found.proved
    assert str(found) == "3 of 3 shards, 5 rows: 4 images, 1 failed; proved"
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert verify.to_delete(output.storage, found) == []


@pytest.mark.parametrize(("kind", "damage", "problem", "words", "deleted"), DAMAGES)
def test_a_damage_is_told_and_what_is_deleted_of_it_and_nothing_else(
    make_output, kind, damage, problem, words, deleted
):
    storage = make_output(kind).storage
    damage(storage)
    found = verify.verify(storage)
    assert told(found.problems) == [problem]
    assert words in str(found.problems[0])
    assert not found.proved
    assert found.only_incomplete == (problem[0] == "missing")
    assert verify.to_delete(storage, found) == [name for name in deleted if storage.exists(name)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_the_first_map, "maps are not those of the steps [0, 2]"),
        (lambda rows: [rows[0] | {"map_scales": [0.1]}], "maps are not those of the steps [0, 2]"),
        (lambda rows: [rows[0] | {"maps": rows[0]["map"]}], "maps over time have another size"),
        (lambda rows: [rows[0] | {"maps": None}], "maps over time have another size"),
    ],
)
def test_maps_of_other_steps_or_sizes_are_found(make_output, change, words):
    storage = make_output(attention_maps="every:2").storage
    attention(1, change)(storage)
    found = verify.verify(storage)
    assert told(found.problems) == [OF_C]
    assert words in found.problems[0].text


@pytest.mark.parametrize("kind", ["files", "parquet"])
def test_a_tar_in_a_layout_without_tars_is_no_one_s_to_delete(make_output, kind):
    storage = make_output(kind).storage
    storage.write_bytes("images/00001.tar", b"dear to someone")
    cut("attention/00001.parquet")(storage)
    assert "images/00001.tar" not in verify.to_delete(storage, verify.verify(storage))


def test_rows_in_another_order_are_found_with_the_manifest(make_output):
    output = make_output()
    edit(output.storage, "metadata/00000.parquet", lambda rows: rows[::-1])
    assert verify.verify(output.storage).proved
    with open_manifest(output.manifest) as manifest:
        found = verify.verify(output.storage, manifest)
    assert told(found.problems)[0] == ("broken", 0, "b")
    assert "its id is 'b', and in the manifest 'a'" in found.problems[0].text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "a dog"}, "its prompt is 'a dog', and in the manifest 'a cat'"),
        ({"seed": 1}, "its seed is 1, and in the manifest"),
        ({"negative_prompt": "x"}, "its negative_prompt is 'x', and in the manifest None"),
        ({"guidance_scale": 1.0}, "its guidance_scale is 1.0, and in the manifest 7.5"),
        ({"method": "stable-diffusion"}, "its method is 'stable-diffusion'"),
    ],
)
def test_rows_that_say_something_else_are_found_with_the_manifest(make_output, change, words):
    output = make_output()
    metadata(1, 0, **change)(output.storage)
    with open_manifest(output.manifest) as manifest:
        found = verify.verify(output.storage, manifest)
    assert told(found.problems) == [("broken", 1, "c")]
    assert words in found.problems[0].text


def test_an_extra_column_that_says_something_else_is_found_with_the_manifest(make_output):
    rows = [
        {"id": name, "prompt": "a cat", "subjects": ["cat"], "note": i + 0.5}
        for i, name in enumerate("ab")
    ]
    output = make_output(rows=rows)
    metadata(0, 1, note=None)(output.storage)
    with open_manifest(output.manifest) as manifest:
        found = verify.verify(output.storage, manifest)
    assert "its column note is not that of the manifest" in found.problems[0].text


def test_what_an_earlier_version_read_otherwise_is_told_and_not_deleted(make_output):
    output = make_output(earlier=True)
    metadata(1, 0, prompt="a cat ")(output.storage)
    with open_manifest(output.manifest) as manifest:
        found = verify.verify(output.storage, manifest)
    assert told(found.problems) == [("other", 1, "c")]
    assert "this version may read it otherwise" in found.problems[0].text
    assert verify.to_delete(output.storage, found) == []


def test_only_rows_that_a_retry_would_try_are_advised_to_be_tried_again():
    dropped = verify.Verification(failures=Counter(DroppedError=2))
    assert list(dropped.advice("out")) == []
    (advice,) = verify.Verification(failures=Counter(DroppedError=2, RowError=1)).advice("out")
    assert "--retry-failed" in advice


def test_another_manifest_is_found_out(make_output):
    output = make_output()
    output.manifest.write_text(json.dumps({"prompt": "a cat"}) + "\n")
    with open_manifest(output.manifest) as manifest:
        found = verify.verify(output.storage, manifest)
    assert told(found.problems) == [("other", None, None)]
    assert "is not the manifest of run.json" in found.problems[0].text


def test_many_problems_of_a_shard_are_counted(make_output, monkeypatch):
    monkeypatch.setattr(verify_shard, "PROBLEMS_A_SHARD", 1)
    storage = make_output().storage
    for name in ("a", "b"):
        storage.delete(f"images/00000/{name}.png")
    found = verify.verify(storage)
    assert [str(problem) for problem in found.problems] == [
        "shard 0, row a: its image is missing.",
        "shard 0: and 1 more problems.",
    ]


def test_an_output_that_is_under_way_is_incomplete_and_not_broken(make_output):
    storage = make_output().storage
    for name in ("metadata/00001.parquet", "metadata/00002.parquet", "summary.json"):
        storage.delete(name)
    found = verify.verify(storage)
    assert found.only_incomplete
    assert str(found) == "1 of 3 shards, 5 rows: 2 images, 0 failed; incomplete"
    assert "2 of 3 shards are not committed (1, 2)" in str(found.problems[0])


def test_pictures_are_found_by_their_rows(make_output):
    dataset = Dataset(make_output("webdataset").storage)
    rows = [row for row in dataset.metadata().to_pylist() if row["status"] == "ok"]
    assert [dataset.image(row).getpixel((0, 0))[0] for row in rows] == [0, 40, 80, 160]
