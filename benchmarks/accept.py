"""Rows that are tried until the detector accepts a picture, through the real job on the embedded model.

The same rows four ways: nursing every row; plain sampling first and nursing what it missed; the same with early verdicts;
and one picture a row. Prints what each accepted and what it cost, and how well attention after the guided steps foretells
the detector. Run it again to go on after a stop.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aae_batch.dataset.reader import Dataset
from aae_batch.evaluate.driver import score
from aae_batch.evaluate.settings import ScoreSettings
from aae_batch.generate.driver import run_job
from aae_batch.generate.settings import JobSettings
from aae_batch.methods import BASELINE, DEFAULT
from aae_batch.sampling.model.loading import default_guidance
from aae_batch.shapes.splits import SPLITS
from aae_batch.shapes.world import caption

ACCEPT = "detector.all_bound"
GIVE_UP_BELOW = 0.4
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
WAYS: dict[str, dict[str, Any]] = {
    "nursing every row": {"ladder": (DEFAULT,)},
    "plain, then nursing": {"ladder": (BASELINE, DEFAULT)},
    "the same, with early verdicts": {
        "ladder": (BASELINE, DEFAULT),
        "give_up_below": GIVE_UP_BELOW,
    },
    "plain, nursing, self-cross": {"ladder": (BASELINE, f"{DEFAULT}:2", "self-cross")},
}


def manifest_of(folder: Path, rows: int, methods: tuple[str | None, ...]) -> str:
    """Write `rows` rows of the report split for each method, each with its own noise."""
    pairs = SPLITS["report"].pairs
    found = [
        {
            "id": f"{i:05}-{method or 'any'}",
            "prompt": caption(pairs[i % len(pairs)]),
            "subjects": [str(thing) for thing in pairs[i % len(pairs)]],
            "seed": 1_000_000 + 1000 * i,
            **({} if method is None else {"method": method}),
        }
        for method in methods
        for i in range(rows)
    ]
    path = folder / f"{rows}-{'-'.join(str(method) for method in methods)}.parquet"
    pq.write_table(pa.Table.from_pylist(found), path)
    return str(path)


def generated(folder: Path, name: str, manifest: str, **changes: Any) -> dict[str, Any]:
    """Return the summary of a job."""
    output = folder / name.replace(" ", "-").replace(",", "")
    settings = JobSettings(
        manifest=manifest,
        output=str(output),
        guidance=default_guidance("shapes"),
        shard_size=16,
        **changes,
    )
    return run_job(settings, lambda progress: print(f"\r{name}: {progress}", end="", flush=True))


def early_verdicts(folder: Path, manifest: str) -> None:
    """Print precision and recall of giving a picture up, by the worst subject's attention in the first step
    after the guided ones."""
    generated(folder, "once", manifest)
    output = str(folder / "once")
    score(ScoreSettings(output=output, metric="detector", detector="shapes"))
    dataset = Dataset(output)
    first = default_guidance("shapes").steering(DEFAULT).max_iter_to_alter
    worst: dict[str, float] = {}
    for row in dataset.attention().select(["id", "max_attention"]).to_pylist():
        worst[row["id"]] = min(worst.get(row["id"], 1.0), row["max_attention"][first])
    bound = {
        row["id"]: row["all_bound"]
        for shard in dataset.scored_shards("detector")
        for row in dataset.scores_of("detector", shard).to_pylist()
    }
    print(
        "\n| given up below | "
        + " | ".join(f"{m}: precision, recall" for m in (BASELINE, DEFAULT))
        + " |"
    )
    print("|---|---|---|")
    for share in SHARES:
        cells = []
        for method in (BASELINE, DEFAULT):
            ids = [row_id for row_id in bound if row_id.endswith(f"-{method}")]
            missed = np.array([not bound[row_id] for row_id in ids])
            given_up = np.array([worst[row_id] < share for row_id in ids])
            right = int((missed & given_up).sum())
            precision = f"{right / given_up.sum():.3f}" if given_up.any() else "-"
            cells.append(
                f"{precision} of {given_up.sum()}, {right / max(1, missed.sum()):.3f} of {missed.sum()}"
            )
        print(f"| {share} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accept", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=240)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    early_verdicts(options.folder, manifest_of(options.folder, options.rows, (BASELINE, DEFAULT)))
    manifest = manifest_of(options.folder, options.rows, (None,))
    print(
        f"\n| {options.rows} rows | accepted | tries a row | forwards an accepted picture | by rung: tries, settled |"
    )
    print("|---|---|---|---|---|")
    for way, changes in WAYS.items():
        tried = generated(options.folder, way, manifest, accept=ACCEPT, **changes)["acceptance"]
        rungs = "; ".join(f"{m} {r['tries']}, {r['settled']}" for m, r in tried["rungs"].items())
        forwards = sum(rung["forwards"] for rung in tried["rungs"].values())
        print(
            f"\r| {way} | {tried['accepted'] / options.rows:.1%} | {tried['tries'] / options.rows:.2f} | "
            f"{forwards / max(1, tried['accepted']):.1f} | {rungs} |"
        )


if __name__ == "__main__":
    main()
