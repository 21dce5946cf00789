"""Inputs from object storage, as local files."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest

from aae_batch.errors import OutputError
from aae_batch.store.fetch import fetch, fetch_folder, fetch_in_turn, folder_digest
from aae_batch.store.open import open_storage

FILES = {"model_index.json": b"{}", "unet/weights.safetensors": b"w" * 1000, "unet/old.bin": b"o"}


@pytest.fixture(params=["s3", "memory"])
def url(request, tmp_path, monkeypatch):
    """A folder of three files."""
    monkeypatch.setenv("AAE_BATCH_CACHE", str(tmp_path / "cache"))
    root = f"memory://{uuid4().hex}/model"
    if request.param == "s3":
        root = f"{request.getfixturevalue('bucket').url}/model"
    for name, data in FILES.items():
        open_storage(root).write_bytes(name, data)
    return root


def wanted(name: str) -> bool:
    return not name.endswith(".bin")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_one_object_is_copied_under_its_own_name(url, tmp_path):
    path = fetch(f"{url}/unet/weights.safetensors", tmp_path)
    assert path == tmp_path / "weights.safetensors"
    assert path.read_bytes() == FILES["unet/weights.safetensors"]
    with pytest.raises(OutputError, match="no such object"):
        fetch(f"{url}/none.csv", tmp_path)


def test_a_folder_is_copied_as_far_as_it_is_wanted(url):
    folder = fetch_folder(f"{url}/", wanted)
    assert contents(folder) == {name: FILES[name] for name in FILES if wanted(name)}


def test_a_folder_is_copied_once_until_it_changes(url):
    folder = fetch_folder(url, wanted)
    (folder / "model_index.json").write_bytes(b"still the first copy")
    assert fetch_folder(url, wanted) == folder
    assert (folder / "model_index.json").read_bytes() == b"still the first copy"
    before = folder_digest(url, wanted)
    open_storage(url).write_bytes("unet/weights.safetensors", b"v" * 1000)
    assert folder_digest(url, wanted) != before
    assert contents(fetch_folder(url, wanted))["unet/weights.safetensors"] == b"v" * 1000


def test_threads_that_ask_at_once_copy_once(bucket, proxy, tmp_path, monkeypatch):
    monkeypatch.setenv("AAE_BATCH_CACHE", str(tmp_path))
    url = f"{bucket.url}/model"
    open_storage(url).write_bytes("weights.safetensors", b"w" * 1000)
    proxy.fail("slow", method="GET", path="weights.safetensors")
    folders = []
    threads = [
        threading.Thread(target=lambda: folders.append(fetch_folder(url, wanted, proxy.url)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3
    assert len(set(folders)) == 1
    copied = [r for r in proxy.requests if r.startswith("GET") and "weights.safetensors" in r]
    assert len(copied) == 1


def test_processes_that_ask_at_once_copy_once(bucket, proxy, tmp_path, monkeypatch):
    monkeypatch.setenv("AAE_BATCH_CACHE", str(tmp_path))
    url = f"{bucket.url}/model"
    open_storage(url).write_bytes("weights.safetensors", b"w" * 1000)
    proxy.fail("slow", method="GET", path="weights.safetensors")
    program = (
        "from aae_batch.store.fetch import fetch_folder\n"
        f"print(fetch_folder({url!r}, lambda name: True, {proxy.url!r}))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {process.communicate(timeout=300)[0] for process in processes}
    assert len(said) == 1
    copied = [r for r in proxy.requests if r.startswith("GET") and "weights.safetensors" in r]
    assert len(copied) == 1


def test_a_copy_that_broke_off_is_begun_anew(url, monkeypatch):
    folder = fetch_folder(url, wanted)
    part = folder.rename(folder.with_name(f"{folder.name}.part"))
    (part / "model_index.json").write_bytes(b"half")
    assert fetch_folder(url, wanted) == folder
    assert contents(folder)["model_index.json"] == FILES["model_index.json"]
    assert not part.exists()


def test_a_folder_with_nothing_in_it_is_named(url):
    with pytest.raises(OutputError, match=r"There is no model at .*/nowhere: check the URL"):
        fetch_folder(f"{url}/nowhere", wanted)


def test_no_name_leads_out_of_the_folder(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("AAE_BATCH_CACHE", str(tmp_path))
    bucket.client.put_object(Bucket=bucket.name, Key="model/../../escape", Body=b"")
    with pytest.raises(OutputError, match="cannot be a file here"):
        fetch_folder(f"{bucket.url}/model", wanted)


def test_what_is_fetched_in_turn_is_fetched_by_one_at_a_time_and_again_when_that_may_help(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("AAE_BATCH_CACHE", str(tmp_path))
    monkeypatch.setattr("aae_batch.store.fetch.WAITS", (0.0, 0.01, 0.02))
    seen: list[str] = []

    def fetch() -> int:
        seen.append("begins")
        time.sleep(0.01)
        seen.append("ends")
        if seen.count("ends") <= 3:
            raise ConnectionError("busy")
        return 7

    def busy(error: BaseException) -> bool:
        return str(error) == "busy"

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: fetch_in_turn("a model", fetch, busy), range(8)))
    assert found == [7] * 8
    assert seen == ["begins", "ends"] * (8 + 3)


def test_what_waiting_does_not_help_is_raised_at_once_and_the_rest_in_the_end(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("AAE_BATCH_CACHE", str(tmp_path))
    monkeypatch.setattr("aae_batch.store.fetch.WAITS", (0.0, 0.0))
    calls: list[int] = []

    def fetch() -> None:
        calls.append(1)
        raise ConnectionError("out of reach")

    with pytest.raises(ConnectionError):
        fetch_in_turn("a model", fetch, lambda error: False)
    assert len(calls) == 1
    with pytest.raises(ConnectionError):
        fetch_in_turn("a model", fetch, lambda error: True)
    assert len(calls) == 1 + 3
