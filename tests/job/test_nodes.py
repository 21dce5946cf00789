"""Several nodes on one machine: they come, they go, and the dataset is the same."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from aae_batch.dataset.reader import Dataset
from aae_batch.generate.driver import run_job
from aae_batch.generate.worker import GenerateWorker
from aae_batch.job.pool import Pool
from tests.small_job import assert_same_dataset

RAY = (sys.executable, "-m", "ray.scripts.scripts")
GPU_NODE = {"num_cpus": 2, "num_gpus": 1}


@pytest.fixture(scope="module")
def undisturbed(settings_in, tmp_path_factory) -> str:
    """The dataset that nothing went wrong with."""
    settings = settings_in(tmp_path_factory.mktemp("undisturbed"), device="cpu", shard_size=1)
    run_job(settings)
    return settings.output


@pytest.fixture(scope="module")
def head(undisturbed):
    """A head without work. `undisturbed` comes first, since it is made by a Ray of its own."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def nodes(head):
    """The head, to which tests add nodes with a GPU that Ray believes in."""
    yield head
    for node in list(head.worker_nodes):
        head.remove_node(node)
    while ray.cluster_resources().get("GPU", 0):
        time.sleep(0.1)


@pytest.fixture
def settings_on_gpus(settings):
    def make(**changes):
        return settings(**{"gpus_per_actor": 1, "device": "cpu", "shard_size": 1} | changes)

    return make


class Noting(GenerateWorker):
    """Leaves a file for each piece and node, in the folder that the root's name gives."""

    def work(self, task):
        outcomes = super().work(task)
        folder = Path(f"{self.context.root}-nodes") / self.node()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(task.piece.start)).touch()
        return outcomes


class Patient(Noting):
    """Begins its last rows only when there is another actor to share them with."""

    def load(self):
        said = super().load()
        ready = Path(f"{self.context.root}-ready")
        ready.mkdir(exist_ok=True)
        (ready / self.node()).touch()
        return said

    def admit(self, batch, request) -> None:
        ready = Path(f"{self.context.root}-ready")
        while request.id > "row-05" and len(list(ready.iterdir())) < 2:
            time.sleep(0.1)
        super().admit(batch, request)


class Holding(Noting):
    """Begins its last rows, and goes on with them when a node is lost, on that node never, or told to end.

    A lost node's processes may outlive it for a second, in which a small job is done.
    """

    def admit(self, batch, request) -> None:
        if request.id > "row-05":
            begun, lost = (Path(f"{self.context.root}-{name}") for name in ("begun", "lost"))
            begun.mkdir(exist_ok=True)
            (begun / self.node()).touch()
            while not lost.exists() or lost.read_text() in ("", self.node()):
                time.sleep(0.1)
        super().admit(batch, request)


class Unborn(Noting):
    """On a node that is to be lost, its construction never ends, so that it cannot say where it is."""

    def __init__(self, *given) -> None:
        super().__init__(*given)
        root = self.context.root
        begun, lost, doomed = (Path(f"{root}-{name}") for name in ("begun", "lost", "doomed"))
        begun.mkdir(exist_ok=True)
        (begun / self.node()).touch()
        while not lost.exists() or self.node() == doomed.read_text():
            time.sleep(0.1)


def pieces_by_node(root: str) -> dict[str, int]:
    folder = Path(f"{root}-nodes")
    return {node.name: len(list(node.iterdir())) for node in folder.glob("*")}


@pytest.mark.parametrize(
    "worker_class",
    [
        pytest.param(Holding, id="of an actor at work"),
        pytest.param(Unborn, id="of an actor that never said where it was"),
    ],
)
def test_a_lost_node_costs_its_pieces_and_is_held_against_none(
    nodes, settings_on_gpus, undisturbed, caplog, worker_class
):
    nodes.add_node(**GPU_NODE)
    doomed = nodes.add_node(**GPU_NODE)
    job = settings_on_gpus(actors=2)
    begun, lost = Path(f"{job.output}-begun"), Path(f"{job.output}-lost")
    Path(f"{job.output}-doomed").write_text(doomed.node_id)

    def lose_a_node(progress) -> None:
        if not lost.exists() and len(list(begun.glob("*"))) == 2:
            nodes.remove_node(doomed, allow_graceful=False)
            lost.write_text(doomed.node_id)

    with caplog.at_level(logging.WARNING, "aae_batch.job"):
        run_job(job, lose_a_node, worker_class=worker_class)
    assert lost.exists()
    assert "a node was lost" in caplog.text
    assert "an actor died" not in caplog.text
    assert_same_dataset(job.output, undisturbed)


