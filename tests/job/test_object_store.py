"""Jobs into an S3 that fails as such stores do, and a job that is submitted to a cluster."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import ray

from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.storage import open_storage
from aae_batch.dataset.verify import verify
from aae_batch.errors import NonFiniteError
from aae_batch.job.cluster import start_ray
from aae_batch.job.driver import run_job
from aae_batch.job.worker import Worker
from aae_batch.manifest import open_manifest
from tests.conftest import SECRET, set_credentials
from tests.job.conftest import assert_same_dataset

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def ray_with_credentials(s3_server):
    """A Ray whose actors have a bucket's credentials from their environment, and hear from the driver
    where it is."""
    with pytest.MonkeyPatch.context() as patch:
        set_credentials(patch)
        patch.setenv("AWS_MAX_ATTEMPTS", "6")
        start_ray(
            num_cpus=4,
            num_gpus=0,
            log_to_driver=False,
            _system_config={"metrics_report_interval_ms": 500},
        )
    yield
    ray.shutdown()


def prove(output: str, manifest: Path, endpoint: str | None = None) -> None:
    with open_manifest(manifest) as opened:
        found = verify(open_storage(output, endpoint), opened)
    assert found.proved, [str(problem) for problem in found.problems]


def test_a_store_that_throttles_fails_and_cuts_loses_nothing(
    settings, manifest, bucket, proxy, ray_with_credentials, tmp_path
):
    undisturbed = settings(output=str(tmp_path / "undisturbed"))
    run_job(undisturbed)
    for kind, method, path in [
        ("slow-down", "PUT", ".png"),
        ("error", "PUT", ".png"),
        ("drop", "PUT", ".png"),
        ("drop-answer", "PUT", ".png"),
        ("slow", "PUT", ".png"),
        ("slow-down", "PUT", ".parquet"),
        ("drop", "PUT", ".parquet"),
        ("drop-answer", "PUT", ".parquet"),
        ("error", "PUT", "run.json"),
        ("slow-down", "GET", ""),
        ("cut-answer", "GET", ".parquet"),
    ]:
        proxy.fail(kind, times=2, method=method, path=path)
    job = settings(output=f"{bucket.url}/some/dataset", s3_endpoint=proxy.url)
    summary = run_job(job)
    assert (summary["images"], summary["failed"]) == (12, 0)
    met = [fault.kind for fault in proxy.faults if fault.times == 0]
    assert len(met) >= 9, "most of the faults were met"
    prove(job.output, manifest)
    in_store, local = open_storage(job.output), open_storage(undisturbed.output)
    assert_same_dataset(in_store, local)
    assert not in_store.exists(".lock")
    names = ["run.json", "summary.json", "progress.json"]
    assert all(SECRET.encode() not in in_store.read_bytes(name) for name in names)


def test_the_job_shows_at_rays_metrics_port(settings, bucket, ray_with_credentials):
    (node,) = ray.nodes()
    port = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {f"ray_aae_batch_{name}" for name in ("rows", "seconds", "slots_in_use", "queue")}
    seen: set[str] = set()

    def look(progress) -> None:
        if progress.started:
            with urllib.request.urlopen(port, timeout=5) as answer:
                text = answer.read().decode()
            seen.update(name for name in wanted if name in text)

    run_job(settings(), look)
    assert seen == wanted


def test_failed_rows_are_made_again_in_a_bucket(settings, manifest, bucket, ray_with_credentials):
    class Unlucky(Worker):
        def admit(self, batch, request) -> None:
            if request.id in ("row-01", "row-02", "row-11"):
                raise NonFiniteError(request.id, "out of luck")
            super().admit(batch, request)

    job = settings(output=f"{bucket.url}/again", layout="webdataset")
    assert run_job(job, worker_class=Unlucky)["failed"] == 3
    kept = {row["id"]: row for row in Dataset(job.output).metadata().to_pylist()}
    assert run_job(job)["failed"] == 3, "nothing is made again unasked"
    assert run_job(job.model_copy(update={"retry_failed": True}))["failed"] == 0
    prove(job.output, manifest)
    for row in Dataset(job.output).metadata().to_pylist():
        if row["id"] not in ("row-01", "row-02", "row-11"):
            assert row == kept[row["id"]]


@pytest.fixture
def head(bucket, tmp_path):
    """A cluster started by its command line; yields where jobs are submitted to."""
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": "/tmp",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    port = free_port()
    start = ["ray", "start", "--head", "--block", "--port=0", "--num-cpus=4"]
    with subprocess.Popen(
        # Ports of its own, since another Ray of these tests may have the usual ones.
        [*start, f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as running:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/api/version", running)
        yield address, environment
        ours = psutil.Process(running.pid)
        for process in [*ours.children(recursive=True), ours]:
            process.kill()


def wait_for(url: str, running: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert running.poll() is None, "the cluster has ended"
        assert time.monotonic() < deadline
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_submitted_job_fills_a_bucket(head, bucket, manifest, tiny_pipeline_folder, tmp_path):
    address, environment = head
    bucket.client.upload_file(str(manifest), bucket.name, "manifest.parquet")
    output = f"{bucket.url}/submitted"
    options = [
        *("--manifest", f"{bucket.url}/manifest.parquet", "--output", output),
        *("--model", str(tiny_pipeline_folder), "--shard-size", "3", "--actors", "2"),
    ]
    for part in ("jobs", "aae_batch"):
        shutil.copytree(ROOT / part, tmp_path / "working" / part)
    submit = ["ray", "job", "submit", "--address", address, "--working-dir", "working"]
    for _ in range(60):
        done = subprocess.run(
            [*submit, "--", sys.executable, "jobs/generate.py", *options],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if "No available agent" not in done.stderr:  # the cluster has only just begun
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 images, 0 failed rows" in done.stdout
    assert SECRET not in done.stdout + done.stderr
    prove(output, manifest)
    assert json.loads(open_storage(output).read_bytes("run.json"))["manifest"] == "manifest.parquet"
