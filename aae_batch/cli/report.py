"""`aae-batch report`: write a page to browse a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aae_batch.cli.common import Output
from aae_batch.cli.options import settings_command
from aae_batch.errors import SettingsError


@settings_command()
def report(
    output: Output,
    s3_endpoint: str | None,
    html: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write the page to this local file.",
            show_default="report.html in OUTPUT",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of rows to show, from the start of the manifest; the figures cover all rows.",
            show_default="10000, or 2000 with embedded images",
        ),
    ] = None,
    embed: Annotated[
        bool,
        typer.Option(
            "--embed",
            help="Embed small images in the page, so that it can be sent to someone. By default the page "
            "links to the images of OUTPUT. Layouts other than 'files', and a local page of an output "
            "in a bucket, always embed.",
        ),
    ] = False,
    thumbnail: Annotated[
        int, typer.Option(min=16, max=2048, help="Longer side of an embedded image, in pixels.")
    ] = 256,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write a page to browse OUTPUT, while its job runs or afterwards.

    It shows the methods side by side from the same noise, each subject's attention over the image and
    per step, scores of `aae-batch evaluate`, filters, sorting and summary figures. It needs no server
    and no network.

    Examples:
    aae-batch report output --open
    aae-batch report s3://bucket/output --html page.html --limit 500
    """
    from aae_batch.cli.terminal import count_reporter
    from aae_batch.report.write import write_report
    from aae_batch.store.base import is_url
    from aae_batch.store.open import open_storage

    if open_page and html is None and is_url(output):
        raise SettingsError(
            f"--open needs a page on this machine, and this one would be in {output}: add "
            "--html report.html."
        )
    if html is not None and is_url(html):
        raise SettingsError(
            "--html takes a file of this machine, not a URL: leave it out to have the page in "
            "OUTPUT, or write it to a file and copy that."
        )
    page = None if html is None else Path(html)
    storage = open_storage(output, s3_endpoint)
    with count_reporter("shards") as on_progress:
        place = write_report(storage, page, limit, embed, thumbnail, on_progress)
    print(place)
    if open_page:
        typer.launch(place)
