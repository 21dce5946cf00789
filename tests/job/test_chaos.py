"""Random SIGKILLs, of actors and of the driver, until the dataset is complete; again and again.

`make chaos` does it for hours if it is told to: see docs/reliability.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from aae_batch.cli.common import STOPPED
from aae_batch.dataset.storage import open_storage
from aae_batch.dataset.verify import verify
from aae_batch.manifest import open_manifest
from tests.job.conftest import assert_same_dataset

ROWS = 24
PATIENCE = 900
"""Seconds that one run of the command may take, kills and all."""


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chaos") / "manifest.parquet"
    rows = [
        {"id": f"r{i:02}", "prompt": "a red circle and a blue square", "subjects": ["circle"]}
        for i in range(ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def standing():
    """A Ray that outlives the drivers. Yields its address, and the process that its actors are of."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    raylet = cluster.head_node.all_processes["raylet"][0].process
    yield cluster.address, psutil.Process(raylet.pid)
    cluster.shutdown()


@pytest.fixture
def command(many_rows, tiny_pipeline_folder, standing):
    def make(output: Path, *more: str) -> list[str]:
        return [
            *(sys.executable, "-m", "aae_batch.cli", "generate", str(many_rows), str(output)),
            *("--model", str(tiny_pipeline_folder), "--slots", "1", "--shard-size", "4"),
            *("--actors", "2", "--ray-address", standing[0], *more),
        ]

    return make


def run(command: list[str]) -> int:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode


def kill_while_it_runs(
    command: list[str], raylet, random: Random, kills: Counter, most: int
) -> int:
    """Run `command`, and kill its actors, or now and then itself. Returns its exit code."""
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + PATIENCE
    while driver.poll() is None:
        assert time.monotonic() < deadline
        try:
            driver.wait(random.uniform(0.5, 6.0))
        except subprocess.TimeoutExpired:
            if kills.total() >= most:
                continue
            actors = [process for process in raylet.children() if "ray::Worker" in name(process)]
            if random.random() < 0.15:
                driver.kill()
                kills["driver"] += 1
            elif actors:
                os.kill(random.choice(actors).pid, signal.SIGKILL)
                kills["actor"] += 1
    said, _ = driver.communicate()
    assert driver.returncode in (0, 1, STOPPED, -signal.SIGKILL), said
    if driver.returncode == STOPPED:  # what it says when actors die while they load, time and again
        assert "Run the same command again to go on" in said
    return driver.returncode


def name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def chaos(command, manifest: Path, raylet, folder: Path, seed: int, most: int) -> dict:
    """Make datasets under fire until so many kills are done; each must come out as the undisturbed one."""
    random, kills = Random(seed), Counter()
    expected = folder / "undisturbed"
    assert run(command(expected)) == 0
    rounds = given_up = 0
    while kills.total() < most:
        output = folder / f"round-{rounds}"
        code = STOPPED
        while code in (STOPPED, -signal.SIGKILL):
            code = kill_while_it_runs(command(output), raylet, random, kills, most)
        if code == 1:  # a row that was hit twice while it was alone has been given up
            given_up += 1
            assert run(command(output, "--retry-failed")) == 0
        with open_manifest(manifest) as opened:
            found = verify(open_storage(output), opened)
        assert found.proved, [str(problem) for problem in found.problems]
        assert_same_dataset(str(output), str(expected))
        rounds += 1
    return {**kills, "datasets": rounds, "datasets with rows given up": given_up}


def test_whatever_is_killed_the_dataset_is_complete_and_the_same(
    command, many_rows, standing, tmp_path
):
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)
    chaos(command, many_rows, standing[1], tmp_path, seed, most=4)


@pytest.mark.chaos
def test_chaos_for_long(command, many_rows, standing, tmp_path, capsys):
    most = int(os.environ.get("AAE_BATCH_KILLS", "200"))
    seed = int(os.environ.get("AAE_BATCH_SEED", int.from_bytes(os.urandom(4), "big")))
    start = time.monotonic()
    kills = chaos(command, many_rows, standing[1], tmp_path, seed, most)
    with capsys.disabled():
        print(f"\nseed {seed}: {kills} in {(time.monotonic() - start) / 60:.0f} min")
