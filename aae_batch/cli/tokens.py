"""`aae-batch tokens`: print the tokens of a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from aae_batch.cli.options import settings_command


@settings_command()
def tokens(
    prompt: Annotated[str, typer.Argument(help="The prompt text.")],
    model: str,
    revision: str | None,
    s3_endpoint: str | None,
) -> None:
    """Print how a model's tokenizer splits PROMPT, with the positions for token_indices."""
    from rich.console import Console
    from rich.table import Table

    from aae_batch.sampling.model.loading import load_tokenizer
    from aae_batch.sampling.words import token_table

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
