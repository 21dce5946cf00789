from __future__ import annotations

import hashlib
import json
import math

import datasets
import pyarrow as pa
import pytest
import webdataset
from PIL import Image

from aae_batch.dataset import writer
from aae_batch.dataset.image_format import PNG, ImageFormat
from aae_batch.dataset.layouts import LAYOUTS, Files, Table, Tar
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.webdataset import tar_members
from aae_batch.errors import OutputError
from aae_batch.manifest.row import read_row
from aae_batch.request import Result
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.store.local import LocalStorage
from aae_batch.store.open import open_storage

CONFIG = GuidanceConfig(method="stable-diffusion")
NO_EXTRAS = pa.table({"n": [0, 1]})
EXTRAS = pa.table(
    {
        "note": [{"words": ["a"]}, None],
        "share": [math.nan, 0.5],
        "day": pa.array([0, 1], pa.date32()),
    }
)


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path)


def into(storage, kind=Files, shard=7, **form):
    return kind(storage, shard, "f", **form)


def outcomes(shard, seconds=2.0):
    good = read_row(0, {"id": "good", "prompt": "a cat", "guidance_scale": 3})
    bad = read_row(1, {"id": "bad", "prompt": "a cat", "seed": "x"})
    result = Result(good.request, image=Image.new("RGB", (16, 8), "red"), seconds=seconds)
    return [
        writer.failed(bad, CONFIG),
        shard.write_image(good, result, CONFIG),
    ]


def test_a_shard_is_in_the_manifest_s_order_with_what_was_used(storage):
    into(storage).commit(outcomes(into(storage)), NO_EXTRAS)
    good, bad = Dataset(storage).metadata().to_pylist()
    assert (good["id"], good["status"], good["n"], good["shard"]) == ("good", "ok", 0, 7)
    assert (good["guidance_scale"], good["num_inference_steps"]) == (3.0, 50)
    assert (good["width"], good["height"]) == (16, 8)
    assert (bad["id"], bad["status"], bad["error_type"]) == ("bad", "failed", "RequestError")
    assert bad["seed"] is None
    data = storage.read_bytes(good["file_name"])
    assert good["sha256"] == hashlib.sha256(data).hexdigest()


def test_pictures_of_an_attempt_that_did_not_finish_are_swept_away(storage):
    storage.write_bytes("images/00007/bad.png", PNG.encode(Image.new("RGB", (16, 8))))
    storage.write_bytes("images/00008/other.png", b"another shard's")
    into(storage).commit(outcomes(into(storage)), NO_EXTRAS)
    assert storage.list("images/") == ["images/00007/good.png", "images/00008/other.png"]


def test_metadata_is_written_last(storage, monkeypatch):
    written = []
    create = LocalStorage.create_bytes

    def created(self, name, data):
        written.append(name)
        return create(self, name, data)

    monkeypatch.setattr(LocalStorage, "create_bytes", created)
    into(storage).commit(outcomes(into(storage)), NO_EXTRAS)
    assert written == [
        "images/00007/good.png",
        "attention/00007.parquet",
        "metadata/00007.parquet",
    ]


@pytest.mark.parametrize("layout", ["files", "webdataset", "parquet"])
@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_every_layout_gives_a_row_its_picture(storage, layout, kind):
    shard = into(storage, LAYOUTS[layout], image_format=ImageFormat(kind=kind))
    shard.commit(outcomes(shard), NO_EXTRAS)
    dataset = Dataset(storage)
    good, bad = dataset.metadata().to_pylist()
    assert hashlib.sha256(dataset.image_bytes(good)).hexdigest() == good["sha256"]
    assert dataset.image(good).size == (16, 8)
    assert dataset.image(good).format == kind.upper()
    with pytest.raises(OutputError, match="columns status and error say why"):
        dataset.image(bad)


def test_a_tar_has_pictures_and_what_is_said_of_them_in_order(storage):
    shard = into(storage, Tar)
    shard.commit(outcomes(shard), EXTRAS)
    members = dict(tar_members(storage.read_bytes("images/00007.tar")))
    assert list(members) == ["good.png", "good.json"]
    said = json.loads(members["good.json"])
    assert (said["id"], said["prompt"], said["method"]) == ("good", "a cat", "stable-diffusion")
    assert said["seed"] == read_row(0, {"id": "good", "prompt": "a cat"}).request.seed
    assert (said["note"], said["share"], said["width"]) == ({"words": ["a"]}, None, 16)
    assert "day" not in said  # JSON has no such type
    assert storage.list("images/") == ["images/00007.tar"]


def test_the_same_shard_is_the_same_tar(storage):
    shard = into(storage, Tar)
    tars = set()
    for seconds in (1.0, 2.0):
        made = outcomes(shard, seconds=seconds)
        shard.commit(made, EXTRAS)
        tars.add(storage.read_bytes("images/00007.tar"))
    assert len(tars) == 1


def test_webdataset_reads_the_tars(storage):
    for shard, name in enumerate(["v1.5-cat", "v1.5-dog"]):
        row = read_row(0, {"id": name, "prompt": name})
        result = Result(row.request, image=Image.new("RGB", (16, 8), "red"))
        tar = into(storage, Tar, shard)
        tar.commit([tar.write_image(row, result, CONFIG)], NO_EXTRAS.slice(0, 1))
    tar = into(storage, Tar, 2)
    tar.commit(outcomes(tar)[:1], NO_EXTRAS.slice(1))
    tars = [storage.place(f"images/{shard:05d}.tar") for shard in range(3)]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert [sample["json"]["id"] for sample in samples] == ["v1.5-cat", "v1.5-dog"]
    assert [sample["png"].size for sample in samples] == [(16, 8), (16, 8)]


def test_datasets_shows_the_pictures_of_the_tables(storage, tmp_path):
    shard = into(storage, Table)
    shard.commit(outcomes(shard), NO_EXTRAS)
    assert storage.list("images/") == []
    loaded = datasets.load_dataset(
        "parquet", data_dir=storage.place("metadata"), split="train", cache_dir=tmp_path / "cache"
    )
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded["id"][:] == ["good", "bad"]
    assert loaded[0]["image"].size == (16, 8)
    assert loaded[1]["image"] is None
