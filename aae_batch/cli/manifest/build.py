"""`aae-batch manifest build`: write a manifest from prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from aae_batch.cli.manifest.common import (
    METHODS_HELP,
    SEEDS_HELP,
    Force,
    Show,
    Target,
    TokenizerOf,
    ask,
    first_of,
    show_found,
    show_prompts,
    warn_of_left_out,
    warn_of_unguidable,
    write,
)
from aae_batch.cli.options import settings_command
from aae_batch.errors import counted


@settings_command()
def build(
    source: Annotated[
        str,
        typer.Argument(
            help="Prompts: .txt, one per line; a table as a manifest may be, with a column prompt (other "
            "columns are kept); or .yaml with lists for a template, and optionally the template. A path "
            "or a URL."
        ),
    ],
    output: Target,
    revision: str | None,
    plugin: str | None,
    s3_endpoint: str | None,
    template: Annotated[
        str | None,
        typer.Option(
            help="A prompt with placeholders for the lists of a .yaml: 'a {animal} and a {color} {object}'. "
            "{animal.1} and {animal.2} are two different animals.",
            show_default="template in the .yaml",
        ),
    ] = None,
    subjects: Annotated[
        str | None,
        typer.Option(
            help="Subjects of the template's prompts, e.g. '{animal};{color} {object}'.",
            show_default="subjects in the .yaml, else found",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help=SEEDS_HELP,
            show_default="one per prompt, from its id",
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help=METHODS_HELP, show_default="the run's method")
    ] = None,
    find_subjects: Annotated[
        bool | None,
        typer.Option(
            "--find-subjects/--no-find-subjects",
            help="Take the nouns of prompts that have no subjects; needs the extra nlp.",
            show_default="for prompts that may be guided",
        ),
    ] = None,
    ignore: Annotated[
        str, typer.Option(help="Words that are never taken as subjects, e.g. 'artstation;style'.")
    ] = "",
    adjectives: Annotated[
        bool,
        typer.Option(
            "--adjectives",
            help="Include adjectives in the subjects found, e.g. 'red bird': syngen needs them, "
            "divide-and-bind, conform, focus and predicated use them.",
        ),
    ] = False,
    model: TokenizerOf = None,
    show: Show = 10,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Accept the subjects found without asking.")
    ] = False,
    force: Force = False,
) -> None:
    """Write the manifest OUTPUT for the prompts in SOURCE: one row per prompt, seed and method.

    Subjects found automatically are shown first, for confirmation.
    Exit codes: 0 written, 1 not confirmed, 2 wrong command or input.

    Examples:
    aae-batch manifest build prompts.txt manifest.parquet
    aae-batch manifest build prompts.csv manifest.parquet --seeds 4 --methods both
    aae-batch manifest build lists.yaml manifest.parquet --template 'a {animal} and a {color} {object}'
    """
    from aae_batch.cli.terminal import count_reporter
    from aae_batch.generate.settings import listed
    from aae_batch.manifest.build import nouns
    from aae_batch.manifest.build import rows as making
    from aae_batch.manifest.build import source as sources
    from aae_batch.manifest.build import subjects as naming
    from aae_batch.methods import load_plugins
    from aae_batch.sampling.model.loading import load_streams

    load_plugins(listed(plugin))
    making.check_target(output, force, s3_endpoint)
    wanted_seeds = making.parse_seeds(seeds) if seeds else []
    wanted_methods = making.parse_methods(methods) if methods else []
    prompts = sources.read_prompts(source, template, _listed(subjects), s3_endpoint)
    naming.check_subjects(prompts)
    found = naming.Found(prompts, ())
    if find_subjects is not False:
        with count_reporter("prompts looked through for subjects") as on_progress:
            found = naming.find_subjects(
                prompts,
                lambda: nouns.Nouns(_listed(ignore), adjectives),
                lambda prompt: find_subjects or naming.may_be_guided(prompt, wanted_methods),
                on_progress,
            )
        prompts = found.prompts
    if model:
        streams = load_streams(model, revision=revision, s3_endpoint=s3_endpoint)
        prompts = naming.with_token_indices(prompts, streams)
    rows = making.ManifestRows(prompts, wanted_seeds, wanted_methods)
    if found.places:
        show_found(found, show)
    else:
        first = range(min(show, len(prompts)))
        show_prompts(
            prompts, first, f"{counted(len(prompts), 'prompt')}{first_of(first, len(prompts))}:"
        )
    warn_of_unguidable(naming.unguidable(prompts, wanted_methods))
    warn_of_left_out(rows)
    if found.places:
        ask(f"Write {counted(len(rows), 'row')} with these subjects?", yes)
    write(output, rows, s3_endpoint)


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(";") if part.strip()]
