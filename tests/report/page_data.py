"""Datasets to make pages of: pairs of methods, with curves and maps, written as a job would."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from aae_batch.dataset import layout
from aae_batch.dataset.image_format import PNG
from aae_batch.dataset.outcome import VERDICTS, Outcome
from aae_batch.dataset.writer import Shard, failed
from aae_batch.errors import GivenUpError
from aae_batch.ladder import STRIDE, Ladder
from aae_batch.manifest.row import Row
from aae_batch.request import AttentionRecord, Result, SubjectAttention
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.store.base import Storage
from tests import small_output

SAMPLING: dict[str, Any] = {"num_inference_steps": 4, "thresholds": {0: 0.1, 2: 0.5}}
GUIDANCE = GuidanceConfig(**SAMPLING)
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
    guidance: GuidanceConfig = GUIDANCE,
    **more: Any,
) -> Storage:
    """Write the dataset of a manifest of `rows`; `drawn` says what becomes of each, and `more` has other
    settings of the job."""
    manifest = root.with_suffix(".jsonl")
    return small_output.write_dataset(
        manifest, rows, root, guidance, drawn, form, shard_size, **more
    )


def drawn(into: Shard, row: Row) -> Outcome:
    """A picture, or why there is none. Guided rows reach the thresholds, plain ones do not."""
    if row.error is not None:
        return failed(row, GUIDANCE)
    image = Image.new("RGB", (SIDE, SIDE), COLOUR)
    result = Result(row.request, image=image, attention=record(row), seconds=2.0)
    return into.write_image(row, result, GUIDANCE)


MOVING = GuidanceConfig(**SAMPLING, attention_maps="every:2")


def moving(into: Shard, row: Row) -> Outcome:
    """A picture whose subjects are on each other's side until the last step."""
    if row.error is not None:
        return failed(row, MOVING)
    seen = record(row)
    scales = np.array([0.1, 0.2, 0.25], np.float32)
    subjects = [
        replace(
            subject,
            map_steps=(0, 2, 3),
            maps=np.concatenate([*[subject.maps[..., ::-1]] * 2, subject.maps]),
            map_scales=scales,
        )
        for subject in seen.subjects
    ]
    image = Image.new("RGB", (SIDE, SIDE), COLOUR)
    attention = replace(seen, subjects=tuple(subjects))
    return into.write_image(row, Result(row.request, image=image, attention=attention), MOVING)


LADDER = ("stable-diffusion", "attend-and-excite:2")
ACCEPTANCE = {
    "accept": "detector.all_bound AND seed < 100",
    "ladder": LADDER,
    "tries": 4,
    "give_up_below": 0.1,
    "keep_rejected": True,
    "model": "shapes",
}
"""Settings of a run that tries rows several times."""

TRIED_ROWS = [
    {"id": "climbs", "prompt": "a cat and a frog", "subjects": ["cat", "frog"], "seed": 4},
    {"id": "never", "prompt": HOSTILE, "subjects": ["cat", "<b>owl"], "seed": 10},
    {"id": "never", "prompt": "the same id", "subjects": ["cat"], "seed": 1},
    {
        "id": "at-once",
        "prompt": "a cat and a frog",
        "subjects": ["cat", "frog"],
        "seed": 4 + STRIDE,
    },
    {"id": "nothing", "prompt": "a cat", "seed": 6},
    {"id": "indices", "prompt": "a cat", "token_indices": [2], "seed": 7},
    {"id": "lost", "prompt": "a frog", "subjects": ["frog"], "seed": 20},
]
SEEN: dict[str, list[tuple[str, list[bool], list[bool | None]]]] = {
    "climbs": [
        ("rejected", [True, False], [None, False]),
        ("rejected", [True, True], [None, False]),
        ("accepted", [True, True], [None, True]),
    ],
    "never": [
        ("given up", [], []),
        ("rejected", [True, False], [None, None]),
        ("failed", [], []),
        ("rejected", [False, False], [None, None]),
    ],
    "at-once": [("accepted", [True, True], [True, True])],
    "nothing": [("unjudged", [], [])],
    "indices": [("accepted", [True], [None])],
    "lost": [("given up", [], [])] * 4,
}
"""What judges say of each try of `TRIED_ROWS`: the verdict, and a detector's `found` and `bound`."""

KEPT = {"climbs": 2, "never": 1, "at-once": 0, "nothing": 0, "indices": 0}
REJECTED = (200, 60, 40)
"""Of the pictures of the tries that were not kept."""


def tried(into: Shard, row: Row) -> Outcome:
    """A row as the tries of `SEEN` leave it."""
    if row.error is not None:
        return failed(row, GUIDANCE)
    ladder = Ladder.of(LADDER, ACCEPTANCE["tries"])
    kept = KEPT.get(row.id)
    tries = [
        _try(ladder.row(row, number), number, number == kept) for number in range(len(SEEN[row.id]))
    ]
    row = ladder.row(row, kept)
    if kept is None:
        error = GivenUpError(row.id, "its noise is <i>hopeless</i>")
        return into.write_image(row, Result(row.request, error=error), GUIDANCE, tries=tries)
    image = Image.new("RGB", (SIDE, SIDE), COLOUR)
    seen = None if row.id == "nothing" else record(row)
    result = Result(row.request, image=image, attention=seen, seconds=2.0)
    return into.write_image(row, result, GUIDANCE, tries=tries)


def _try(row: Row, number: int, kept: bool) -> dict[str, Any]:
    verdict, found, bound = SEEN[row.id][number]
    has_picture = verdict in VERDICTS
    picture = PNG.encode(Image.new("RGB", (300, 150), REJECTED))
    scores = {"detector": {"found": found, "bound": bound}, "clip": {"clip_full": 0.3}}
    return {
        "id": row.id,
        "try": number,
        "method": row.request.method,
        "seed": row.request.seed,
        "verdict": verdict,
        "kept": kept,
        "error": None if has_picture else "its noise is <i>hopeless</i>",
        "value": sum(found) / 2 if has_picture else None,
        "scores": json.dumps(scores) if has_picture else None,
        "guided": 5 * number,
        "denoised": 8,
        "picture": picture if has_picture and not kept else None,
    }


def record(row: Row) -> AttentionRecord:
    """Attention that lies at the left for the first subject and at the right for the second."""
    guided = row.request.method == "attend-and-excite"
    last = 0.8 if guided else 0.3
    subjects = []
    named = row.request.subjects or [
        f"word {n}" for n in range(len(row.request.token_indices or ()))
    ]
    for i, name in enumerate(named):
        where = np.zeros((1, 4, 4), np.uint8)
        where[..., 3 * (i % 2)] = 255
        seen = (3,), where, np.full(1, 0.25, np.float32)
        curve = np.linspace(0.1, last - 0.1 * i, 4, dtype=np.float32)
        subjects.append(SubjectAttention(name, (2 + i,), (name,), *[curve] * 5, *seen))
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
