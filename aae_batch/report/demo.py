"""A small dataset with the embedded model, both methods from the same noise, and a page to look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from aae_batch.cli.terminal import progress_reporter
from aae_batch.dataset.image_format import PNG
from aae_batch.dataset.reader import Dataset
from aae_batch.evaluate.detector import SHAPES
from aae_batch.evaluate.driver import score
from aae_batch.evaluate.settings import ScoreSettings
from aae_batch.generate.driver import run_job
from aae_batch.generate.settings import JobSettings
from aae_batch.report.contact_sheet import Finding, Group, Picture, contact_sheet
from aae_batch.report.write import write_report
from aae_batch.sampling.model.loading import EMBEDDED, default_guidance, named
from aae_batch.shapes.detector import Verdict, judge
from aae_batch.shapes.world import Thing, caption
from aae_batch.store.open import open_storage
from aae_batch.store.scratch import scratch_folder
from training.score import SPLITS, Pair

PROMPTS = 24
LABELS = {"stable-diffusion": "plain", "attend-and-excite": "guided"}
"""The methods that the demo compares, and what it calls them."""
MANIFEST = "manifest.jsonl"
SHEET = "contact_sheet.png"


def run_demo(
    output: Path, model: str = EMBEDDED, write: Callable[[str], None] = print, **guidance
) -> int:
    """Generate, score, lay out, and say what came of it. Returns the number of failed rows.

    The prompts are the first of the model's report split, which a fixed seed has shuffled and no
    setting was tuned on, each with the first of its seeds. Nothing is picked by its looks.

    Raises:
        AaeBatchError: the job cannot start or go on.
    """
    pairs = SPLITS["report"].pairs[:PROMPTS]
    rows = _manifest(pairs)
    storage = open_storage(output)
    write(f"model: {named(model)}")
    write(f"{len(pairs)} prompts, plain and guided from the same noise, on 2 actors:")
    with scratch_folder() as folder, progress_reporter() as report:
        manifest = folder / MANIFEST
        manifest.write_bytes(rows)
        settings = JobSettings(
            manifest=manifest,
            output=str(output),
            model=model,
            guidance=default_guidance(model).updated(**guidance),
            actors=2,
            slots=12,
            shard_size=12,
        )
        summary = run_job(settings, report)
        score(_scores(settings.output), report)
    storage.write_bytes(MANIFEST, rows)  # for whoever wants to look at it
    dataset = Dataset(storage)
    drawn = _drawn(dataset, pairs)
    title = f"{_counts(pairs, drawn)}; same noise left and right, prompts not picked".capitalize()
    sheet = contact_sheet(title, [_group(pair, drawn[pair]) for pair in pairs], columns=4)
    storage.write_bytes(SHEET, PNG.encode(sheet))
    write(f"images, attention, metadata, scores: {storage.root}")
    write(f"contact sheet: {storage.place(SHEET)}")
    write(f"page to look at: {write_report(storage)}")
    write(_refinements(dataset))
    write(_counts(pairs, drawn))
    return summary["failed"]


def _scores(output: str) -> ScoreSettings:
    """By the detector of the world of shapes, so that the page's cards say what is there."""
    return ScoreSettings(output=output, metric="detector", detector=SHAPES, actors=1)


def _manifest(pairs: Sequence[Pair]) -> bytes:
    rows = [
        {
            "id": _row_id(pair, method),
            "prompt": caption(pair),
            "subjects": [str(thing) for thing in pair],
            "seed": SPLITS["report"].seeds_of(i)[0],
            "method": method,
        }
        for i, pair in enumerate(pairs)
        for method in LABELS
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _row_id(pair: Pair, method: str) -> str:
    return "-".join([*str(pair[0]).split(), "and", *str(pair[1]).split(), LABELS[method]])


Drawn = dict[Pair, dict[str, tuple[Picture, Verdict | None]]]
"""Of each pair and method: the picture as the page shows it, and what the detector says of it."""


def _drawn(dataset: Dataset, pairs: Sequence[Pair]) -> Drawn:
    table = dataset.metadata().select(["id", "shard", "status", "file_name"]).to_pylist()
    rows = {row["id"]: row for row in table}
    return {
        pair: {
            method: _judged(dataset, rows[_row_id(pair, method)], pair, label)
            for method, label in LABELS.items()
        }
        for pair in pairs
    }


def _judged(dataset: Dataset, row: dict, pair: Pair, label: str) -> tuple[Picture, Verdict | None]:
    if row["status"] == "failed":
        return Picture(label, Image.new("RGB", (1, 1)), (Finding("failed", "missing"),)), None
    image = dataset.image(row)
    verdict = judge(image, pair)
    findings = [
        _finding(thing, drawn, bound, verdict)
        for thing, drawn, bound in zip(pair, verdict.drawn, verdict.bound, strict=True)
    ]
    if verdict.junk:
        others = "1 other object" if verdict.junk == 1 else f"{verdict.junk} other objects"
        findings.append(Finding(others, "note"))
    return Picture(label, image, tuple(findings)), verdict


def _finding(thing: Thing, drawn: bool, bound: bool, verdict: Verdict) -> Finding:
    if bound:
        return Finding(f"{thing}: found", "found")
    if drawn:
        colours = {d.colour for d in verdict.detections if d.shape == thing.shape}
        return Finding(f"{thing}: found in {' and '.join(sorted(colours))}", "partly")
    return Finding(f"{thing}: missing", "missing")


def _group(pair: Pair, drawn: dict[str, tuple[Picture, Verdict | None]]) -> Group:
    return Group(caption(pair), tuple(drawn[method][0] for method in LABELS))


def _counts(pairs: Sequence[Pair], drawn: Drawn) -> str:
    """How often a picture has both things, each in its colour."""
    counts = []
    for method, label in LABELS.items():
        verdicts = (drawn[pair][method][1] for pair in pairs)
        both = sum(verdict is not None and all(verdict.bound) for verdict in verdicts)
        counts.append(f"{label} {both} of {len(pairs)}")
    return f"both things drawn: {', '.join(counts)}"


def _refinements(dataset: Dataset) -> str:
    methods = (dataset.summary or {}).get("methods", {})
    mean = methods.get("attend-and-excite", {}).get("mean_refinements", 0)
    return f"refinements of a guided picture: {mean:.1f} on average"
