"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from aae_batch.errors import OutputError
from aae_batch.store import whole_file
from aae_batch.store.open import open_storage


def test_of_many_that_create_a_file_one_does(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: whole_file.create(tmp_path, "a/b", b"%d" % i), range(50)))
    assert made.count(True) == 1
    assert (tmp_path / "a/b").read_bytes() == b"%d" % made.index(True)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("write", [whole_file.create, whole_file.write])
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, write, monkeypatch):
    order = []
    fsync, link, replace = os.fsync, os.link, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("disk"), fsync(handle)))
    monkeypatch.setattr(os, "link", lambda *of: (order.append("name"), link(*of)))
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda *of: (order.append("name"), replace(*of))[1]
    )
    write(tmp_path, "a", b"1")
    assert order == ["disk", "name", "disk"]  # the bytes, the name, the folder's entry


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    def refuse(*of):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert whole_file.create(tmp_path, "a", b"1")
    assert not whole_file.create(tmp_path, "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_what_a_killed_writer_left_is_swept_by_the_next_and_at_the_end(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from aae_batch.store import whole_file\n"
        "os.link = lambda *of: os.kill(os.getpid(), signal.SIGKILL)\n"
        "whole_file.create(Path(sys.argv[1]), 'images/a.png', b'1')"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    storage = open_storage(tmp_path)
    assert len(os.listdir(tmp_path / ".parts")) == 1
    assert (storage.list("images/"), storage.anything()) == ([], "images")
    with storage.writing():
        assert not (tmp_path / ".parts").exists()
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
        assert (tmp_path / ".parts").exists()
    assert not (tmp_path / ".parts").exists()


def test_what_only_looks_like_a_writer_s_is_neither_empty_nor_swept(tmp_path):
    for i, (name, data) in enumerate(
        [(".parts/thesis.txt", b"dear"), (".lock", b"dear"), (".lock-holder", b"dear")]
    ):
        root = tmp_path / str(i)
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(data)
        storage = open_storage(root)
        assert storage.anything() == name.split("/")[0]
        with contextlib.suppress(OutputError), storage.writing():
            pass
        assert (root / name).read_bytes() == data


def test_a_folder_that_another_writer_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    mkdir, left = type(tmp_path).mkdir, [FileExistsError(17, "x"), FileNotFoundError(2, "x")]

    def made(self, *of, **more):
        if self.name == ".parts" and left:
            raise left.pop()
        return mkdir(self, *of, **more)

    monkeypatch.setattr(type(tmp_path), "mkdir", made)
    assert whole_file.create(tmp_path, "a", b"1")


def test_a_link_on_the_way_is_refused_and_not_followed(tmp_path):
    elsewhere = tmp_path / "photos"
    elsewhere.mkdir()
    (elsewhere / "a.png").write_bytes(b"dear")
    root = tmp_path / "out"
    root.mkdir()
    (root / "images").symlink_to(elsewhere)
    storage = open_storage(root)
    for use in (
        lambda: storage.read_bytes("images/a.png"),
        lambda: storage.write_bytes("images/a.png", b""),
        lambda: storage.create_bytes("images/b.png", b""),
        lambda: storage.delete("images/a.png"),
        lambda: storage.list("images/"),
        lambda: storage.anything(),
    ):
        with pytest.raises(OutputError, match="is a link"):
            use()
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == {"a.png": b"dear"}


def test_a_root_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    storage = open_storage(tmp_path / "out")
    assert storage.anything() is None
    storage.write_bytes("a", b"1")
    assert (tmp_path / "disk/a").read_bytes() == b"1"
    assert storage.anything() == "a"
    assert storage.list("") == ["a"]
