"""A disk that is full, a user who may not, clocks that are wrong, and very many shards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

import pytest

from tests.chaos.attacker import ROOT, Choices, Round
from tests.chaos.judge import BucketReader, FolderReader, judge

NOBODY = 65534
IS_ROOT = os.geteuid() == 0


def choices(**changes) -> Choices:
    values = {"place": "folder", "layout": "files", "slots": 1, "shard_size": 4, "rows": 40}
    values |= {"command": "generate", "kills": 0, "form": "hf", "seeing": False, "rain": False}
    return Choices(seed=1, **{**values, **changes})


def run(round: Round, *more: str, **environment: str) -> tuple[int, str]:
    """Generate, undisturbed. Returns the exit code, and what was said."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        process = round.start(round._generate_command(*more))
    finally:
        os.environ.clear()
        os.environ.update(before)
    process.wait(240)
    return process.returncode, process.said.read_text()


# --- a full disk ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A folder with little room, and how to give it more; in kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(folder)]
    if not IS_ROOT or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")

    def enlarge(kilobytes: int) -> None:
        size = f"remount,size={kilobytes}k"
        subprocess.run(["mount", "-o", size, str(folder)], check=True)

    yield folder, enlarge
    subprocess.run(["umount", "-l", str(folder)], check=True)


SLOW = pytest.mark.slow


@SLOW
@pytest.mark.parametrize("layout", ["files", "webdataset", "parquet"])
def test_a_disk_that_is_full_amid_a_commit_and_then_has_room(raging, small_disk, layout):
    folder, enlarge = small_disk
    with raging(1) as storm:
        one = Round(storm, choices(layout=layout))
        one.output, stops = str(folder / "out"), 0
        for kilobytes in (250, 20_000):  # each time it gets a little further
            code, said = run(one)
            if code == 0:
                break
            stops += 1
            assert code in (2, 3), said
            assert "No space left on device" in said
            assert "Traceback" not in said
            enlarge(kilobytes)
        else:
            code, said = run(one)
        assert code == 0, said
        assert stops >= 2
        verdict = judge(FolderReader(folder / "out"), one.manifest)
    assert verdict.sound, verdict.problems
    assert verdict.parts == 0


# --- another user --------------------------------------------------------------------------------


