"""A model that is quick and draws nothing, a Ray, and manifests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from aae_batch.dataset.reader import Dataset
from aae_batch.generate.settings import JobSettings
from aae_batch.store.base import Storage

STEPS = 4


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory) -> Path:
    """A Stable Diffusion 1.x pipeline with random weights, that speaks of shapes."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    from training import networks

    torch.manual_seed(0)
    words = networks.tokenizer()
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=2,
            cross_attention_dim=networks.TEXT_WIDTH,
        ),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=128,
        ),
        text_encoder=networks.text_encoder(words),
        tokenizer=words,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipeline.save_pretrained(folder)
    guidance = {"num_inference_steps": STEPS, "attn_res": [8, 8], "max_iter_to_alter": 2}
    guidance |= {"thresholds": {"1": 0.3}, "max_refinement_steps": 2, "scale_factor": 1.0}
    (folder / "guidance.json").write_text(json.dumps(guidance))
    return folder


@pytest.fixture(scope="module")
def ray_here():
    """One Ray for the tests of a module, large enough for two actors."""
    from aae_batch.job.cluster import start_ray, stop_ray

    start_ray(num_cpus=4, num_gpus=0, log_to_driver=False)
    yield
    stop_ray()


def environment_of(home: Path, **changes: str) -> dict[str, str]:
    """That of a person with this home, who has no token elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "HOME": str(home), **changes}


def raylet_of(pid: int) -> psutil.Process:
    """The raylet that a process has started. Others of its children come and go meanwhile."""
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name() == "raylet":
                return process
    raise AssertionError(f"{pid} has no raylet")


@dataclass(frozen=True)
class StartedCluster:
    """A cluster that was started by its command line, and asks for a token.

    Attributes:
        address: for `ray.init`.
        dashboard: where jobs are submitted to.
        environment: of whoever has the token.
    """

    address: str
    dashboard: str
    cpus: int
    token: str
    environment: dict[str, str]
    pid: int

    def processes(self) -> list[psutil.Process]:
        ours = psutil.Process(self.pid)
        return [*ours.children(recursive=True), ours]


@contextmanager
def started_cluster(environment: dict[str, str], cpus: int = 4) -> Iterator[StartedCluster]:
    token = os.urandom(32).hex()
    environment = {
        **environment,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_TMPDIR": "/tmp",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    port, dashboard, agent = free_port(), free_port(), free_port()
    start = ["ray", "start", "--head", "--block", f"--port={port}", f"--num-cpus={cpus}"]
    with subprocess.Popen(
        # Ports of its own, since another Ray of these tests may have the usual ones.
        [*start, f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as running:
        url = f"http://127.0.0.1:{dashboard}"
        address = f"127.0.0.1:{port}"
        cluster = StartedCluster(address, url, cpus, token, environment, running.pid)
        try:
            _wait_for_a_node(url, token, running)
            yield cluster
        finally:
            for process in cluster.processes():
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def _wait_for_a_node(url: str, token: str, running: subprocess.Popen) -> None:
    """The dashboard answers before there is one."""
    headers = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{url}/nodes?view=summary", headers=headers)
    deadline = time.monotonic() + 120
    while True:
        assert running.poll() is None, "the cluster has ended"
        assert time.monotonic() < deadline
        with suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            if json.load(answer)["data"]["summary"]:
                return
        time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> Path:
    """Twelve good rows."""
    pairs = [("red circle", "blue square"), ("green star", "yellow cross")]
    rows = [
        {
            "id": f"row-{i:02}",
            "prompt": "a {} and a {}".format(*pairs[i % 2]),
            "subjects": [thing.split()[1] for thing in pairs[i % 2]],
            "seed": i,
            "method": "stable-diffusion" if i % 4 == 3 else None,
            "note": {"number": i},
        }
        for i in range(12)
    ]
    path = tmp_path_factory.mktemp("manifest") / "manifest.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="session")
def settings_in(tiny_pipeline_folder, manifest):
    """Settings of a job over `manifest` in shards of three, into a folder, with what a test changes."""
    from aae_batch.sampling.model.loading import default_guidance

    def make(folder: Path, **changes) -> JobSettings:
        values = {
            "manifest": str(manifest),
            "output": str(folder),
            "model": str(tiny_pipeline_folder),
            "guidance": default_guidance(str(tiny_pipeline_folder)),
            "slots": 1,
            "shard_size": 3,
        }
        return JobSettings(**{**values, **changes})

    return make


@pytest.fixture
def settings(settings_in, tmp_path):
    """The same, into a folder of the test's own."""
    return partial(settings_in, tmp_path / "out")


def snapshot(root: str | os.PathLike[str]) -> dict[str, tuple[int, bytes]]:
    """Every file under a root: when it was written, and what it holds."""
    return {
        path.relative_to(root).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(Path(root).rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


TIMES = ("seconds",)


def assert_same_dataset(root: str | Storage, reference_root: str | Storage) -> None:
    """The same rows, the same statistics, the same pictures."""
    one, other = Dataset(root), Dataset(reference_root)
    assert one.metadata().drop(TIMES).equals(other.metadata().drop(TIMES))
    assert one.attention().equals(other.attention())
    names = one.storage.list("images/")
    assert names == other.storage.list("images/")
    assert all(one.storage.read_bytes(n) == other.storage.read_bytes(n) for n in names)


def assert_same_rows(root: str, reference_root: str) -> None:
    """The same rows, statistics and pictures, whatever the layout."""
    one, other = Dataset(root), Dataset(reference_root)
    where = ("file_name", *TIMES)
    assert one.metadata().drop(where).equals(other.metadata().drop(where))
    assert one.attention().equals(other.attention())
    for row, reference in zip(
        one.metadata().to_pylist(), other.metadata().to_pylist(), strict=True
    ):
        assert one.image_bytes(row) == other.image_bytes(reference), row["id"]


def assert_same_but_for_rounding(root: str, reference_root: str) -> None:
    """The same rows, and pictures of which no pixel is off by more than one level."""
    one, other = Dataset(root), Dataset(reference_root)
    rounded = ("sha256", "final_loss", *TIMES)
    rows = one.metadata().drop(rounded)
    assert rows.equals(other.metadata().drop(rounded))
    for row in one.metadata().to_pylist():
        levels = (np.asarray(dataset.image(row), dtype=int) for dataset in (one, other))
        assert np.abs(np.subtract(*levels)).max() <= 1, row["id"]
