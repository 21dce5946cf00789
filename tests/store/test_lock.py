"""One writer per root, in every kind of storage."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from aae_batch.errors import OutputError
from aae_batch.store.lock import NAME, TIMING, Holder, Timing
from aae_batch.store.open import open_storage

FAST = Timing(renew=0.1, stale=4.0, settle=0.05)
"""S3 tells times in whole seconds, and a busy machine may take one for a request."""


def refusal(storage, timing: Timing = TIMING) -> str:
    """Why another process may not write."""
    with (
        pytest.raises(OutputError) as refused,
        pickle.loads(pickle.dumps(storage)).writing(timing),
    ):
        pass
    return str(refused.value)


def wait_for(what) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def remote(bucket):
    return open_storage(f"{bucket.url}/out")


@pytest.fixture(params=["s3", "memory"])
def abandoned(request, tmp_path):
    """A root whose writer has just died."""
    root = f"memory://{tmp_path.name}"
    if request.param == "s3":
        root = f"{request.getfixturevalue('bucket').url}/out"
    storage = open_storage(root)
    storage.write_bytes(NAME, Holder("elsewhere", 7, "token", "long ago", "long ago").as_json())
    return storage


def test_a_second_writer_is_refused_and_told_who_is_first(storage):
    with storage.writing(FAST):
        said = refusal(storage)
        assert said.startswith(f"Another run is writing to {storage.root}: process {os.getpid()}")
        assert f"on {socket.gethostname()}, since 20" in said
        assert "last heard of" in said
        storage.write_bytes("a", b"1")  # the first one still may
    with storage.writing(FAST):
        pass


def test_the_lock_is_seen_in_no_listing_and_leaves_nothing(storage):
    with storage.writing(FAST):
        assert storage.list("") == []
    assert not storage.exists(".lock-holder")
    if not storage.root.startswith("/"):
        assert not storage.exists(NAME)


def test_a_folder_s_lock_ends_with_its_process(tmp_path):
    root = str(tmp_path / "out")
    dies = (
        "import os\n"
        "from aae_batch.store.open import open_storage\n"
        f"with open_storage({root!r}).writing(): os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", dies], check=True)
    with open_storage(root).writing():
        pass


def test_a_writer_that_died_is_waited_for_and_then_overtaken(abandoned):
    said = refusal(abandoned)
    assert "process 7 on elsewhere" in said
    assert "if that run has died, the output is free in" in said
    time.sleep(FAST.stale + 1)
    with abandoned.writing(FAST):
        assert "process 7 on elsewhere" not in refusal(abandoned)
    with abandoned.writing(FAST):
        pass


def test_a_lock_that_is_renewed_does_not_get_stale(remote):
    with remote.writing(FAST):
        time.sleep(FAST.stale + 1)
        assert "Another run is writing" in refusal(remote, FAST)


def test_of_two_that_overtake_one_wins(bucket, remote):
    remote.write_bytes(NAME, Holder("elsewhere", 7, "token", "long ago", "long ago").as_json())
    time.sleep(FAST.stale + 1)
    came, tried = threading.Barrier(4), threading.Barrier(4)
    won = []

    def overtake() -> None:
        storage = open_storage(remote.root)
        came.wait()
        try:
            with storage.writing(FAST):
                won.append(storage)
                tried.wait(30)
        except OutputError:
            tried.wait(30)

    threads = [threading.Thread(target=overtake) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


@pytest.mark.parametrize("kind", ["s3", "memory"])
def test_a_writer_that_was_overtaken_learns_of_it_and_writes_no_more(kind, request, tmp_path):
    root = request.getfixturevalue("bucket").url if kind == "s3" else f"memory://{tmp_path.name}"
    storage, other = open_storage(root), open_storage(root)
    theirs = Holder("elsewhere", 7, "token", "now", "now").as_json()
    with storage.writing(FAST) as lock:
        lock.check()
        other.write_bytes(NAME, theirs)
        wait_for(lambda: lock.lost)
        with pytest.raises(OutputError, match="taken over"):
            lock.check()
        with pytest.raises(OutputError, match="taken over"):
            storage.write_bytes("a", b"1")
    assert other.read_bytes(NAME) == theirs
    assert not other.exists("a")


def test_a_writer_that_slept_and_was_overtaken_does_not_write_before_it_knows(remote):
    """Its first act after a long sleep is a write, before the next renewal."""
    with remote.writing(replace(FAST, renew=1000)) as lock:
        remote.write_bytes("a", b"1")
        lock.renewed -= 1000
        remote.lock_cell().delete()
        other = open_storage(remote.root).writing(FAST)
        with other, pytest.raises(OutputError, match="nothing more is written"):
            remote.write_bytes("a", b"2")
        assert remote.read_bytes("a") == b"1"


def test_an_answer_that_got_lost_does_not_lose_the_lock(bucket, proxy):
    storage = open_storage(f"{bucket.url}/out", proxy.url)
    proxy.fail("drop-answer", times=2, method="PUT", path=NAME)
    with storage.writing(FAST) as lock:
        wait_for(lambda: sum(r.startswith("PUT") for r in proxy.requests) > 4)
        assert not lock.lost


def test_a_store_that_is_away_for_a_while_does_not_lose_the_lock(bucket, proxy):
    storage = open_storage(f"{bucket.url}/out", proxy.url)
    with storage.writing(FAST) as lock:
        proxy.fail("error", times=4, path=NAME)
        wait_for(lambda: proxy.faults[0].times == 0)
        wait_for(lambda: proxy.requests[-1].startswith("PUT"))
        assert not lock.lost


def test_a_store_that_does_not_write_on_condition_is_locked_all_the_same(bucket, proxy):
    for header in ("If-None-Match", "If-Match"):
        proxy.fail("not-implemented", times=1000, method="PUT", header=header)
    storage = open_storage(f"{bucket.url}/out", proxy.url)
    with storage.writing(FAST):
        assert f"process {os.getpid()}" in refusal(storage)


def test_a_lock_whose_process_has_ended_here_is_free_at_once(remote):
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    holder = replace(Holder.this_process(), pid=int(ended.stdout))
    remote.write_bytes(NAME, holder.as_json())
    with remote.writing(FAST) as lock:
        lock.check()


# --- a worker's eye on it ------------------------------------------------------------------------


@pytest.fixture
def worker():
    """A copy of a storage as a worker has it, which looks at the lock at every write."""

    def of(storage, token: str):
        copy = pickle.loads(pickle.dumps(storage))
        copy.heed(token, replace(TIMING, look=0.0))
        return copy

    return of


def test_a_worker_writes_while_its_driver_holds_the_lock_and_no_longer(storage, worker):
    with storage.writing(FAST) as lock:
        copy = worker(storage, lock.token)
        copy.write_bytes("a", b"1")
        assert copy.create_bytes("b", b"1")
    for write in (copy.write_bytes, copy.create_bytes):
        with pytest.raises(OutputError, match="nothing more is written"):
            write("c", b"2")
    with pytest.raises(OutputError, match="nothing more is written"):
        copy.delete("a")
    with storage.writing(FAST):  # another run's
        with pytest.raises(OutputError, match="nothing more is written"):
            copy.write_bytes("a", b"2")
        assert storage.read_bytes("a") == b"1"


def test_a_worker_stops_when_its_driver_sleeps_for_too_long(remote, worker):
    with remote.writing(replace(FAST, renew=1000)) as lock:
        copy = worker(remote, lock.token)
        copy.write_bytes("a", b"1")
        copy.heed(lock.token, replace(FAST, look=0.0, stale=1.0))

        def refused() -> bool:
            try:
                copy.write_bytes("a", b"2")
            except OutputError:
                return True
            return False

        wait_for(refused)


def test_a_worker_stops_when_its_driver_was_killed_on_this_machine(tmp_path, worker):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    storage = open_storage(tmp_path)
    holder = replace(Holder.this_process(), pid=ended.pid)
    storage.write_bytes(".lock-holder", holder.as_json())
    with pytest.raises(OutputError, match="nothing more is written"):
        worker(storage, holder.token).write_bytes("a", b"1")


@pytest.mark.parametrize("elsewhere", ["a boot of another machine pid:[4026531836]", ""])
def test_a_process_is_only_looked_for_on_the_machine_and_boot_that_it_ran_on(remote, elsewhere):
    """Machines that were cloned have the same name, and their processes the same numbers."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    holder = replace(Holder.this_process(), pid=ended.pid)
    assert holder.has_ended
    remote.write_bytes(NAME, replace(holder, pid_space=elsewhere).as_json())
    assert "if that run has died, the output is free in" in refusal(remote)


