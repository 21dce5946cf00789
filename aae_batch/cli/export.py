"""`aae-batch export`: write an output in a format that other tools load."""

from __future__ import annotations

from typing import Annotated

import typer

from aae_batch.cli.common import Output, complain
from aae_batch.cli.options import settings_command
from aae_batch.errors import SettingsError, counted

BEST = "best-attention"


@settings_command()
def export(
    output: Output,
    s3_endpoint: str | None,
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DEST", help="An empty folder, or a URL: s3://..., hf://datasets/USER/NAME."
        ),
    ],
    format: Annotated[
        str,
        typer.Option(
            help="hf (Parquet with an image column, as Hugging Face's hub shows it), parquet (the same "
            "with a plain card), webdataset (tars) or imagefolder (one file per image)."
        ),
    ] = "hf",
    where: Annotated[
        str | None,
        typer.Option(
            help="Export only rows for which this SQL expression over the metadata and score columns is "
            'true, e.g. "final_loss < 0.5 AND neglected IS NOT TRUE".',
            show_default="all with an image",
        ),
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Export only the rows whose ids this text file lists, one a line, e.g. the kept.txt of the "
            "report page.",
            show_default="all",
        ),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help=f"{BEST}: for each prompt and method, export only the image with the lowest final loss "
            "among the rows that --where and --ids admit.",
            show_default="all",
        ),
    ] = None,
    of: Annotated[
        int | None,
        typer.Option(
            help=f"With --select {BEST}: number of seeds to choose from, the first of each prompt.",
            show_default="all seeds of a prompt",
        ),
    ] = None,
    partial: Annotated[
        bool,
        typer.Option("--partial", help="Export the committed part of an incomplete output."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier export in DEST.")
    ] = False,
    license: Annotated[
        str | None,
        typer.Option(
            help="Licence on the dataset card, as the hub spells it, e.g. cc-by-4.0.",
            show_default="none; the card says so",
        ),
    ] = None,
    rows_per_file: Annotated[
        int,
        typer.Option(
            help="Rows per Parquet file or tar; memory holds up to 2.5 copies of that many images."
        ),
    ] = 1000,
) -> None:
    """Write the images and metadata of OUTPUT to DEST, in a format that other tools load, with a
    dataset card and a page of samples.

    Exit codes: 0 written, 2 wrong command or input, 3 stopped early; the same command starts over.

    Examples:
    aae-batch export output exported --format imagefolder --where "method = 'attend-and-excite'"
    aae-batch export output exported --format webdataset --select best-attention --of 4
    """
    if select not in (None, BEST):
        raise SettingsError(f"--select {select}: there is only {BEST}.")
    if of is not None and select is None:
        raise SettingsError(
            f"--of {of} sets how many seeds to choose from: give --select {BEST}, too."
        )
    from aae_batch.cli.terminal import count_reporter
    from aae_batch.dataset.condition import Condition
    from aae_batch.dataset.reader import Dataset
    from aae_batch.export.export import ExportSettings
    from aae_batch.export.export import export as write
    from aae_batch.export.selection import Best, Ids
    from aae_batch.store.open import open_storage

    settings = ExportSettings(
        format=format,
        where=None if where is None else Condition(where),
        ids=None if ids is None else Ids.read(ids),
        best=None if select is None else Best(of),
        partial=partial,
        force=force,
        license=license,
        rows_per_file=rows_per_file,
    )
    dataset = Dataset(open_storage(output, s3_endpoint))
    to = open_storage(destination, s3_endpoint)
    with count_reporter("shards") as on_progress:
        written = write(dataset, to, settings, on_progress, on_progress)
    for note in written.notes:
        complain(note)
    left_out = [
        f"{count} {reason}"
        for count, reason in (
            (written.failed, "without an image"),
            (written.refused, "left out by --where"),
            (written.unlisted, "not in --ids"),
            (written.beaten, "not the best of their prompt"),
        )
        if count
    ]
    print(f"{len(written)} of {counted(written.rows, 'row')} exported to {to.root}")
    if left_out:
        print(", ".join(left_out))
