"""Datasets to make pages of: pairs of methods, with curves and maps, written as a job would."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from aae_batch.dataset import layout
from aae_batch.dataset.image_format import PNG
from aae_batch.dataset.outcome import Outcome
from aae_batch.dataset.writer import Shard, failed
from aae_batch.manifest.row import Row
from aae_batch.request import AttentionRecord, Result, SubjectAttention
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.store.base import Storage
from tests import small_output

GUIDANCE = GuidanceConfig(num_inference_steps=4, thresholds={0: 0.1, 2: 0.5})
METHOD_PAIR = ("attend-and-excite", "stable-diffusion")
SIDE = 24
COLOUR = (40, 90, 200)
"""Of every picture."""

HOSTILE = "a cat</script><script>document.title='owned'</script> & <img src=x onerror=alert(1)> 🐸"
RIGHT_TO_LEFT = "קוף and a cat"

PROMPTS = [
    {"prompt": "a cat and a frog", "subjects": ["cat", "frog"], "set": "animals"},
    {"prompt": "a bear and a red bow", "subjects": ["bear", "red bow"], "set": "animals-objects"},
    {"prompt": HOSTILE, "subjects": ["cat"], "set": "animals"},
    {"prompt": RIGHT_TO_LEFT, "subjects": ["cat"], "set": "animals"},
]
ROWS = [
    {"id": f"{i}-{method}", **prompt, "seed": 7 * i, "method": method}
    for i, prompt in enumerate(PROMPTS)
    for method in METHOD_PAIR
] + [{"id": "bad", "prompt": "a cat", "subjects": ["cat"], "seed": "x", "set": "animals"}]
"""Four pairs and a row that fails."""


def write_dataset(
    root: Path,
    rows: list[dict],
    drawn: Callable[[Shard, Row], Outcome],
    form: str = "files",
    shard_size: int = 4,
) -> Storage:
    """Write the dataset of a manifest of `rows`; `drawn` says what becomes of each."""
    manifest = root.with_suffix(".jsonl")
    return small_output.write_dataset(manifest, rows, root, GUIDANCE, drawn, form, shard_size)


def drawn(into: Shard, row: Row) -> Outcome:
    """A picture, or why there is none. Guided rows reach the thresholds, plain ones do not."""
    if row.error is not None:
        return failed(row, GUIDANCE)
    image = Image.new("RGB", (SIDE, SIDE), COLOUR)
    result = Result(row.request, image=image, attention=record(row), seconds=2.0)
    return into.write_image(row, result, GUIDANCE)


def record(row: Row) -> AttentionRecord:
    """Attention that lies at the left for the first subject and at the right for the second."""
    guided = row.request.method == "attend-and-excite"
    last = 0.8 if guided else 0.3
    subjects = []
    named = row.request.subjects or [
        f"word {n}" for n in range(len(row.request.token_indices or ()))
    ]
    for i, name in enumerate(named):
        where = np.zeros((4, 4), np.uint8)
        where[:, 3 * (i % 2)] = 255
        curve = np.linspace(0.1, last - 0.1 * i, 4, dtype=np.float32)
        subjects.append(SubjectAttention(name, (2 + i,), (name,), *[curve] * 5, where, 0.25))
    worst = min(float(subject.max_attention[-1]) for subject in subjects)
    return AttentionRecord(
        tuple(subjects),
        loss=1 - subjects[-1].max_attention,
        num_refinements=10 + row.index if guided else 0,
        final_loss=1 - worst,
        neglected=worst < 0.5,
    )


def write_scores(storage: Storage, metric: str, shard: int, columns: dict) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    storage.write_bytes(layout.metric_name(metric, shard), buffer.getvalue())


def many_rows(into: Shard, row: Row) -> Outcome:
    """A row that costs no time to make: all show one picture, and the attention of a usual size."""
    steps, side = 50, 16
    rng = np.random.default_rng(row.index)
    name = layout.image_name(0, "picture")
    if row.index == 0:
        image = Image.new("RGB", (SIDE, SIDE), COLOUR)
        into.storage.write_bytes(name, PNG.encode(image))
    attention = [
        {
            "id": row.id,
            "subject": subject,
            "max_attention": rng.random(steps, np.float32),
            "map": rng.integers(0, 256, side * side, np.uint8).tobytes(),
            "map_height": side,
            "map_width": side,
            "map_scale": 0.2,
        }
        for subject in row.request.subjects
    ]
    metadata = {
        "id": row.id,
        "prompt": row.request.prompt,
        "subjects": row.request.subjects,
        "seed": row.request.seed,
        "method": row.request.method,
        "width": SIDE,
        "height": SIDE,
        "status": "ok",
        "file_name": name,
        "sha256": "0" * 64,
        "num_refinements": row.index % 60,
        "final_loss": float(rng.random()),
        "neglected": row.index % 10 == 0,
        "seconds": 1.0,
    }
    return Outcome(row.index, metadata, attention)
