from __future__ import annotations

import hashlib

import pyarrow as pa
import pytest
from PIL import Image

from aae_batch.config import GuidanceConfig
from aae_batch.dataset import writer
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.storage import LocalStorage, open_storage
from aae_batch.request import Result
from aae_batch.row import read_row

CONFIG = GuidanceConfig(method="stable-diffusion")
NO_EXTRAS = pa.table({"n": [0, 1]})


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path)


def outcomes(storage):
    good = read_row(0, {"id": "good", "prompt": "a cat", "guidance_scale": 3})
    bad = read_row(1, {"id": "bad", "prompt": "a cat", "seed": "x"})
    result = Result(good.request, image=Image.new("RGB", (16, 8), "red"), seconds=2.0)
    return [writer.failed(bad, CONFIG), writer.write_image(storage, 7, good, result, CONFIG)]


def test_a_shard_is_in_the_manifest_s_order_with_what_was_used(storage):
    writer.commit(storage, 7, outcomes(storage), NO_EXTRAS, "f")
    good, bad = Dataset(storage).metadata().to_pylist()
    assert (good["id"], good["status"], good["n"], good["shard"]) == ("good", "ok", 0, 7)
    assert (good["guidance_scale"], good["num_inference_steps"]) == (3.0, 50)
    assert (good["width"], good["height"]) == (16, 8)
    assert (bad["id"], bad["status"], bad["error_type"]) == ("bad", "failed", "RequestError")
    assert bad["seed"] is None
    data = storage.read_bytes(good["file_name"])
    assert good["sha256"] == hashlib.sha256(data).hexdigest()


def test_pictures_of_an_attempt_that_did_not_finish_are_swept_away(storage):
    storage.write_bytes("images/00007/bad.png", b"half a run ago")
    storage.write_bytes("images/00008/other.png", b"another shard's")
    writer.commit(storage, 7, outcomes(storage), NO_EXTRAS, "f")
    assert storage.list("images/") == ["images/00007/good.png", "images/00008/other.png"]


def test_metadata_is_written_last(storage, monkeypatch):
    written = []
    monkeypatch.setattr(LocalStorage, "write_bytes", lambda self, name, data: written.append(name))
    writer.commit(storage, 7, outcomes(storage), NO_EXTRAS, "f")
    assert written == [
        "images/00007/good.png",
        "attention/00007.parquet",
        "metadata/00007.parquet",
    ]