def test_a_lock_that_no_run_wrote_is_not_taken_over(remote):
    for data in (b"dear to someone", b"", b"[]"):
        remote.write_bytes(NAME, data)
        with (
            pytest.raises(OutputError, match="no run wrote it"),
            remote.writing(replace(FAST, stale=0.0)),
        ):
            pass
        assert remote.read_bytes(NAME) == data


def test_a_note_that_cannot_be_read_for_a_moment_is_no_loss(tmp_path, worker, monkeypatch):
    from aae_batch.store import local as of_folders

    storage = open_storage(tmp_path)
    with storage.writing(FAST) as lock:
        copy = worker(storage, lock.token)
        with monkeypatch.context() as patched:

            def stale(root):
                raise OSError(116, "Stale file handle")

            patched.setattr(of_folders, "read_note", stale)
            copy.write_bytes("a", b"1")
        copy.write_bytes("a", b"2")


def test_a_link_in_a_lock_s_place_is_not_written_through(tmp_path):
    dear = tmp_path / "dear.txt"
    dear.write_text("dear")
    for name in (NAME, ".lock-holder"):
        root = tmp_path / f"out{name}"
        root.mkdir()
        (root / name).symlink_to(dear)
        with pytest.raises(OutputError, match="is a link"), open_storage(root).writing(FAST):
            pass
        assert dear.read_text() == "dear"
