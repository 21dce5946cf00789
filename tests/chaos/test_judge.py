"""A judge that cannot fail proves nothing: each fault is planted in a good dataset, and named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.chaos.judge import BucketReader, FolderReader, Verdict, judge, judge_export, judge_scores

ROWS = [
    {"id": "a", "prompt": "a cat and a dog", "subjects": ["cat", "dog"], "seed": 1, "note": "x"},
    {"id": "b.1", "prompt": "a cat", "subjects": ["cat"], "seed": 2, "note": None},
    {"id": "c", "prompt": "a cat", "subjects": ["cat"], "seed": 3, "note": "y"},
    {"id": "d", "prompt": "a dog", "subjects": ["dog"], "seed": 4, "note": "z"},
    {"id": "e", "prompt": "a dog", "subjects": ["dog"], "seed": 5, "note": "z"},
]
LAYOUTS = ("files", "webdataset", "parquet")


class Planted:
    """A good dataset in a folder, and ways to spoil it."""

    def __init__(self, root: Path, manifest: Path, layout: str) -> None:
        self.root = root
        self.manifest = manifest
        self.layout = layout

    def verdict(self, pixels=None) -> Verdict:
        return judge(FolderReader(self.root), self.manifest, pixels)

    def rewrite(self, name: str, change) -> None:
        """Change the rows of a table, in memory."""
        path = self.root / name
        table = pq.read_table(path)
        rows = change(table.to_pylist())
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)

    def repaint(self, row_id: str, data: bytes, name: str = "metadata/00000.parquet") -> None:
        """Other bytes for a picture of shard 0, whatever its layout; the tables stay as they are."""
        if self.layout == "files":
            (self.root / f"images/00000/{row_id}.png").write_bytes(data)
        elif self.layout == "parquet":
            self.rewrite(name, lambda rows: [_with_image(row, row_id, data) for row in rows])
        else:
            path = self.root / "images/00000.tar"
            with tarfile.open(path) as tar:
                members = [(m.name, tar.extractfile(m).read()) for m in tar]
            with tarfile.open(path, "w") as tar:
                for member, content in members:
                    info = tarfile.TarInfo(member)
                    content = data if member == f"{row_id}.png" else content
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def _with_image(row: dict, row_id: str, data: bytes) -> dict:
    return row if row["id"] != row_id else row | {"image": {"bytes": data, "path": "x.png"}}


def _png(color: tuple[int, int, int], size: tuple[int, int] = (16, 8)) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, color).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(params=LAYOUTS)
def good(make_output, request) -> Planted:
    output = make_output(request.param, rows=ROWS)
    return Planted(Path(output.storage.root), output.manifest, request.param)


def only(verdict: Verdict, *kinds: str) -> None:
    counts = {k: n for k, n in verdict.counts.items() if n and k not in ("rows", "failed")}
    assert set(counts) == set(kinds), verdict.problems


def test_a_good_dataset_is_sound(good):
    verdict = good.verdict()
    assert verdict.sound, verdict.problems
    assert (verdict.rows, verdict.failed) == (5, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_a_bucket_too(make_output, bucket, layout):
    output = make_output(layout, f"{bucket.url}/out", rows=ROWS)
    reader = BucketReader(bucket.client, bucket.name, "out")
    assert judge(reader, output.manifest).sound
    bucket.client.delete_object(Bucket=bucket.name, Key="out/metadata/00001.parquet")
    assert judge(reader, output.manifest).lost == 2


def test_a_lost_shard_loses_its_rows(good):
    (good.root / "metadata/00000.parquet").unlink()
    assert good.verdict().lost == 2


def test_a_lost_row(good):
    good.rewrite("metadata/00000.parquet", lambda rows: rows[:1])
    assert good.verdict().lost == 1


def test_a_doubled_row(good):
    good.rewrite("metadata/00000.parquet", lambda rows: [*rows, rows[0]])
    assert good.verdict().doubled >= 1


def test_a_row_of_another_shard_is_doubled(good):
    stolen = pq.read_table(good.root / "metadata/00000.parquet").to_pylist()[0]
    good.rewrite("metadata/00001.parquet", lambda rows: [stolen, *rows])
    assert good.verdict().doubled == 1


@pytest.mark.parametrize(
    ("name", "value"), [("prompt", "a cow"), ("seed", 7), ("subjects", ["cow"]), ("note", "w")]
)
def test_a_row_that_is_not_the_manifests(good, name, value):
    good.rewrite("metadata/00000.parquet", lambda rows: [rows[0] | {name: value}, rows[1]])
    assert good.verdict().content == 1


def test_rows_in_another_order(good):
    good.rewrite("metadata/00000.parquet", lambda rows: rows[::-1])
    assert good.verdict().content == 1


def test_a_row_of_no_outcome(good):
    good.rewrite("metadata/00000.parquet", lambda rows: [rows[0] | {"status": "gone"}, rows[1]])
    assert good.verdict().content == 1


def test_failed_rows_are_counted(good):
    gone = {"status": "failed", "error": "no", "error_type": "No", "file_name": None}
    good.rewrite("metadata/00002.parquet", lambda rows: [rows[0] | gone])
    assert good.verdict().failed == 1
    assert not good.verdict().sound, "its attention and its summary are left"


def test_another_picture_with_the_same_name(good):
    good.repaint("a", _png((1, 2, 3)))
    only(good.verdict(), "checksums")


def test_a_picture_that_is_cut_short(good):
    good.repaint("a", _png((1, 2, 3))[:40])
    only(good.verdict(), "checksums", "undecodable")


def test_a_picture_of_another_size(good):
    good.repaint("a", _png((1, 2, 3), (8, 8)))
    only(good.verdict(), "checksums", "sizes")


def test_a_picture_that_is_not_of_its_seed(good):
    def of_row_zero(prompt: str, seed: int) -> tuple[bytes, int]:
        return Image.new("RGB", (16, 8), (40 * (seed - 1), 0, 0)).tobytes(), 0

    assert good.verdict(of_row_zero).sound
    wrong = good.verdict(lambda prompt, seed: of_row_zero(prompt, seed if seed != 3 else 4))
    assert wrong.pixels == 1


def test_a_missing_picture(good):
    if good.layout == "files":
        (good.root / "images/00000/a.png").unlink()
    elif good.layout == "webdataset":
        (good.root / "images/00000.tar").unlink()
    else:
        good.rewrite("metadata/00000.parquet", lambda r: [r[0] | {"image": None}, r[1]])
    assert good.verdict().checksums == (2 if good.layout == "webdataset" else 1)


def test_a_broken_table(good):
    path = good.root / "attention/00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert good.verdict().undecodable == 1


def test_a_flipped_bit_in_a_table(good):
    path = good.root / "metadata/00001.parquet"
    data = bytearray(path.read_bytes())
    data[40] ^= 0xFF
    path.write_bytes(data)
    assert not good.verdict().sound


def test_a_missing_attention_table(good):
    (good.root / "attention/00001.parquet").unlink()
    only(good.verdict(), "attention")


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[1:],
        lambda rows: [*rows, rows[0]],
        lambda rows: [rows[0] | {"subject": "cow"}, *rows[1:]],
        lambda rows: [rows[0] | {"loss": rows[0]["loss"][:1]}, *rows[1:]],
        lambda rows: [rows[0] | {"map": b""}, *rows[1:]],
        lambda rows: [*rows, rows[0] | {"id": "e"}],
    ],
    ids=["missing", "doubled", "subject", "steps", "map", "other-row"],
)
def test_attention_that_does_not_fit(good, change):
    good.rewrite("attention/00000.parquet", change)
    only(good.verdict(), "attention")


@pytest.mark.parametrize("name", ["images/00000/x.png", "metadata/old.parquet", "rewriting/0"])
def test_a_stray_object(good, name):
    path = good.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    only(good.verdict(), "strays")


def test_what_a_killed_writer_leaves_is_counted_apart(good):
    (good.root / "metadata/.00000.parquet.1234abcd.part").write_bytes(b"x")
    verdict = good.verdict()
    assert verdict.sound
    assert verdict.parts == 1


@pytest.mark.parametrize("name", ["summary.json", "run.json"])
def test_a_record_that_is_missing(good, name):
    (good.root / name).unlink()
    assert good.verdict().records == 1


def test_a_summary_that_counts_wrongly(good):
    path = good.root / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images": 4}))
    only(good.verdict(), "records")


def test_a_tar_with_a_stranger(make_output):
    output = make_output("webdataset", rows=ROWS)
    path = Path(output.storage.root, "images/00000.tar")
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("stranger.png"), io.BytesIO())
    only(judge(FolderReader(Path(output.storage.root)), output.manifest), "strays")


def test_scores_are_held_against_pictures(make_output):
    output = make_output(rows=ROWS)
    root = Path(output.storage.root)
    reader = FolderReader(root)
    (root / "metrics/m").mkdir(parents=True)
    for shard in range(3):
        rows = pq.read_table(root / f"metadata/{shard:05d}.parquet").select(["id", "sha256"])
        rows = rows.append_column("score", pa.array([0.5] * rows.num_rows))
        pq.write_table(rows, root / f"metrics/m/{shard:05d}.parquet")
    assert judge_scores(reader, output.manifest, "m").sound
    planted = Planted(root, output.manifest, "files")
    planted.rewrite("metrics/m/00000.parquet", lambda r: [r[0], r[0]])
    planted.rewrite("metrics/m/00001.parquet", lambda r: [r[0] | {"sha256": "0"}, r[1]])
    (root / "metrics/m/00002.parquet").unlink()
    only(judge_scores(reader, output.manifest, "m"), "lost", "doubled", "checksums")


@pytest.mark.parametrize("form", ["hf", "parquet", "webdataset", "imagefolder"])
def test_an_export_is_held_against_its_dataset(make_output, tmp_path, form):
    from aae_batch.dataset.reader import Dataset
    from aae_batch.export.export import ExportSettings, export
    from aae_batch.store.open import open_storage

    output = make_output(rows=ROWS)
    to = tmp_path / "export"
    settings = ExportSettings(format=form, rows_per_file=2)
    export(Dataset(output.storage), open_storage(to), settings)
    whole, dataset = FolderReader(to), FolderReader(Path(output.storage.root))
    verdict = judge_export(whole, dataset, form)
    assert verdict.sound, verdict.problems
    planted = Planted(Path(output.storage.root), output.manifest, "files")
    planted.rewrite("metadata/00000.parquet", lambda r: [r[0] | {"sha256": "0"}, r[1]])
    planted.rewrite("metadata/00001.parquet", lambda r: [r[0]])
    (to / "README.md").unlink()
    only(judge_export(whole, dataset, form), "checksums", "strays", "records")
