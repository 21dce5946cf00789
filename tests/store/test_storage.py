"""What holds for every kind of storage, and what is special about folders."""

from __future__ import annotations

import pickle

import pytest

from aae_batch.errors import OutputError
from aae_batch.store.open import open_storage


def test_what_is_written_is_read_listed_and_deleted(storage):
    storage.write_bytes("images/00001/b.png", b"b")
    storage.write_bytes("images/00001/a.png", b"a")
    storage.write_bytes("images/00002/c.png", b"c")
    assert storage.read_bytes("images/00001/a.png") == b"a"
    assert storage.list("images/00001/") == ["images/00001/a.png", "images/00001/b.png"]
    assert storage.exists("images/00001/a.png")
    storage.delete("images/00001/a.png")
    storage.delete("images/00001/a.png")
    assert not storage.exists("images/00001/a.png")
    assert storage.list("nothing/") == []


def test_a_prefix_is_a_folder_and_not_the_beginning_of_a_name(storage):
    storage.write_bytes("images/1", b"")
    storage.write_bytes("images2/1", b"")
    assert storage.list("images/") == ["images/1"]


def test_writing_replaces_the_whole_object_and_leaves_nothing_beside_it(storage):
    storage.write_bytes("metadata/1", b"long ago")
    storage.write_bytes("metadata/1", b"now")
    assert storage.read_bytes("metadata/1") == b"now"
    assert storage.list("metadata/") == ["metadata/1"]


def test_one_object_may_be_there_already(storage):
    storage.write_bytes("manifest.parquet", b"")
    assert storage.anything() == "manifest.parquet"
    assert storage.anything(besides="manifest.parquet") is None
    storage.write_bytes("z", b"")
    assert storage.anything(besides="manifest.parquet") == "z"


def test_an_object_can_be_read_in_parts(storage):
    storage.write_bytes("a", b"0123456789")
    with storage.open("a") as file:
        assert file.seek(-3, 2) == 7
        assert file.read() == b"789"
        file.seek(2)
        assert (file.read(3), file.tell()) == (b"234", 5)
        file.seek(20)
        assert file.read() == b""


def test_it_travels_to_the_actors(storage):
    storage.write_bytes("a", b"1")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("a") == b"1"


def test_what_is_not_there_is_named(storage):
    with pytest.raises(OutputError, match=r"Cannot read .*out/none\.json: .*[Nn]o such"):
        storage.read_bytes("none.json")
    with pytest.raises(OutputError, match=r"Cannot read .*out/none\.json: .*[Nn]o such"):
        storage.open("none.json").read()


def test_a_folder_that_cannot_be_written_or_read_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"Cannot write .*Not a directory"):
        open_storage(tmp_path / "file").write_bytes("a", b"")
    with pytest.raises(OutputError, match="No such file"):
        open_storage(tmp_path).read_bytes("a")
    with pytest.raises(OutputError, match=r"Cannot read .*Not a directory"):
        open_storage(tmp_path / "file" / "out").anything()


def test_a_name_that_the_system_refuses_is_an_error_of_ours(tmp_path):
    storage = open_storage(tmp_path / "out")
    storage.write_bytes("images/a", b"")
    for use in (storage.read_bytes, storage.open, storage.exists, storage.list, storage.delete):
        with pytest.raises(OutputError, match="File name too long"):
            use(f"images/{'x' * 300}")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftps-of-old://host/x", "No store supports ftps-of-old://"),
        ("gs://bucket/x", r"pip install gcsfs"),
        ("abfs://box/x", r"pip install adlfs"),
        ("file:///x", "without file://"),
        ("s3://", "names no bucket"),
        ("s3a://bucket/out", "write s3:// in place of s3a://"),
        ("s3n://bucket/out", "write s3:// in place of s3n://"),
    ],
)
def test_a_url_without_a_store_says_what_to_do(url, said):
    with pytest.raises(OutputError, match=said):
        open_storage(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:the/secret@bucket/out",
        "s3://secret@bucket/out",
        "S3://KEY:secret",
        "s3a://KEY:secret@bucket/out",
        "memory://user:secret@host/out",
        "https://host/m.csv?signature=secret",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url):
    with pytest.raises(OutputError, match="in the environment") as refused:
        open_storage(url)
    assert "secret" not in str(refused.value)


def test_a_port_in_a_url_is_no_credential():
    assert open_storage("memory://host:8020/user@home").root == "memory://host:8020/user@home"
