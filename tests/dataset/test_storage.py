from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from aae_batch.dataset.storage import open_storage
from aae_batch.errors import OutputError


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path / "out")


def test_what_is_written_is_read_listed_and_deleted(storage):
    storage.write_bytes("images/00001/b.png", b"b")
    storage.write_bytes("images/00001/a.png", b"a")
    storage.write_bytes("images/00002/c.png", b"c")
    assert storage.read_bytes("images/00001/a.png") == b"a"
    assert storage.list("images/00001/") == ["images/00001/a.png", "images/00001/b.png"]
    storage.delete("images/00001/a.png")
    storage.delete("images/00001/a.png")
    assert not storage.exists("images/00001/a.png")
    assert storage.list("nothing/") == []


def test_writing_replaces_the_whole_object_and_leaves_nothing_beside_it(storage, tmp_path):
    storage.write_bytes("run.json", b"long ago")
    storage.write_bytes("run.json", b"now")
    assert storage.read_bytes("run.json") == b"now"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]


def test_it_travels_to_the_actors(storage):
    storage.write_bytes("a", b"1")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("a") == b"1"


def test_what_cannot_be_written_or_read_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"Cannot write .*File exists"):
        open_storage(tmp_path / "file").write_bytes("a", b"")
    with pytest.raises(OutputError, match="No such file"):
        open_storage(tmp_path).read_bytes("a")


def test_a_scheme_without_a_backend_is_refused():
    with pytest.raises(OutputError, match="give a local folder"):
        open_storage("s3://bucket/out")


def test_a_second_writer_is_refused(storage):
    other = (
        "from aae_batch.dataset.storage import open_storage\n"
        "from aae_batch.errors import OutputError\n"
        "try:\n"
        f"    with open_storage({storage.root!r}).writing(): print('writes')\n"
        "except OutputError as error: print(error)\n"
    )

    def try_it() -> str:
        return subprocess.run([sys.executable, "-c", other], capture_output=True, text=True).stdout

    with storage.writing():
        assert "Another run is writing" in try_it()
    assert try_it() == "writes\n"
