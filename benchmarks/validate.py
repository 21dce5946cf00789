"""How fast `aae-batch manifest validate` judges rows: rows a second, of three manifests.

Prompts that are all different are the worst case: each is tokenized. In a benchmark's manifest a
prompt occurs for many seeds. In the third every other row is wrong.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.manifest.judge import Judge
from aae_batch.manifest.reader import open_manifest
from aae_batch.manifest.validate import validate
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.model.loading import load_streams
from training import networks

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle", "star", "cross")
SEEDS = 64


def all_different(start: int, rows: int) -> pa.Table:
    """Eight words each, two of them subjects, and an id."""
    random = np.random.default_rng(start)
    colours = random.integers(len(COLOURS), size=(rows, 2))
    shapes = random.integers(len(SHAPES), size=(rows, 2))
    shapes[:, 1] = (shapes[:, 0] + 1 + random.integers(len(SHAPES) - 1, size=rows)) % len(SHAPES)
    prompts, subjects = [], []
    for i, ((c, d), (s, t)) in enumerate(zip(colours.tolist(), shapes.tolist(), strict=True)):
        prompts.append(f"a {COLOURS[c]} {SHAPES[s]} and a {COLOURS[d]} {SHAPES[t]} {start + i}")
        subjects.append([SHAPES[s], SHAPES[t]])
    ids = [f"{start + i:09d}" for i in range(rows)]
    return pa.table({"id": ids, "prompt": prompts, "subjects": subjects})


def many_seeds(start: int, rows: int) -> pa.Table:
    places = pa.array([i // SEEDS for i in range(rows)])
    table = all_different(start, rows // SEEDS + 1).take(places).drop_columns("id")
    return table.append_column("seed", pa.array([i % SEEDS for i in range(rows)]))


def half_wrong(start: int, rows: int) -> pa.Table:
    table = all_different(start, rows)
    subjects = table["subjects"].to_pylist()
    subjects[::2] = [["elephant"]] * len(subjects[::2])
    return table.set_column(2, "subjects", pa.array(subjects))


MANIFESTS: dict[str, Callable[[int, int], pa.Table]] = {
    "all prompts different": all_different,
    f"{SEEDS} seeds of each prompt": many_seeds,
    "every other row wrong": half_wrong,
}


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def measured(path: Path, tokenizer: Any, processes: int) -> tuple[float, float, int]:
    """Rows a second, microseconds of CPU time a row, and how many rows would fail: of reading and
    judging, with the processes' start; the tokenizer is loaded before."""
    judge = Judge(tokenizer, GuidanceConfig())
    start, cpu = time.perf_counter(), cpu_seconds()
    with open_manifest(path) as manifest:
        summary = validate(manifest, judge, lambda problem: None, processes=processes)
    speed = summary.rows / (time.perf_counter() - start)
    return speed, 1e6 * (cpu_seconds() - cpu) / summary.rows, summary.failing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument(
        "--model", help="whose tokenizer; default: the embedded model's, as if it knew all words"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    tokenizer = load_streams(given.model) if given.model else networks.tokenizer()
    with tempfile.TemporaryDirectory(prefix="aae-batch-") as folder:
        path = Path(folder) / "manifest.parquet"
        for name, make in MANIFESTS.items():
            pq.write_table(make(0, given.rows), path, row_group_size=100_000)
            speed, cpu, failing = measured(path, tokenizer, given.processes)
            print(
                f"{name}: {speed:,.0f} rows/s, {cpu:.0f} us of CPU time a row, "
                f"{failing} of {given.rows} would fail",
                flush=True,
            )


if __name__ == "__main__":
    main()
