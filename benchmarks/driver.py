"""What the driver costs a shard, with actors that do nothing: `python -m benchmarks.driver --help`.

A thousand simulated actors answer at once, so that nothing is left but the driver's own work: reading
the manifest, handing out shards, keeping the ledger, saying how far it is.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.generate.driver import Foreman
from aae_batch.generate.records import Loaded, make_plan
from aae_batch.generate.settings import JobSettings
from aae_batch.generate.worker import Report, Task
from aae_batch.job.cluster import ActorPlan, Stop
from aae_batch.job.crew import Done, Event, Member, Ready, Told
from aae_batch.job.progress import Tally
from aae_batch.manifest.reader import open_manifest
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.store.lock import Lock
from aae_batch.store.open import open_storage


class SimulatedCrew:
    """Actors that are ready at once and finish a piece whenever they are asked what has happened."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.members: list[Member] = []
        self._events: list[Event] = []
        self._given: list[tuple[Member, Task]] = []

    def room(self) -> int:
        return self.size

    def heed_notices(self) -> None:
        pass

    def hire(self) -> None:
        member = Member(ready=True, moved=time.monotonic())
        self.members.append(member)
        self._events.append(Ready(member, Loaded("cpu", "float32")))

    def give(self, member: Member, task: Task) -> None:
        member.pieces.append(task.piece)
        self._given.append((member, task))

    def ask(self, member: Member) -> None:
        self._events.append(Told(member, {piece: Tally(done=1) for piece in member.pieces}))

    def dismiss(self, member: Member) -> None:
        self.members.remove(member)

    def events(self, seconds: float) -> list[Event]:
        for member, task in self._given:
            member.pieces.remove(task.piece)
            member.tallies.pop(task.piece, None)
            self._events.append(Done(member, task.piece, Report(Tally(len(task.part)), [])))
        self._given.clear()
        events, self._events = self._events, []
        return events


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
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.parquet"
        rows = options.shards * options.shard_size
        prompts = pa.array([f"a cat and a frog number {i}" for i in range(rows)])
        subjects = pa.array([["cat", "frog"]] * rows)
        table = pa.table({"prompt": prompts, "subjects": subjects})
        pq.write_table(table, path, row_group_size=100_000)
        settings = JobSettings(
            manifest=str(path),
            output=f"{folder}/out",
            guidance=GuidanceConfig(),
            shard_size=options.shard_size,
        )
        storage = open_storage(settings.output)
        with open_manifest(path) as manifest:
            plan = make_plan(settings, manifest, storage)
            foreman = Foreman(
                settings,
                plan,
                manifest,
                storage,
                plan.ledger(),
                SimulatedCrew(options.actors),
                ActorPlan(options.actors, options.actors, cpus=1, gpus=0, threads=None),
                lambda progress: None,
                Stop(),
                Lock(storage.root),
            )
            start = time.perf_counter()
            foreman.run()
            seconds = time.perf_counter() - start
    print(
        f"{options.shards} shards of {options.shard_size} rows, {options.actors} actors: "
        f"{seconds:.1f} s, {1000 * seconds / options.shards:.2f} ms a shard"
    )


if __name__ == "__main__":
    main()
