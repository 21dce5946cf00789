"""`aae-batch generate`: the pictures of a manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from aae_batch.cli.common import (
    COMPLETE,
    WITH_FAILURES,
    Actors,
    Device,
    Dtype,
    GpusPerActor,
    Grace,
    MaxDeaths,
    Model,
    RayAddress,
    Revision,
    RowTimeout,
    S3Endpoint,
    errors_in_a_sentence,
)
from aae_batch.errors import SettingsError

if TYPE_CHECKING:
    from aae_batch.generate.settings import JobSettings
    from aae_batch.sampling.config import GuidanceConfig

OWN = "the model's own"


def generate(
    manifest: Annotated[
        str,
        typer.Argument(
            help="Parquet, CSV or JSONL, path or URL; one row per picture. Columns: prompt (required), subjects or "
            "token_indices, seed, id, negative_prompt, guidance_scale, num_inference_steps, height, "
            "width, method; others are carried to the metadata table."
        ),
    ],
    output: Annotated[
        str,
        typer.Argument(
            help="Folder for the dataset, s3://bucket/prefix, or another URL (gs://, abfs://, hf://). "
            "Where it is not complete, it is continued."
        ),
    ],
    model: Model = "shapes",
    revision: Revision = None,
    # The job
    actors: Actors = None,
    gpus_per_actor: GpusPerActor = None,
    slots: Annotated[
        int, typer.Option(help="Pictures in flight in each actor; memory grows with it.")
    ] = 8,
    shard_size: Annotated[
        int | None,
        typer.Option(
            help="Rows per shard, the unit of commit and resume.",
            show_default="256, or as the output was begun",
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="files (a file per picture), webdataset (a tar per shard) or parquet (a column of "
            "the metadata table). The last two hold a shard's encoded pictures in memory.",
            show_default="files, or as the output was begun",
        ),
    ] = None,
    image_format: Annotated[
        str | None,
        typer.Option(help="png, webp or jpeg.", show_default="png, or as the output was begun"),
    ] = None,
    image_quality: Annotated[
        int | None,
        typer.Option(help="Of jpeg and lossy webp, 1 to 100.", show_default="jpeg 95, webp 90"),
    ] = None,
    png_level: Annotated[
        int | None, typer.Option(help="Compression of png, 0 to 9.", show_default="1")
    ] = None,
    webp_lossless: Annotated[
        bool | None, typer.Option(help="Keep every pixel in webp.", show_default="lossy")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    ray_address: RayAddress = None,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Generate again the rows that failed before."),
    ] = False,
    other_versions: Annotated[
        bool,
        typer.Option(
            "--other-versions",
            help="Go on with a run that other versions of aae_batch, torch, diffusers or transformers "
            "have begun; pictures may differ.",
        ),
    ] = False,
    max_failures: Annotated[
        str | None,
        typer.Option(
            help="Stop when more rows fail: a number, or a share such as 5%.",
            show_default="never",
        ),
    ] = None,
    grace: Grace = 30.0,
    row_timeout: RowTimeout = 1800.0,
    s3_endpoint: S3Endpoint = None,
    max_deaths: MaxDeaths = 20,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything and say what would be done; only the tokenizer is loaded.",
        ),
    ] = False,
    # Sampling: the fields of GuidanceConfig
    method: Annotated[
        str | None,
        typer.Option(
            help="attend-and-excite; stable-diffusion for no guidance; or, to compare with, "
            "composable-diffusion (each part of 'a cat and a dog' by itself, scores added; a forward "
            "more for each) or structure-diffusion (values of noun phrases in cross-attention).",
            show_default=OWN,
        ),
    ] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(help="Denoising steps.", show_default=OWN)
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance; 1 or less switches it off.", show_default=OWN),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to move away from.", show_default="nothing")
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Pixels, a multiple of 8.", show_default=OWN)
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Pixels, a multiple of 8.", show_default=OWN)
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="ddim, pndm, dpmsolver++, euler, euler-ancestral, or a class name of diffusers.",
            show_default=OWN,
        ),
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="Noise added by DDIM.", show_default=OWN)
    ] = None,
    max_iter_to_alter: Annotated[
        int | None, typer.Option(help="Guide the steps before this one.", show_default=OWN)
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            help="Refine at these steps until every subject's attention reaches the threshold, e.g. "
            "'0:0.05,10:0.5,20:0.8'; 'none' for no refinement.",
            show_default=OWN,
        ),
    ] = None,
    max_refinement_steps: Annotated[
        int | None, typer.Option(help="Refinements at one step, at most.", show_default=OWN)
    ] = None,
    scale_factor: Annotated[
        float | None,
        typer.Option(help="Length of a latent update at the first step.", show_default=OWN),
    ] = None,
    scale_range: Annotated[
        str | None,
        typer.Option(
            help="The update's length falls over all steps as the root of this range, e.g. '1:0.5'.",
            show_default=OWN,
        ),
    ] = None,
    attn_res: Annotated[
        str | None,
        typer.Option(
            help="Height x width of the guided attention maps, e.g. 16x16.",
            show_default="the model's own, or a quarter of its latents",
        ),
    ] = None,
    subject_pooling: Annotated[
        str | None,
        typer.Option(
            help="How the maps of a subject's tokens become one: sum, or max for the strongest alone.",
            show_default=OWN,
        ),
    ] = None,
    normalize_eot: Annotated[
        bool | None,
        typer.Option(
            help="Compare a subject with the words up to the end token only.",
            show_default="only for Stable Diffusion 2.x",
        ),
    ] = None,
) -> None:
    """Generate the pictures of MANIFEST into OUTPUT, with attention statistics and metadata.

    What is already there is kept: run the same command again to go on after a stop.
    Exit codes: 0 complete, 1 complete with failed rows, 2 wrong command or input, 3 stopped.
    """
    given = dict(locals())
    with errors_in_a_sentence():
        job = _job_settings(given)
        if dry_run:
            raise typer.Exit(_dry_run(job))
        raise typer.Exit(_generate(job))


def _job_settings(given: dict[str, Any]) -> JobSettings:
    from aae_batch.generate.settings import JobSettings

    own = {name: given[name] for name in JobSettings.model_fields if name in given}
    return JobSettings(**own, guidance=_guidance(given))


def _guidance(given: dict[str, Any]) -> GuidanceConfig:
    """The model's own settings with those that were given."""
    from aae_batch.sampling.config import GuidanceConfig
    from aae_batch.sampling.model.loading import default_guidance

    values = {name: given[name] for name in GuidanceConfig.model_fields if given[name] is not None}
    for name, parse in _PARSERS.items():
        if name in values:
            values[name] = parse(values[name])
    return default_guidance(given["model"], given.get("s3_endpoint")).updated(**values)


