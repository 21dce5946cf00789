"""What the driver costs a shard, with actors that do nothing: `python -m benchmarks.driver --help`.

A thousand simulated actors answer at once, so that nothing is left but the driver's own work: reading
the manifest, handing out shards, keeping the ledger, saying how far it is.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.dataset.reader import Dataset
from aae_batch.generate.driver import GenerateJob
from aae_batch.generate.records import make_plan
from aae_batch.generate.settings import JobSettings
from aae_batch.generate.worker import GenerateTask
from aae_batch.job.cluster import Stop
from aae_batch.job.driver import Driver
from aae_batch.job.pool import Done, Event, Pool, Ready, WorkerHandle
from aae_batch.job.progress import Tally
from aae_batch.job.records import Loaded
from aae_batch.manifest.reader import open_manifest
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.store.lock import Lock
from aae_batch.store.open import open_storage


class SimulatedPool(Pool):
    """Workers that are ready at once and finish a piece whenever they are asked what has happened."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: list[WorkerHandle] = []
        self._ready: list[WorkerHandle] = []
        self._given: list[tuple[WorkerHandle, GenerateTask]] = []

    def places(self) -> int:
        return self.size

    def heed_notices(self) -> None:
        pass

    def hire(self) -> None:
        worker = WorkerHandle(ready=True)
        self.workers.append(worker)
        self._ready.append(worker)

    def give(self, worker: WorkerHandle, task: GenerateTask) -> None:
        worker.calls[task.piece] = task.piece
        self._given.append((worker, task))

    def ask(self, worker: WorkerHandle) -> None:
        worker.tallies = {piece: Tally(done=1) for piece in worker.pieces}

    def dismiss(self, worker: WorkerHandle) -> None:
        self.workers.remove(worker)

    def events(self, seconds: float) -> Iterator[Event]:
        ready, self._ready = self._ready, []
        given, self._given = self._given, []
        for worker in ready:
            yield Ready(worker, Loaded("cpu", "float32"))
        for worker, task in given:
            del worker.calls[task.piece]
            worker.tallies.pop(task.piece, None)
            yield Done(worker, task.piece, Tally(len(task.part)), [])


@contextmanager
def job_of(folder: Path, shards: int, shard_size: int) -> Iterator[GenerateJob]:
    """Open a job that has everything to do, in a folder."""
    path = folder / "manifest.parquet"
    rows = shards * shard_size
    prompts = pa.array([f"a cat and a frog number {i}" for i in range(rows)])
    subjects = pa.array([["cat", "frog"]] * rows)
    table = pa.table({"prompt": prompts, "subjects": subjects})
    pq.write_table(table, path, row_group_size=100_000)
    settings = JobSettings(
        manifest=str(path),
        output=f"{folder}/out",
        guidance=GuidanceConfig(),
        shard_size=shard_size,
    )
    storage = open_storage(settings.output)
    with open_manifest(path) as manifest:
        plan = make_plan(settings, manifest, storage)
        yield GenerateJob(settings, plan, manifest, Dataset(storage))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.driver",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--actors", type=int, default=1000, help="simulated actors")
    parser.add_argument("--shards", type=int, default=8000, help="shards to hand out")
    parser.add_argument("--shard-size", type=int, default=256, help="rows in each")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        job_of(Path(folder), options.shards, options.shard_size) as job,
    ):
        pool = SimulatedPool(options.actors)
        driver = Driver(job, pool, Stop(), Lock(job.storage.root), lambda progress: None)
        start = time.perf_counter()
        driver.run()
        seconds = time.perf_counter() - start
    print(
        f"{options.shards} shards of {options.shard_size} rows, {options.actors} actors: "
        f"{seconds:.1f} s, {1000 * seconds / options.shards:.2f} ms a shard"
    )


if __name__ == "__main__":
    main()
