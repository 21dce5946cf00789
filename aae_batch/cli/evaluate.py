"""`aae-batch evaluate`: score images and compare methods."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aae_batch.cli.common import COMPLETE, USAGE, WITH_FAILURES, complain
from aae_batch.cli.options import settings_command
from aae_batch.errors import SettingsError, counted

if TYPE_CHECKING:
    from aae_batch.evaluate.settings import ScoreSettings
    from aae_batch.evaluate.table import Table
    from aae_batch.settings import Settings


def _score_settings() -> type[Settings]:
    from aae_batch.evaluate.settings import ScoreSettings

    return ScoreSettings


@settings_command(_score_settings, without=("output",))
def evaluate(
    outputs: Annotated[
        list[str],
        typer.Argument(help="Dataset roots: folders or URLs. Several are compared in one table."),
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="clip (similarity of the image to the prompt and to its worst subject), captions "
            "(similarity of a generated caption to the prompt), detector (which subjects are found) "
            "or attention (from the tables alone). Repeat the option, or separate metrics by commas.",
            show_default="none: print the table of existing scores",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be scored, without loading a model.")
    ] = False,
    csv: Annotated[
        Path | None, typer.Option(help="Write the table to this CSV file, one line per cell.")
    ] = None,
    latex: Annotated[
        Path | None, typer.Option(help="Write the table to this LaTeX file, for booktabs.")
    ] = None,
    **settings: Any,
) -> int:
    """Score the images of OUTPUTS and compare their methods in a table.

    Scores are stored with each dataset, in metrics/. Existing scores are kept: run the same command
    again to resume after a stop, or to score images that were added.
    Exit codes: 0 complete, 1 some images could not be scored, 2 wrong command or input, 3 stopped.

    Examples:
    aae-batch evaluate output --metric attention,clip
    aae-batch evaluate output --csv table.csv
    aae-batch evaluate first-output second-output
    """
    from aae_batch.evaluate.settings import ScoreSettings

    if dry_run and not metric:
        raise SettingsError("--dry-run says what would be scored: name a --metric, too.")
    endpoint = settings["s3_endpoint"]
    outputs = _each_once(outputs, endpoint)
    names = [name.strip() for text in metric or () for name in text.split(",")]
    jobs = [
        ScoreSettings(**settings, output=output, metric=name)
        for name in dict.fromkeys(names)
        for output in outputs
    ]
    if dry_run:
        for job in jobs:
            _say_plan(job)
        return COMPLETE
    unscored = sum(_score(job) for job in jobs)
    table = _table(outputs, endpoint)
    if not table.lines:
        complain(" ".join(table.notes) or "Nothing is scored in these outputs: name a --metric.")
        return USAGE
    _print(table, csv, latex)
    return WITH_FAILURES if unscored else COMPLETE


def _each_once(outputs: list[str], endpoint: str | None) -> list[str]:
    """Return the outputs without those that name the same root again."""
    from aae_batch.store.open import open_storage

    found: dict[str, str] = {}
    for output in map(os.path.expanduser, outputs):
        found.setdefault(open_storage(output, endpoint).root, output)
    return list(found.values())


def _say_plan(job: ScoreSettings) -> None:
    from aae_batch.evaluate.driver import plan_scores

    plan = plan_scores(job)
    rows = sum(len(piece) for piece in plan.todo)
    print(
        f"{job.metric} of {job.output}: {counted(len(plan.todo), 'shard')} ({counted(rows, 'row')}) to score, "
        f"{len(plan.kept)} scored already, {plan.missing} not generated yet"
    )
    if again := sum(len(rows) for rows in plan.again.values()):
        print(f"{counted(again, 'image')} that could not be scored will be retried")


def _score(job: ScoreSettings) -> int:
    """Score, and return the number of images that could not be scored."""
    from aae_batch.cli.terminal import progress_reporter, waiting

    with waiting("loading Ray"):
        from aae_batch.evaluate.driver import score

    with progress_reporter() as on_progress:
        scored = score(job, on_progress)
    rows, shards = counted(scored.rows, "row"), counted(scored.kept, "shard")
    print(f"{job.metric} of {job.output}: {rows} scored, {shards} kept")
    if scored.missing:
        complain(
            f"{job.output} is incomplete: {counted(scored.missing, 'shard')} still to be generated. Run the "
            "same command again afterwards."
        )
    for reason in scored.reasons:
        complain(reason)
    if scored.unscored:
        complain(
            f"{scored.unscored} images could not be scored: their scores are null. Try them again with "
            "--retry-failed."
        )
    return scored.unscored


def _table(outputs: list[str], endpoint: str | None) -> Table:
    """Make the table, in which outputs are named by the last part of their path if that is unique."""
    from aae_batch.dataset.reader import Dataset
    from aae_batch.errors import OutputError
    from aae_batch.evaluate.pictures import read_pictures
    from aae_batch.evaluate.records import differing_judges
    from aae_batch.evaluate.table import make_table
    from aae_batch.store.open import open_storage

    lasts = [output.rstrip("/").rpartition("/")[2] for output in outputs]
    names = lasts if len(set(lasts)) == len(lasts) else outputs
    datasets = {}
    for output, name in zip(outputs, names, strict=True):
        datasets[name] = Dataset(open_storage(output, endpoint))
        if datasets[name].run is None:
            raise OutputError(f"There is no dataset in {output}: check the path.")
    left_out = differing_judges(datasets)
    return make_table(read_pictures(datasets, without=left_out), [*left_out.values()])


def _print(table: Table, csv: Path | None, latex: Path | None) -> None:
    from aae_batch.evaluate.render import as_csv, as_latex, as_text

    print(as_text(table))
    for path, text in ((csv, as_csv), (latex, as_latex)):
        if path is None:
            continue
        path = path.expanduser()
        try:
            path.write_text(text(table), encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"Cannot write {path}: {error.strerror}.") from error