def _thresholds(text: str) -> dict[int, float]:
    if text.strip().lower() == "none":
        return {}
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {int(step): float(share) for step, share in pairs}
    except ValueError:
        raise SettingsError(
            f"--thresholds {text!r} is not a list of step:threshold; write e.g. '0:0.05,10:0.5'."
        ) from None


def _scale_range(text: str) -> tuple[float, float]:
    try:
        first, last = (float(part) for part in text.split(":"))
    except ValueError:
        raise SettingsError(f"--scale-range {text!r} is not a range; write e.g. '1:0.5'.") from None
    return first, last


def _attn_res(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise SettingsError(f"--attn-res {text!r} is not a size; write e.g. '16x16'.") from None
    return height, width


_PARSERS = {"thresholds": _thresholds, "scale_range": _scale_range, "attn_res": _attn_res}


def _generate(job: JobSettings) -> int:
    from aae_batch.cli.terminal import progress_reporter
    from aae_batch.generate.driver import run_job
    from aae_batch.sampling.model.loading import named

    print(f"model: {named(job.model)}", flush=True)
    with progress_reporter() as report:
        summary = run_job(job, report)
    print(f"{summary['images']} images, {summary['failed']} failed rows in {job.output}")
    for kind, count in summary["failures"].items():
        print(f"  {count} x {kind}: see the column error in {job.output}/metadata")
    return WITH_FAILURES if summary["failed"] else COMPLETE


def _dry_run(job: JobSettings) -> int:
    from aae_batch.generate.dry_run import dry_run

    return WITH_FAILURES if dry_run(job, print) else COMPLETE