@pytest.fixture
def as_nobody(tmp_path):
    """Runs a command line as a user who owns nothing but `home`, which is given."""
    if not IS_ROOT:
        pytest.skip("only root can be someone else")
    # This Python may be root's alone: so whoever runs it may read everything, and write nothing.
    ids = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    reading = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    someone = ["setpriv", *ids, *reading, sys.executable]
    if shutil.which("setpriv") is None or subprocess.run([*someone, "-c", "import ray"]).returncode:
        pytest.skip("nobody but root can run this Python")
    home = Path("/tmp") / f"nobody-{os.getpid()}"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    environment = {**os.environ, "HOME": str(home), "RAY_TMPDIR": str(home)}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}

    def make(*command: str) -> tuple[int, str]:
        done = subprocess.run(
            [*someone, "-m", "tests.chaos.drive", *command],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        return done.returncode, done.stdout + done.stderr

    yield home, make
    subprocess.run(["rm", "-rf", str(home)], check=True)


@SLOW
def test_another_user_makes_what_he_may_and_is_told_what_he_may_not(as_nobody, fake_model):
    home, run_as_nobody = as_nobody
    rows = [{"id": f"r{i}", "prompt": "a cat", "subjects": ["cat"], "seed": i} for i in range(6)]
    manifest = home / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = home / "model"
    shutil.copytree(fake_model, model)
    options = ["--model", str(model), "--device", "cpu", "--dtype", "float32", "--shard-size", "2"]

    def generate(output: Path) -> tuple[int, str]:
        return run_as_nobody("generate", str(manifest), str(output), *options)

    code, said = generate(home / "own")
    assert code == 0, said
    assert judge(FolderReader(home / "own"), manifest).sound
    closed = home / "closed"
    closed.mkdir(mode=0o755)  # root's
    code, said = generate(closed / "out")
    assert code == 2, said
    assert "Permission denied" in said
    assert "Traceback" not in said
    subprocess.run(["chown", "-R", "0:0", str(home / "own")], check=True)
    code, said = run_as_nobody("verify", str(home / "own"), "--manifest", str(manifest))
    assert code == 0, said
    (home / "own/images/00001/r2.png").write_bytes(b"x")
    code, said = run_as_nobody("verify", str(home / "own"), "--repair")
    assert code == 2, said
    assert "Traceback" not in said


# --- clocks --------------------------------------------------------------------------------------


@SLOW
@pytest.mark.parametrize("skews", [(600, -600), (-600, 600)], ids=str)
def test_clocks_that_differ_by_minutes_do_not_let_two_write(raging, skews):
    with raging(1) as storm:
        one = Round(storm, choices(place="bucket", rows=400, shard_size=8))
        first, second = (f"{skew}" for skew in skews)
        os.environ["AAE_CHAOS_CLOCK"] = first
        try:
            holder = one.start(one._generate_command())
        finally:
            del os.environ["AAE_CHAOS_CLOCK"]
        deadline = time.monotonic() + 60
        while not one._somebody_works(["generate"]):
            assert holder.poll() is None, holder.said.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        code, said = run(one, AAE_CHAOS_CLOCK=second)
        was_at_work = holder.poll() is None
        holder.wait(240)
        assert holder.returncode == 0, holder.said.read_text()
        if was_at_work:
            assert code == 2, said
            assert "Another run is writing" in said
        assert run(one, AAE_CHAOS_CLOCK=second)[0] == 0
        verdict = judge(BucketReader(storm.client, storm.bucket, one.prefix), one.manifest)
    assert was_at_work, "the second came too late to be refused"
    assert verdict.sound, verdict.problems


# --- very many shards ----------------------------------------------------------------------------

SHARDS = 100_000


class _Listing(BaseHTTPRequestHandler):
    """A bucket that holds nothing but the names of very many tables, and one `run.json`."""

    protocol_version = "HTTP/1.1"
    run = b""
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if "list-type" in query:
            self._answer(200, self._page(query).encode())
        elif parts.path.endswith("run.json"):
            self._answer(200, self.run)
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def do_HEAD(self) -> None:
        found = urlsplit(self.path).path.endswith("run.json")
        self._answer(200 if found else 404, b"")

    def _page(self, query: dict[str, str]) -> str:
        prefix = query.get("prefix", "")
        start = int(query.get("continuation-token", "0"))
        many = SHARDS if prefix.endswith("metadata/") else 0
        stop = min(start + int(query.get("max-keys", "1000")), many)
        items = "".join(
            f"<Contents><Key>{escape(prefix)}{i:05d}.parquet</Key><Size>9</Size><ETag>e</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for i in range(start, stop)
        )
        more = f"<NextContinuationToken>{stop}</NextContinuationToken>" if stop < many else ""
        truncated = "true" if stop < many else "false"
        return (
            f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{more}{items}"
            "</ListBucketResult>"
        )

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("ETag", '"e"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.mark.slow
def test_the_status_of_a_hundred_thousand_shards(aws, capsys):
    run = {"fingerprint": "f", "settings": {}, "rows": SHARDS * 256, "shard_size": 256}
    _Listing.run = json.dumps(run | {"layout": "files"}).encode()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Listing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "aae_batch.cli", "status", "s3://many/out"],
        env={**os.environ, "AWS_ENDPOINT_URL": endpoint, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    seconds = time.monotonic() - start
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert f"{SHARDS}/{SHARDS} shards committed" in done.stdout
    assert _Listing.requests < SHARDS / 1000 + 20, "a request for each shard would take hours"
    with capsys.disabled():
        print(f"\nstatus of {SHARDS} shards: {seconds:.1f} s, {_Listing.requests} requests")
    assert seconds < 300, "on a busy machine, too"
