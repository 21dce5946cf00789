"""`aae-batch demo`: a small dataset with an embedded model, both methods from the same noise, and a
page to view it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aae_batch.cli.options import settings_command
from aae_batch.cli.terminal import progress_reporter

if TYPE_CHECKING:
    from aae_batch.dataset.reader import Dataset
    from aae_batch.report.contact_sheet import Finding, Group, Picture
    from aae_batch.shapes.detector import Verdict
    from aae_batch.shapes.splits import Pair

PROMPTS = 24
LABELS = {"stable-diffusion": "plain", "attend-and-excite": "guided"}
"""The methods that the demo compares, and their labels."""
MANIFEST = "manifest.jsonl"
SHEET = "contact_sheet.png"


@settings_command()
def demo(
    output: Annotated[Path, typer.Argument(help="Folder for the images.")] = Path("demo-output"),
    model: Annotated[
        str,
        typer.Option(
            help="shapes, Stable Diffusion 1 in miniature, or shapes-flow, Stable Diffusion 3 in "
            "miniature, which is slower."
        ),
    ] = "shapes",
) -> int:
    """Generate a small dataset with an embedded model, plain and guided from the same noise, and a
    page to compare them.

    Examples:
    aae-batch demo
    aae-batch demo flow-output --model shapes-flow
    """
    from aae_batch.errors import SettingsError
    from aae_batch.sampling.model.loading import EMBEDDED

    if model not in EMBEDDED:
        raise SettingsError(
            f"--model {model}: the demo draws coloured shapes, so it takes {' or '.join(EMBEDDED)}; for "
            "other models there is `aae-batch generate`."
        )
    return run_demo(output, model)


def run_demo(
    output: Path, model: str = "shapes", write: Callable[[str], None] = print, **guidance: Any
) -> int:
    """Generate, score, lay out and summarise the demo. Returns the number of failed rows.

    The prompts are the first of the model's report split, each with the first of its seeds. A fixed
    seed shuffled that split, no setting was tuned on it, and no image is hand-picked.

    Raises:
        AaeBatchError: the job cannot start or continue.
    """
    from aae_batch.dataset.image_format import PNG
    from aae_batch.dataset.reader import Dataset
    from aae_batch.evaluate.driver import score
    from aae_batch.evaluate.settings import ScoreSettings
    from aae_batch.generate.driver import run_job
    from aae_batch.generate.settings import JobSettings
    from aae_batch.report.contact_sheet import contact_sheet
    from aae_batch.report.write import write_report
    from aae_batch.sampling.model.loading import default_guidance, named
    from aae_batch.shapes.splits import SPLITS
    from aae_batch.store.open import open_storage
    from aae_batch.store.scratch import scratch_folder

    split = SPLITS["report"]
    pairs = split.pairs[:PROMPTS]
    rows = "".join(
        json.dumps(row) + "\n"
        for i, pair in enumerate(pairs)
        for row in _rows(pair, split.seeds_of(i)[0])
    ).encode()
    storage = open_storage(output)
    write(f"model: {named(model)}")
    write(f"{len(pairs)} prompts, plain and guided from the same noise, on 2 actors:")
    with scratch_folder() as folder, progress_reporter() as on_progress:
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
        summary = run_job(settings, on_progress)
        # with the detector of the embedded model, so that the page's cards show which subjects are found
        judge = ScoreSettings(output=str(output), metric="detector", detector="shapes", actors=1)
        score(judge, on_progress)
    storage.write_bytes(MANIFEST, rows)  # for reference
    dataset = Dataset(storage)
    groups, counts = _drawn(dataset, pairs)
    title = f"{counts}; same noise left and right, prompts not picked".capitalize()
    storage.write_bytes(SHEET, PNG.encode(contact_sheet(title, groups, columns=4)))
    methods = (dataset.summary or {}).get("methods", {})
    refinements = methods.get("attend-and-excite", {}).get("mean_refinements", 0)
    write(f"images, attention, metadata, scores: {storage.root}")
    write(f"contact sheet: {storage.place(SHEET)}")
    write(f"page to look at: {write_report(storage)}")
    write(f"refinements per guided image: {refinements:.1f} on average")
    write(counts)
    return summary["failed"]


def _rows(pair: Pair, seed: int) -> Iterator[dict[str, Any]]:
    from aae_batch.shapes.world import caption

    for method in LABELS:
        yield {
            "id": _row_id(pair, method),
            "prompt": caption(pair),
            "subjects": [str(thing) for thing in pair],
            "seed": seed,
            "method": method,
        }


def _row_id(pair: Pair, method: str) -> str:
    return "-".join([*str(pair[0]).split(), "and", *str(pair[1]).split(), LABELS[method]])


def _drawn(dataset: Dataset, pairs: Sequence[Pair]) -> tuple[list[Group], str]:
    """Return each pair's images, and a sentence on how often both objects appear in their colours."""
    from aae_batch.report.contact_sheet import Group
    from aae_batch.shapes.world import caption

    table = dataset.metadata().select(["id", "shard", "status", "file_name"]).to_pylist()
    rows = {row["id"]: row for row in table}
    groups = []
    both = dict.fromkeys(LABELS, 0)
    for pair in pairs:
        pictures = []
        for method, label in LABELS.items():
            picture, is_bound = _judged(dataset, rows[_row_id(pair, method)], pair, label)
            pictures.append(picture)
            both[method] += is_bound
        groups.append(Group(caption(pair), tuple(pictures)))
    counts = (f"{LABELS[method]} {count} of {len(pairs)}" for method, count in both.items())
    return groups, f"both things drawn: {', '.join(counts)}"


def _judged(dataset: Dataset, row: dict[str, Any], pair: Pair, label: str) -> tuple[Picture, bool]:
    """Return the image with its findings, and whether both objects appear in their colours."""
    from PIL import Image

    from aae_batch.report.contact_sheet import Finding, Picture
    from aae_batch.shapes.detector import judge

    if row["status"] == "failed":
        return Picture(label, Image.new("RGB", (1, 1)), (Finding("failed", "missing"),)), False
    image = dataset.image(row)
    verdict = judge(image, pair)
    return Picture(label, image, tuple(_findings(pair, verdict))), all(verdict.bound)


def _findings(pair: Pair, verdict: Verdict) -> Iterator[Finding]:
    from aae_batch.report.contact_sheet import Finding

    for thing, drawn, bound in zip(pair, verdict.drawn, verdict.bound, strict=True):
        if bound:
            yield Finding(f"{thing}: found", "found")
        elif drawn:
            colours = {d.colour for d in verdict.detections if d.shape == thing.shape}
            yield Finding(f"{thing}: found in {' and '.join(sorted(colours))}", "partly")
        else:
            yield Finding(f"{thing}: missing", "missing")
    if verdict.junk:
        objects = "object" if verdict.junk == 1 else "objects"
        yield Finding(f"{verdict.junk} other {objects}", "note")
