"""The command line. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aae_batch import __version__
from aae_batch.errors import AaeBatchError, JobError, OutputError, SettingsError

if TYPE_CHECKING:
    from aae_batch.config import GuidanceConfig
    from aae_batch.job.settings import JobSettings

COMPLETE, WITH_FAILURES, USAGE, STOPPED = 0, 1, 2, 3
"""Exit codes: all rows have pictures; some failed; the command or its input is wrong; stopped on the
way, and the same command goes on."""

app = typer.Typer(
    help="Image datasets with semantic guidance: Attend-and-Excite, in batches, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str,
    typer.Option(
        help="Hub id, folder in diffusers' layout, URL of one (s3://bucket/folder), or 'shapes', "
        "the model in this package."
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of the model on the hub.", show_default="main"),
]
S3Endpoint = Annotated[
    str | None,
    typer.Option(help="URL of an S3-compatible store.", show_default="AWS_ENDPOINT_URL, or AWS"),
]
OWN = "the model's own"


def main() -> None:
    """The console script."""
    app()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            help="Print the version.",
            callback=lambda wanted: _print_version() if wanted else None,
        ),
    ] = False,
) -> None: ...


def _print_version() -> None:
    print(f"aae-batch {__version__}")
    raise typer.Exit(COMPLETE)


@app.command()
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
    actors: Annotated[
        str | None,
        typer.Option(
            help="Processes that hold a model each: a number, or MIN:MAX to use what a cluster has room "
            "for. MIN are asked for in any case, which makes a cluster that scales grow.",
            show_default="one per GPU as they come, else one",
        ),
    ] = None,
    gpus_per_actor: Annotated[
        float | None,
        typer.Option(
            help="Share of a GPU that an actor takes, e.g. 0.5 for two on each.",
            show_default="1 where there are GPUs, else 0",
        ),
    ] = None,
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
    device: Annotated[
        str, typer.Option(help="Torch device of each actor; auto is CUDA, else MPS, else CPU.")
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="auto (bfloat16 or float16 on CUDA, else float32), float32, float16, bfloat16, float64."
        ),
    ] = "auto",
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join, e.g. 'auto'.", show_default="one on this machine"),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Generate again the rows that failed before."),
    ] = False,
    max_failures: Annotated[
        str | None,
        typer.Option(
            help="Stop when more rows fail: a number, or a share such as 5%.",
            show_default="never",
        ),
    ] = None,
    grace: Annotated[
        float,
        typer.Option(
            help="Seconds that shards under way are given after SIGTERM or Ctrl-C; what is not done by "
            "then is dropped, to be made again. A second signal stops at once."
        ),
    ] = 30.0,
    row_timeout: Annotated[
        float,
        typer.Option(help="Seconds without a finished row after which an actor is given up."),
    ] = 1800.0,
    s3_endpoint: S3Endpoint = None,
    max_deaths: Annotated[
        int,
        typer.Option(help="Stop after more actor deaths than this with nothing finished between."),
    ] = 20,
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
            help="attend-and-excite, or stable-diffusion for no guidance.", show_default=OWN
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
            help="How the maps of a subject's tokens become one: mean, max, first, last.",
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
    with _errors_in_a_sentence():
        job = _job_settings(given)
        if dry_run:
            raise typer.Exit(_dry_run(job))
        raise typer.Exit(_generate(job))


Output = Annotated[str, typer.Argument(help="The dataset's root: a folder, or a URL.")]


@app.command()
def verify(
    output: Output,
    manifest: Annotated[
        str | None, typer.Option(help="Compare the rows with this manifest, too.")
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Delete the commits of broken shards, so that the next run makes these again, and "
            "pictures that no row names. No run may be writing meanwhile.",
        ),
    ] = False,
    s3_endpoint: S3Endpoint = None,
) -> None:
    """Prove that OUTPUT has every row once, with its picture and statistics, undamaged.

    Exit codes: 0 proved, 1 something is missing or wrong, 2 wrong command or input.
    """
    with _errors_in_a_sentence():
        raise typer.Exit(_verify(output, manifest, repair, s3_endpoint))


@app.command()
def status(output: Output, s3_endpoint: S3Endpoint = None) -> None:
    """Say how far OUTPUT is, while its job runs or afterwards."""
    with _errors_in_a_sentence():
        _status(output, s3_endpoint)


@app.command()
def tokens(
    prompt: Annotated[str, typer.Argument(help="The text.")],
    model: Model = "shapes",
    revision: Revision = None,
    s3_endpoint: S3Endpoint = None,
) -> None:
    """Print how a model's tokenizer splits PROMPT, with the positions for token_indices."""
    with _errors_in_a_sentence():
        from rich.console import Console
        from rich.table import Table

        from aae_batch.model.loading import load_tokenizer
        from aae_batch.subjects import token_table

        table = Table("index", "token", "can be guided", box=None, pad_edge=False)
        tokenizer = load_tokenizer(model, revision=revision, s3_endpoint=s3_endpoint)
        for token in token_table(tokenizer, prompt).tokens:
            guidable = "yes" if token.kind == "word" else f"no: {_KINDS[token.kind]}"
            table.add_row(str(token.index), token.text, guidable)
        Console(highlight=False, markup=False).print(table)