def test_a_node_that_is_about_to_end_finishes_what_it_has_and_is_given_nothing(
    nodes, settings_on_gpus, undisturbed, monkeypatch, caplog
):
    nodes.add_node(**GPU_NODE)
    leaving = nodes.add_node(**GPU_NODE)
    job = settings_on_gpus(actors="1:2")
    begun, lost = Path(f"{job.output}-begun"), Path(f"{job.output}-lost")
    told, had, given = [], [], []
    heed, give = Pool.heed_notices, Pool.give

    def tell_a_node(progress) -> None:
        if not told and len(list(begun.glob("*"))) == 2:
            told.append(leaving.node_id)
            why = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a notice")
            where = ("--address", nodes.address, "--node-id", leaving.node_id)
            subprocess.run([*RAY, "drain-node", *where, *why], check=True)

    def heed_and_go_on(pool) -> None:
        heed(pool)
        if not had and any(worker.leaving for worker in pool.workers):
            had.extend(p for w in pool.workers if w.node == leaving.node_id for p in w.pieces)
            lost.write_text("none, but one was told")

    def note(pool, worker, task) -> None:
        if had:
            given.append(worker.node)
        give(pool, worker, task)

    monkeypatch.setattr(Pool, "heed_notices", heed_and_go_on)
    monkeypatch.setattr(Pool, "give", note)
    with caplog.at_level(logging.WARNING, "aae_batch.job"):
        run_job(job, tell_a_node, worker_class=Holding)
    assert had, "it was at work"
    assert given, "something was left to do"
    assert leaving.node_id not in given
    made = {path.name for path in Path(f"{job.output}-nodes", leaving.node_id).iterdir()}
    assert {str(piece.start) for piece in had} <= made
    assert caplog.text == ""
    assert_same_dataset(job.output, undisturbed)
    # With its last actor it ends by itself, which is how a machine knows that it need not wait.
    while any(node["Alive"] and node["NodeID"] == leaving.node_id for node in ray.nodes()):
        time.sleep(0.1)


@pytest.mark.slow
def test_a_driver_whose_own_node_is_lost_ends(settings, tmp_path):
    """It must not wait for actors that nobody will ever start."""
    manifest = tmp_path / "many.jsonl"  # more than it can do before Ray knows
    manifest.write_text('{"prompt": "a red circle", "subjects": ["circle"]}\n' * 500)
    job = settings(manifest=manifest)
    command = [
        *(sys.executable, "-m", "aae_batch.cli", "generate", job.manifest, job.output),
        *("--model", job.model, "--slots", "1", "--shard-size", "1"),
        *("--device", "cpu", "--gpus-per-actor", "0", "--ray-address"),
    ]
    cluster, said = Cluster(initialize_head=True, head_node_args={"num_cpus": 2}), tmp_path / "said"
    try:
        driver = subprocess.Popen([*command, cluster.address], stderr=said.open("w"))
        while driver.poll() is None and not Dataset(job.output).shards():
            time.sleep(0.05)
        cluster.head_node.all_processes["raylet"][0].process.kill()
        code = driver.wait(240)
    finally:
        cluster.shutdown()
    # Ray may end the process of such a driver before we do.
    assert code not in (0, 1, 2), said.read_text()
    assert code != 3 or "same command again" in said.read_text()


@pytest.mark.slow
def test_work_spreads_to_a_node_that_comes_later(nodes, settings_on_gpus, undisturbed):
    nodes.add_node(**GPU_NODE)
    job = settings_on_gpus()
    added = []

    def add_a_node(progress) -> None:
        if not added and Dataset(job.output).shards():
            added.append(nodes.add_node(**GPU_NODE))

    run_job(job, add_a_node, worker_class=Patient)
    assert added
    assert len(pieces_by_node(job.output)) == 2
    assert_same_dataset(job.output, undisturbed)


@pytest.mark.slow
def test_a_job_waits_for_the_node_that_it_asks_for(nodes, settings_on_gpus, undisturbed):
    job = settings_on_gpus(actors="1:4")
    told = []

    def add_the_node(progress) -> None:
        told.append(progress.started)
        if len(told) == 2:
            nodes.add_node(**GPU_NODE)

    run_job(job, add_the_node, worker_class=Noting)
    assert told[:2] == [False, False]
    assert len(pieces_by_node(job.output)) == 1
    assert_same_dataset(job.output, undisturbed)
