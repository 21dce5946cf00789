"""A small dataset of every layout, written as a job would."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aae_batch.dataset.layout import SUMMARY
from aae_batch.dataset.layouts import shard_of
from aae_batch.dataset.outcome import Outcome
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.run_record import names_of_its_manifest
from aae_batch.dataset.writer import Shard, failed
from aae_batch.generate.records import Plan, begin, make_plan, summarize
from aae_batch.generate.settings import JobSettings
from aae_batch.job.records import Loaded, as_json, resolved
from aae_batch.manifest.reader import open_manifest
from aae_batch.manifest.row import Row
from aae_batch.request import AttentionRecord, Result, SubjectAttention
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.store.base import Storage
from aae_batch.store.open import open_storage

STEPS = 3

ROWS = [
    {"id": "a", "prompt": "a cat and a dog", "subjects": ["cat", "dog"]},
    {"id": "b", "prompt": "a cat", "token_indices": [[1, 2]]},
    {"id": "c", "prompt": "a cat", "subjects": ["cat"]},
    {"id": "bad", "prompt": "a cat", "seed": "x"},
    {"id": "d.1", "prompt": "a cat", "method": "stable-diffusion"},
]
"""In shards of two: a and b, c and bad, d.1."""


@dataclass(frozen=True)
class Output:
    storage: Storage
    manifest: Path


@pytest.fixture
def make_output(tmp_path) -> Callable[..., Output]:
    """Write a whole dataset in some layout, by default of `ROWS` and into a folder.

    `losses` has the final losses, by id, of rows whose loss is not to be 0.5. The records of an `earlier`
    version lack what it did not know. `guiding` has other settings of the guidance.
    """

    def make(
        layout: str = "files",
        root: str | Path = tmp_path / "out",
        *,
        rows: Sequence[Mapping[str, Any]] = ROWS,
        losses: Mapping[str, float] | None = None,
        earlier: bool = False,
        **guiding: Any,
    ) -> Output:
        manifest = tmp_path / "manifest.jsonl"
        guidance = GuidanceConfig(num_inference_steps=STEPS, **guiding)

        def drawn(into: Shard, row: Row) -> Outcome:
            return outcome(into, row, (losses or {}).get(row.id, 0.5), guidance)

        storage = write_dataset(manifest, rows, root, guidance, drawn, layout, earlier=earlier)
        storage.write_bytes(SUMMARY, as_json(summarize(Dataset(storage), None)))
        return Output(storage, manifest)

    return make


def write_dataset(
    manifest: Path,
    rows: Sequence[Mapping[str, Any]],
    root: str | Path,
    guidance: GuidanceConfig,
    drawn: Callable[[Shard, Row], Outcome],
    layout: str = "files",
    shard_size: int = 2,
    earlier: bool = False,
    **more: Any,
) -> Storage:
    """Write a manifest and the dataset of it, as a job would; `drawn` says what becomes of each row, and
    `more` has other settings of the job. The records of an `earlier` version lack what it did not know."""
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    storage = open_storage(root)
    settings = JobSettings(
        manifest=manifest,
        output=storage.root,
        guidance=guidance,
        layout=layout,
        shard_size=shard_size,
        **more,
    )
    may_have = names_of_its_manifest({} if earlier else None)
    with open_manifest(manifest, may_have=may_have) as opened:
        plan = make_plan(settings, opened, storage)
        if earlier:
            del plan.run["counts_forwards"], plan.run["manifest_rules"]
        run = begun(storage, plan)
        for piece in list(plan.ledger().todo):
            read, extras = opened.read(piece.start, piece.stop)
            into = shard_of(run, storage, piece.shard)
            into.commit([drawn(into, row) for row in read], extras)
    return storage


def edit_table(storage: Storage, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change a table of an output."""
    sink = pa.BufferOutputStream()
    pq.write_table(change(pq.read_table(pa.BufferReader(storage.read_bytes(name)))), sink)
    storage.write_bytes(name, sink.getvalue().to_pybytes())


def begun(storage: Storage, plan: Plan) -> dict[str, Any]:
    """A run's record, written as if an actor had loaded the model."""
    run = resolved(plan.run, Loaded("cpu", "float32"))
    begin(storage, run)
    return run


def outcome(into: Shard, row, final_loss, guidance) -> Outcome:
    if row.error is not None:
        return failed(row, guidance)
    request = row.request
    image = Image.new("RGB", (16, 8), (40 * row.index, 0, 0))
    named = [(name, (i,)) for i, name in enumerate(request.subjects or (), 1)]
    named += [("a cat", indices) for indices in request.token_indices or ()]
    seen = AttentionRecord(
        subjects=tuple(_seen(*subject, guidance.map_steps(STEPS)) for subject in named),
        loss=np.zeros(STEPS, np.float32),
        num_refinements=row.index,
        final_loss=final_loss,
    )
    result = Result(request, image=image, attention=seen, seconds=1.0, guided=2, denoised=6)
    return into.write_image(row, result, guidance)


def _seen(name, indices, steps) -> SubjectAttention:
    per_step = [np.zeros(STEPS, np.float32)] * 5
    maps = np.stack([np.full((4, 2), 50 * (1 + step), np.uint8) for step in steps])
    return SubjectAttention(
        *(name, indices, ("token",) * len(indices), *per_step),
        *(steps, maps, np.array([0.51 * (1 + step) for step in steps], np.float32)),
    )
