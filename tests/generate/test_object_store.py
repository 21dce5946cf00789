"""Jobs into an S3 that fails as such stores do, and a job that is submitted to a cluster."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.verify import verify
from aae_batch.errors import NonFiniteError
from aae_batch.generate.driver import run_job
from aae_batch.job.cluster import start_ray, stop_ray
from aae_batch.manifest.reader import open_manifest
from aae_batch.store.open import open_storage
from tests.chaos.fake import FakeWorker
from tests.conftest import SECRET, set_credentials
from tests.small_job import StartedCluster, assert_same_dataset, started_cluster

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def ray_with_credentials(s3_server):
    """A Ray whose actors have a bucket's credentials from their environment, and hear from the driver
    where it is."""
    with pytest.MonkeyPatch.context() as patch:
        set_credentials(patch)
        patch.setenv("AWS_MAX_ATTEMPTS", "10")  # one request may meet all faults of its kind
        start_ray(
            num_cpus=4,
            num_gpus=0,
            log_to_driver=False,
            _system_config={"metrics_report_interval_ms": 500},
        )
    yield
    stop_ray()


def prove(output: str, manifest: Path, endpoint: str | None = None) -> None:
    with open_manifest(manifest) as opened:
        found = verify(open_storage(output, endpoint), opened)
    assert found.proved, [str(problem) for problem in found.problems]


def test_a_store_that_throttles_fails_and_cuts_loses_nothing(
    settings, manifest, bucket, proxy, ray_with_credentials, tmp_path
):
    undisturbed = settings(output=str(tmp_path / "undisturbed"))
    run_job(undisturbed, worker_class=FakeWorker)
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
    summary = run_job(job, worker_class=FakeWorker)
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
    class Unlucky(FakeWorker):
        def admit(self, batch, request) -> None:
            if request.id in ("row-01", "row-02", "row-11"):
                raise NonFiniteError(request.id, "out of luck")
            super().admit(batch, request)

    job = settings(output=f"{bucket.url}/again", layout="webdataset")
    assert run_job(job, worker_class=Unlucky)["failed"] == 3
    kept = {row["id"]: row for row in Dataset(job.output).metadata().to_pylist()}
    assert run_job(job, worker_class=FakeWorker)["failed"] == 3, "nothing is made again unasked"
    again = job.model_copy(update={"retry_failed": True})
    assert run_job(again, worker_class=FakeWorker)["failed"] == 0
    prove(job.output, manifest)
    for row in Dataset(job.output).metadata().to_pylist():
        if row["id"] not in ("row-01", "row-02", "row-11"):
            assert row == kept[row["id"]]


@pytest.fixture
def head(bucket) -> Iterator[StartedCluster]:
    """A cluster that is started while the environment has the bucket's credentials."""
    with started_cluster(dict(os.environ)) as running:
        yield running


def test_a_submitted_job_fills_a_bucket(head, bucket, manifest, tiny_pipeline_folder, tmp_path):
    bucket.client.upload_file(str(manifest), bucket.name, "manifest.parquet")
    output = f"{bucket.url}/submitted"
    options = [
        *("--manifest", f"{bucket.url}/manifest.parquet", "--output", output),
        *("--model", str(tiny_pipeline_folder), "--shard-size", "3", "--actors", "2"),
    ]
    for part in ("jobs", "aae_batch"):
        shutil.copytree(ROOT / part, tmp_path / "working" / part)
    submit = ["ray", "job", "submit", "--address", head.dashboard, "--working-dir", "working"]
    for _ in range(60):
        done = subprocess.run(
            [*submit, "--", sys.executable, "jobs/generate.py", *options],
            cwd=tmp_path,
            env=head.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if "No available agent" not in done.stderr:  # the cluster has only just begun
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 images, 0 failed rows" in done.stdout
    assert not [secret for secret in (SECRET, head.token) if secret in done.stdout + done.stderr]
    prove(output, manifest)
    assert json.loads(open_storage(output).read_bytes("run.json"))["manifest"] == "manifest.parquet"


def test_a_job_is_not_taken_from_whoever_has_no_token(head):
    submit = ["ray", "job", "submit", "--address", head.dashboard, "--", "true"]
    without = {**head.environment, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(submit, env=without, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "AuthenticationError" in done.stderr
    assert "Note: RAY_AUTH_MODE is currently 'disabled' (not 'token')" in done.stderr
