"""`aae-batch generate`: generate the images of a manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from aae_batch.cli.common import COMPLETE, WITH_FAILURES
from aae_batch.cli.options import settings_command
from aae_batch.errors import counted

if TYPE_CHECKING:
    from aae_batch.generate.settings import JobSettings


@settings_command(arguments=("manifest", "output"))
def generate(
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything and print what would be done; loads only the tokenizer.",
        ),
    ] = False,
    **settings: Any,
) -> int:
    """Generate the images of MANIFEST into OUTPUT, with attention statistics and metadata.

    Finished shards are kept: run the same command again to resume after a stop.
    Exit codes: 0 complete, 1 complete with failed rows, 2 wrong command or input, 3 stopped.

    Examples:
    aae-batch generate manifest.parquet output --dry-run
    aae-batch generate manifest.parquet output --model stabilityai/stable-diffusion-xl-base-1.0
    aae-batch generate prompts.csv s3://bucket/output --method self-cross --slots auto
    aae-batch generate manifest.parquet output --accept detector.all_found --tries 4
    """
    job = _job(settings)
    return _dry_run(job) if dry_run else _generate(job)


def _job(given: dict[str, Any]) -> JobSettings:
    """Make the job's settings. Sampling settings that are not given default to the model's."""
    from aae_batch.generate.settings import JobSettings, listed
    from aae_batch.methods import load_plugins
    from aae_batch.sampling.config import GuidanceConfig
    from aae_batch.sampling.model.loading import default_guidance

    load_plugins(listed(given["plugin"]))
    sampling = {name: given.pop(name, None) for name in GuidanceConfig.model_fields}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    guidance = default_guidance(given["model"], given["s3_endpoint"], given["revision"]).updated(
        **sampling
    )
    return JobSettings(**given, guidance=guidance)


def _generate(job: JobSettings) -> int:
    from aae_batch.cli.terminal import progress_reporter, waiting

    with waiting("loading Ray"):
        from aae_batch.generate.driver import run_job
        from aae_batch.sampling.model.loading import named

    print(f"model: {named(job.model, job.lora)}", flush=True)
    with progress_reporter() as on_progress:
        summary = run_job(job, on_progress)
    images, failed = counted(summary["images"], "image"), counted(summary["failed"], "failed row")
    print(f"{images}, {failed} in {job.output}")
    for method, made in summary["methods"].items():
        if made.get("mean_forwards"):
            images = counted(made["images"], "image")
            print(f"  {method}: {images}, {made['mean_forwards']:g} forwards each")
    _say_failures(summary, job.output)
    tried = summary.get("acceptance")
    if tried:
        _say_tries(tried, summary["rows"])
    return WITH_FAILURES if summary["failed"] - (tried or {}).get("dropped", 0) else COMPLETE


def _say_failures(summary: dict[str, Any], output: str) -> None:
    """Print why rows failed. A summary of an earlier version has no examples."""
    from aae_batch.job.progress import reasons

    for reason in reasons(summary["failures"], summary.get("examples", {})):
        print(f"  {reason}")
    if summary["failed"]:
        print(f"  The column error in {output}/metadata says why each row failed.")


def _say_tries(tried: dict[str, Any], rows: int) -> None:
    words = ("accepted", "unaccepted", "unjudged", "dropped")
    counts = ", ".join(f"{tried[word]} {word}" for word in words if tried[word])
    print(f"{counts or 'none accepted'}; {tried['tries'] / rows:.2f} tries a row")
    for method, rung in tried["rungs"].items():
        given_up = f", {rung['given_up']} given up early" if rung["given_up"] else ""
        print(
            f"  {method}: {rung['tries']} tries settled {counted(rung['settled'], 'row')}{given_up}; "
            f"{rung['forwards']} forwards"
        )
    each = tried["forwards_nursing_each_row_once"]
    once = "" if each is None else f"; nursing every row once would take about {each:g} each"
    print(f"  {tried['forwards_an_image']:g} forwards an image{once}")


def _dry_run(job: JobSettings) -> int:
    from aae_batch.generate.dry_run import dry_run

    return WITH_FAILURES if dry_run(job, print) else COMPLETE
