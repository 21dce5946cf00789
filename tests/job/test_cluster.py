"""A Ray that we start is for this process alone; one that we join may be another's."""

from __future__ import annotations

import ipaddress
import json
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from aae_batch.errors import JobError
from aae_batch.job.cluster import (
    _address_of_environment,
    _join,
    _short_temp_dir,
    close_token_file,
    stop_on_signals,
)
from tests.small_job import StartedCluster, environment_of, raylet_of, started_cluster

OURS = """
import json, os, sys
import ray
from aae_batch.job.cluster import start_ray, stop_ray

before = dict(os.environ)
start_ray(num_cpus=2, num_gpus=0, log_to_driver=False)

@ray.remote
class Actor:
    def modes(self):
        return os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"])

actor = Actor.remote()
modes = ray.get(actor.modes.remote())
changed = sorted(
    name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)
)
print(json.dumps([ray.get_runtime_context().gcs_address, modes, changed]), flush=True)
address = sys.stdin.readline().strip()
stop_ray()
ray.init(address=address, log_to_driver=False)
print(json.dumps(ray.cluster_resources()["CPU"]), flush=True)
"""

ASK = """
import sys
from ray._raylet import GcsClient

print(len(GcsClient(address=sys.argv[1]).get_all_node_info()), "node")
"""

JOIN = """
import sys
import ray
from aae_batch.job.cluster import cluster
from aae_batch.job.settings import ActorSettings

with cluster(ActorSettings(ray_address=sys.argv[1] or None)):
    print(ray.cluster_resources()["CPU"], "CPUs")
"""


LOSE = """
import logging, os, signal, threading
import ray
from aae_batch.job.cluster import cluster
from aae_batch.job.settings import ActorSettings

class Dying:
    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

logged = threading.Event()
handler = logging.Handler()
handler.emit = lambda record: logged.set()
log = logging.getLogger("aae_batch.ray")
log.setLevel("INFO")
log.addHandler(handler)
with cluster(ActorSettings()):
    actor = ray.remote(Dying).remote()
    actor.die.remote()
    assert logged.wait(60)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def others(home, tmp_path_factory) -> Iterator[StartedCluster]:
    """A cluster of somebody else, which asks for a token."""
    with started_cluster(environment_of(tmp_path_factory.mktemp("others"))) as running:
        yield running


@pytest.fixture(scope="module")
def started(home, others) -> Iterator[tuple[subprocess.Popen, str, list]]:
    """A process that has started a Ray; the Ray's address, and what the process saw."""
    with subprocess.Popen(
        [sys.executable, "-c", OURS],
        # Somebody who is at home on the other cluster.
        env=environment_of(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=others.token),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        address, *seen = json.loads(process.stdout.readline())
        yield process, address, seen
        process.kill()


def run(script: str, address: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, address]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_every_port_of_a_ray_that_we_start_is_on_the_loopback_interface(started):
    process, *_ = started
    ours = psutil.Process(process.pid)
    listening = {}
    for one in [ours, *ours.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            for connection in one.net_connections("inet"):
                if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE):
                    listening[f"{one.name()} {connection.laddr.port}"] = connection.laddr.ip
    assert any("raylet" in name for name in listening)
    assert any("Agent" in name for name in listening), "the metrics are open, too"

    def is_loopback(text: str) -> bool:
        address = ipaddress.ip_address(text)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback

    assert [name for name, ip in listening.items() if not is_loopback(ip)] == []


def test_a_ray_that_we_start_refuses_whoever_lacks_its_token(started, home):
    process, address, _ = started
    token = raylet_of(process.pid).environ()["RAY_AUTH_TOKEN"]
    for lacks in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * len(token)}):
        done = run(ASK, address, environment_of(home, **lacks))
        assert "AuthenticationError" in done.stderr
        assert "node" not in done.stdout
    has = environment_of(home, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    assert run(ASK, address, has).stdout == "1 node\n"


def test_its_token_is_in_no_file_and_does_not_stay_in_the_environment(started, home):
    _, _, (modes, changed) = started
    assert modes == ["token", 64]
    assert not (home / ".ray").exists()
    assert [name for name in changed if "AUTH" in name or "CLUSTER" in name] == []


def test_whoever_started_a_ray_can_join_another_one_afterwards(started, others):
    process, *_ = started
    process.stdin.write(f"{others.address}\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline()) == others.cpus


@pytest.mark.slow
def test_a_cluster_without_its_token_is_told_as_such(others, home):
    done = run(JOIN, others.address, environment_of(home))
    assert "JobError" in done.stderr
    assert "asks for another token: set RAY_AUTH_MODE=token, with" in done.stderr
    done = run(JOIN, others.address, others.environment)
    assert done.stdout == f"{others.cpus:.1f} CPUs\n", done.stderr


def test_a_second_signal_stops_at_once():
    with stop_on_signals(grace=30) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt, match="Stopped at once"):
            signal.raise_signal(signal.SIGTERM)


def test_a_cluster_that_is_gone_is_an_error_and_not_replaced_by_one_here(home):
    gone = "127.0.0.1:9"
    for address, environment in ((gone, {}), (None, {"RAY_ADDRESS": gone})):
        done = run(JOIN, address or "", environment_of(home, **environment))
        assert f"JobError: No Ray at {gone}" in done.stderr
        assert ("as RAY_ADDRESS says" in done.stderr) == (address is None)
        assert "CPUs" not in done.stdout


@pytest.mark.slow
def test_a_cluster_that_ray_address_names_is_joined_and_said(others):
    done = run(JOIN, "", {**others.environment, "RAY_ADDRESS": others.address})
    assert done.stdout == f"{others.cpus:.1f} CPUs\n", done.stderr
    assert f"joining Ray at {others.address}, which RAY_ADDRESS names" in done.stderr


def test_a_dashboard_in_ray_address_is_no_cluster_to_join(monkeypatch, caplog):
    monkeypatch.setenv("RAY_ADDRESS", "http://localhost:8265")
    assert _address_of_environment() is None
    assert "this job runs on this machine alone" in caplog.text


def test_ray_s_sockets_have_short_paths_whatever_tmpdir_is(monkeypatch, caplog):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/short")
    assert _short_temp_dir() == {}
    monkeypatch.setenv("TMPDIR", "/" + "long" * 25)
    assert _short_temp_dir() == {"RAY_TMPDIR": "/tmp"}
    assert "TMPDIR is too long for Ray's sockets" in caplog.text


def test_a_token_file_of_ray_s_is_closed_to_others(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    close_token_file()
    assert not (tmp_path / ".ray").exists()
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("a token")
    path.chmod(0o644)
    close_token_file()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "a token"


def test_what_ray_says_of_a_dead_process_is_logged_and_not_printed(tmp_path):
    environment = environment_of(tmp_path)
    command = [sys.executable, "-c", LOSE]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        (None, "No Ray at auto: "),
        ("host.invalid:1", "No Ray at host.invalid:1, as RAY_ADDRESS says: "),
    ],
)
def test_an_address_is_the_environment_s_only_if_it_names_one(monkeypatch, variable, said):
    def nowhere(**_):
        raise ConnectionError("none is running")

    monkeypatch.setattr("ray.init", nowhere)  # another's may be running on this machine
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    with pytest.raises(JobError, match=f"^{said}"):
        _join("auto")
