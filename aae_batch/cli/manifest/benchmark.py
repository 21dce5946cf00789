"""`aae-batch manifest benchmark`: write a manifest of the paper's prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from aae_batch.cli.common import complain
from aae_batch.cli.manifest.common import (
    METHODS_HELP,
    SEEDS_HELP,
    Force,
    Show,
    Target,
    TokenizerOf,
    show_prompts,
    warn_of_left_out,
    write,
)
from aae_batch.cli.options import settings_command


@settings_command()
def benchmark(
    output: Target,
    revision: str | None,
    plugin: str | None,
    s3_endpoint: str | None,
    prompt_set: Annotated[
        str,
        typer.Option(
            "--set",
            help="animals (66 prompts), animals-objects (144), objects (66), or all of these; for the "
            "embedded model shapes (10), coloured-shapes (240) or report-shapes (the 60 of those behind "
            "its reported figures).",
        ),
    ] = "all",
    seeds: Annotated[str, typer.Option(help=SEEDS_HELP)] = "64",
    methods: Annotated[str, typer.Option(help=METHODS_HELP)] = "both",
    prompts: Annotated[
        str | None,
        typer.Option(
            help="The authors' prompt file, JSON or one prompt per line, which gives the colours.",
            show_default="colours drawn by --colour-seed",
        ),
    ] = None,
    colour_seed: Annotated[int, typer.Option(help="Seed that draws the colours of objects.")] = 0,
    model: TokenizerOf = None,
    show: Show = 10,
    force: Force = False,
) -> None:
    """Write the manifest of Attend-and-Excite's own benchmark: 276 prompts of two subjects each.

    The paper does not print the random colours of its objects: --colour-seed draws them, unless
    --prompts gives the authors' file. The column set names the prompt set of each row.

    Examples:
    aae-batch manifest benchmark benchmark.parquet --set animals --seeds 8
    """
    from aae_batch.generate.settings import listed
    from aae_batch.manifest.build import benchmark as paper
    from aae_batch.manifest.build import rows as making
    from aae_batch.manifest.build.source import read_text
    from aae_batch.manifest.build.subjects import with_token_indices
    from aae_batch.methods import load_plugins
    from aae_batch.sampling.model.loading import load_streams

    load_plugins(listed(plugin))
    making.check_target(output, force, s3_endpoint)
    sets = paper.sets_of(prompt_set)
    official = paper.read_official(read_text(prompts, s3_endpoint)) if prompts else None
    chosen = paper.benchmark(sets, colour_seed, official)
    if model:
        streams = load_streams(model, revision=revision, s3_endpoint=s3_endpoint)
        chosen = with_token_indices(chosen, streams)
    rows = making.ManifestRows(chosen, making.parse_seeds(seeds), making.parse_methods(methods))
    for name, count in paper.missing(chosen, sets).items():
        complain(f"The file of prompts has {count} of the {paper.SIZES[name]} prompts of {name}.")
    first = range(0, len(chosen), max(1, -(-len(chosen) // show))) if show else range(0)
    show_prompts(chosen, first, f"{len(chosen)} prompts, {len(first)} of them:")
    warn_of_left_out(rows)
    write(output, rows, s3_endpoint)