_KINDS = {
    "start": "start token",
    "end": "end token",
    "truncated": "cut off, the model never sees it",
}


@app.command()
def demo(
    output: Annotated[Path, typer.Argument(help="Folder for the pictures.")] = Path("demo-output"),
) -> None:
    """Make a small dataset with the embedded model, plain and guided from the same noise, and a
    contact sheet of both."""
    with _errors_in_a_sentence():
        from aae_batch.report.demo import run_demo

        raise typer.Exit(run_demo(output))


# --- settings ------------------------------------------------------------------------------------


def _job_settings(given: dict[str, Any]) -> JobSettings:
    from aae_batch.job.settings import JobSettings

    own = {name: given[name] for name in JobSettings.model_fields if name in given}
    return JobSettings(**own, guidance=_guidance(given))


def _guidance(given: dict[str, Any]) -> GuidanceConfig:
    """The model's own settings with those that were given."""
    from aae_batch.config import GuidanceConfig
    from aae_batch.model.loading import default_guidance

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


# --- what the commands do ------------------------------------------------------------------------


def _generate(job: JobSettings) -> int:
    from aae_batch.job.driver import run_job
    from aae_batch.terminal import progress_reporter

    with progress_reporter() as report:
        summary = run_job(job, report)
    print(f"{summary['images']} images, {summary['failed']} failed rows in {job.output}")
    for kind, count in summary["failures"].items():
        print(f"  {count} x {kind}: see the column error in {job.output}/metadata")
    return WITH_FAILURES if summary["failed"] else COMPLETE


PROBLEMS_SHOWN = 50


def _verify(output: str, manifest_path: str | None, mend: bool, endpoint: str | None) -> int:
    from contextlib import ExitStack

    from aae_batch.dataset import layout
    from aae_batch.dataset.storage import open_storage
    from aae_batch.dataset.verify import repair, verify
    from aae_batch.manifest import open_manifest
    from aae_batch.terminal import shard_reporter

    storage = open_storage(output, endpoint)
    with ExitStack() as stack:
        mend = mend and storage.exists(layout.RUN)  # a lock would make a folder of a typing error
        if mend:
            stack.enter_context(storage.writing())
        manifest = None
        if manifest_path:
            manifest = stack.enter_context(open_manifest(manifest_path, endpoint))
        with shard_reporter() as report:
            found = verify(storage, manifest, report)
        print(found)
        for problem in found.problems[:PROBLEMS_SHOWN]:
            print(f"  {problem}")
        if len(found.problems) > PROBLEMS_SHOWN:
            print(f"  and {len(found.problems) - PROBLEMS_SHOWN} more problems")
        deleted = repair(storage, found) if mend else []
    for name in deleted:
        print(f"deleted {name}")
    if deleted:
        print("Run the same `aae-batch generate` again to make these shards anew.")
    return COMPLETE if found.proved else WITH_FAILURES


def _status(output: str, endpoint: str | None) -> None:
    import time

    from aae_batch.dataset.reader import Dataset
    from aae_batch.dataset.status import status
    from aae_batch.dataset.storage import open_storage

    dataset = Dataset(open_storage(output, endpoint))
    run = dataset.run
    if run is None:
        raise OutputError(f"There is no run in {output}: check the path, or wait until it begins.")
    print(status(run, dataset.shards(), dataset.progress, dataset.summary, time.time()))


def _dry_run(job: JobSettings) -> int:
    from aae_batch.job.dry_run import dry_run

    return WITH_FAILURES if dry_run(job, print) else COMPLETE


@contextmanager
def _errors_in_a_sentence() -> Iterator[None]:
    """Errors of ours are one sentence and an exit code; any other is a bug and keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _complain("Stopped. Run the same command again to go on.")
        raise typer.Exit(STOPPED) from None
    except JobError as error:
        _complain(f"{error} Run the same command again to go on.")
        raise typer.Exit(STOPPED) from None
    except AaeBatchError as error:
        _complain(str(error))
        raise typer.Exit(USAGE) from None


def _complain(text: str) -> None:
    print(f"aae-batch: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
