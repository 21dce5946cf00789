"""Planning at scale: what the driver's machine needs for a manifest of ten million rows.

Each figure is taken in a process of its own: wall clock, CPU time, and the peak of its resident
memory. No model is loaded and Ray is not started.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.dataset import layout
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.status import status
from aae_batch.generate.records import make_plan
from aae_batch.generate.settings import JobSettings
from aae_batch.job.plan import Ledger
from aae_batch.job.records import as_json
from aae_batch.manifest.reader import open_manifest
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.store.open import open_storage

ROW_GROUP = 100_000
SHARDS_READ = 200
SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "so", "tu")
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "prompt": pa.string(),
        "subjects": pa.list_(pa.string()),
        "source": pa.string(),
    }
)
WORDS = ["".join(parts) for parts in product(SYLLABLES, repeat=3)]


def write_manifest(path: Path, rows: int, row_group: int) -> None:
    """Ids as hashes are, prompts of random words, subjects, and a column to carry; zstd."""
    parts: list[pa.Table] = []
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for start in range(0, rows, ROW_GROUP):
            stop = min(start + ROW_GROUP, rows)
            parts.append(some_rows(start, stop))
            if sum(map(len, parts)) >= row_group or stop == rows:
                writer.write_table(pa.concat_tables(parts), row_group_size=row_group)
                parts.clear()


def some_rows(start: int, stop: int) -> pa.Table:
    words = np.random.default_rng(start).integers(len(WORDS), size=(stop - start, 8)).tolist()
    prompts = [[WORDS[i] for i in row] for row in words]
    numbers = range(start, stop)
    columns = [
        [f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}" for n in numbers],
        [f"a photo of {' '.join(prompt)}" for prompt in prompts],
        [prompt[:2] for prompt in prompts],
        [f"page {n // 7}" for n in numbers],
    ]
    return pa.table(columns, schema=SCHEMA)


def settings(folder: Path) -> JobSettings:
    return JobSettings(
        manifest=folder / "manifest.parquet", output=str(folder / "out"), guidance=GuidanceConfig()
    )


def commit_half(folder: Path) -> None:
    """Leave the output as a job does that was stopped half way: every other shard has its table."""
    job = settings(folder)
    storage = open_storage(job.output)
    with open_manifest(job.manifest) as manifest:
        plan = make_plan(job, manifest, storage)
    storage.write_bytes(layout.RUN, as_json(plan.run))
    (folder / "out" / layout.METADATA).mkdir(parents=True)
    for piece in list(plan.ledger().todo)[::2]:
        (folder / "out" / layout.metadata_name(piece.shard)).write_bytes(b"PAR1")


# --- what is measured ----------------------------------------------------------------------------


class Clock:
    """Wall clock and CPU time since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def seconds(self, name: str, parts: int = 1) -> dict[str, float]:
        return {
            f"seconds {name}": (time.perf_counter() - self.wall) / parts,
            f"CPU seconds {name}": (time.process_time() - self.cpu) / parts,
        }


def measure_plan(folder: Path) -> dict[str, Any]:
    """From opening the manifest to the list of shards to do."""
    job = settings(folder)
    clock = Clock()
    with open_manifest(job.manifest) as manifest:
        opened = clock.seconds("to open")
        ledger = make_plan(job, manifest, open_storage(job.output)).ledger()
        return opened | clock.seconds("in all") | {"shards to do": len(ledger.todo)}


def measure_read(folder: Path) -> dict[str, Any]:
    """The rows of shards spread over the file, from the first to the last: the driver's cost of one
    that is far from the one before; and those of neighbours."""
    job = settings(folder)
    with open_manifest(job.manifest) as manifest:
        size = 256
        shards = -(-len(manifest) // size)
        spread = range(0, shards, max(1, shards // SHARDS_READ))
        figures = {}
        for name, chosen in (("far", spread), ("next", range(min(SHARDS_READ, shards)))):
            clock = Clock()
            for shard in chosen:
                manifest.read(shard * size, min((shard + 1) * size, len(manifest)))
            figures |= clock.seconds(f"a shard, {name}", len(chosen))
        return figures


def measure_status(folder: Path) -> dict[str, Any]:
    """What `aae-batch status` does."""
    clock = Clock()
    dataset = Dataset(settings(folder).output)
    run = dataset.run
    assert run is not None
    said = status(run, dataset.shards(), dataset.progress, dataset.summary, time.time())
    return clock.seconds("in all") | {"shards done": said.shards_done}


def measure_ledger(folder: Path) -> dict[str, Any]:
    """Every shard taken and committed, as the driver's loop does it."""
    rows = pq.ParquetFile(folder / "manifest.parquet").metadata.num_rows
    ledger: Ledger[None] = Ledger.of(rows, 256, frozenset())
    count, clock = len(ledger.todo), Clock()
    while not ledger.finished:
        piece = ledger.take(busy=True)
        assert piece is not None
        ledger.committed(piece)
    return clock.seconds("a shard", count)


MEASURES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "plan": measure_plan,
    "resume": measure_plan,
    "status": measure_status,
    "read": measure_read,
    "ledger": measure_ledger,
}


def in_a_process(step: str, folder: Path, *options: str) -> bytes:
    command = [sys.executable, "-m", "benchmarks.plan", "--measure", step, "--folder", str(folder)]
    return subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--row-group", type=int, default=ROW_GROUP, help="rows per row group")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument(
        "--measure", choices=["manifest", "half", *MEASURES], help="one step, in this process"
    )
    given = parser.parse_args()
    if given.measure == "manifest":  # apart, since a process begins with its parent's peak memory
        write_manifest(given.folder / "manifest.parquet", given.rows, given.row_group)
        return
    if given.measure == "half":
        commit_half(given.folder)
        return
    if given.measure:
        figures = MEASURES[given.measure](given.folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on Linux
        print(json.dumps(figures | {"peak MB": peak * 1024 / 1e6}))
        return
    with tempfile.TemporaryDirectory(prefix="aae-batch-", dir=given.folder) as name:
        folder = Path(name)
        in_a_process("manifest", folder, f"--rows={given.rows}", f"--row-group={given.row_group}")
        size = (folder / "manifest.parquet").stat().st_size / 1e6
        print(f"{given.rows} rows, {size:.0f} MB", flush=True)
        for measure in MEASURES:
            if measure == "resume":
                in_a_process("half", folder)
            figures = json.loads(in_a_process(measure, folder))
            words = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
            print(f"{measure:7} {words}", flush=True)


if __name__ == "__main__":
    main()
