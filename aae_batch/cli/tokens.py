"""`aae-batch tokens`: print the tokens of a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from aae_batch.cli.options import settings_command


@settings_command()
def tokens(
    prompt: Annotated[str, typer.Argument(help="The prompt text.")],
    model: str,
    max_sequence_length: int | None,
    revision: str | None,
    s3_endpoint: str | None,
) -> None:
    """Print how a model's tokenizers split PROMPT, with the positions for token_indices."""
    from rich.console import Console
    from rich.table import Table

    from aae_batch.sampling.model.loading import load_streams
    from aae_batch.sampling.words import token_tables

    streams = load_streams(model, max_sequence_length, revision=revision, s3_endpoint=s3_endpoint)
    tables = token_tables(streams, prompt)
    for stream in tables:
        table = Table("index", "token", "can be guided", box=None, pad_edge=False)
        for token in stream.tokens:
            guidable = "yes" if token.kind == "word" else f"no: {_KINDS[token.kind]}"
            table.add_row(str(token.index), token.text, guidable)
        if len(tables) > 1:
            print(f"{stream.name}:")
        Console(highlight=False, markup=False).print(table)


_KINDS = {
    "start": "start token",
    "end": "end token",
    "truncated": "cut off, the model never sees it",
}
