"""`aae-batch manifest build`: a manifest from prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from aae_batch.cli.manifest.common import (
    METHODS_HELP,
    Force,
    Show,
    Target,
    TokenizerOf,
    ask,
    show_found,
    show_prompts,
    warn_of_left_out,
    warn_of_unguidable,
    write,
)
from aae_batch.cli.options import settings_command


@settings_command()
def build(
    source: Annotated[
        str,
        typer.Argument(
            help="Prompts: .txt, one on each line; .csv, .jsonl or .parquet with a column prompt, "
            "whose other columns are kept; or .yaml with lists for a template, and perhaps the "
            "template. A path or a URL."
        ),
    ],
    output: Target,
    revision: str | None,
    plugin: str | None,
    s3_endpoint: str | None,
    template: Annotated[
        str | None,
        typer.Option(
            help="A prompt with gaps for the lists of a .yaml: 'a {animal} and a {color} {object}'. "
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
            help="A row for each: 64 or 0:64 for 0 to 63, or 1,5,9.",
            show_default="one for each prompt, from its id",
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help=METHODS_HELP, show_default="as the run says")
    ] = None,
    find_subjects: Annotated[
        bool | None,
        typer.Option(
            "--find-subjects/--no-find-subjects",
            help="Where no subjects are given, take the nouns; needs the extra nlp.",
            show_default="where a row may be guided",
        ),
    ] = None,
    ignore: Annotated[
        str, typer.Option(help="Words that are never found as subjects, e.g. 'artstation;style'.")
    ] = "",
    adjectives: Annotated[
        bool,
        typer.Option(
            "--adjectives",
            help="Subjects that are found begin with their adjectives, 'red bird': syngen needs them, "
            "divide-and-bind, conform, focus and predicated use them.",
        ),
    ] = False,
    model: TokenizerOf = None,
    show: Show = 10,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Take the subjects that were found without asking.")
    ] = False,
    force: Force = False,
) -> None:
    """Make the manifest OUTPUT of the prompts in SOURCE: a row for each prompt, seed and method.

    Subjects that were found are shown first, and asked about.
    Exit codes: 0 written, 1 not wanted, 2 wrong command or input.
    """
    from aae_batch.cli.terminal import count_reporter
    from aae_batch.generate.settings import listed
    from aae_batch.manifest.build import nouns
    from aae_batch.manifest.build import rows as making
    from aae_batch.manifest.build import source as sources
    from aae_batch.manifest.build import subjects as naming
    from aae_batch.methods import load_plugins
    from aae_batch.sampling.model.loading import load_tokenizer

    load_plugins(listed(plugin))
    making.check_target(output, force, s3_endpoint)
    wanted_seeds = making.parse_seeds(seeds) if seeds else []
    wanted_methods = making.parse_methods(methods) if methods else []
    prompts = sources.read_prompts(source, template, _listed(subjects), s3_endpoint)
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
        tokenizer = load_tokenizer(model, revision=revision, s3_endpoint=s3_endpoint)
        prompts = naming.with_token_indices(prompts, tokenizer)
    rows = making.ManifestRows(prompts, wanted_seeds, wanted_methods)
    if found.places:
        show_found(found, show)
    else:
        first = range(min(show, len(prompts)))
        show_prompts(prompts, first, f"{len(prompts)} prompts, the first {len(first)}:")
    warn_of_unguidable(naming.unguidable(prompts, wanted_methods))
    warn_of_left_out(rows)
    if found.places:
        ask(f"Write {len(rows)} rows with these subjects?", yes)
    write(output, rows, s3_endpoint)


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(";") if part.strip()]
