"""`aae-batch tokens`: print the tokens of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from aae_batch.cli.options import settings_command

if TYPE_CHECKING:
    from aae_batch.sampling.words import Token


@settings_command()
def tokens(
    prompt: Annotated[str, typer.Argument(help="The prompt text.")],
    model: str,
    max_sequence_length: int | None,
    revision: str | None,
    s3_endpoint: str | None,
) -> None:
    """Print how a model's tokenizers split PROMPT, with the positions for token_indices.

    Examples:
    aae-batch tokens "a cat and a frog" --model stabilityai/stable-diffusion-xl-base-1.0
    """
    from rich.console import Console
    from rich.table import Table

    from aae_batch.cli.terminal import waiting
    from aae_batch.sampling.model.loading import load_streams
    from aae_batch.sampling.words import token_tables

    with waiting("loading the tokenizer"):
        streams = load_streams(
            model, max_sequence_length, revision=revision, s3_endpoint=s3_endpoint
        )
        tables = token_tables(streams, prompt)
    for stream in tables:
        table = Table("index", "token", "can be guided", box=None, pad_edge=False)
        for token in stream.tokens:
            why = _why_not(token)
            table.add_row(str(token.index), token.text, f"no: {why}" if why else "yes")
        if len(tables) > 1:
            print(f"{stream.name}:")
        Console(highlight=False, markup=False).print(table)


def _why_not(token: Token) -> str | None:
    """Return why a token alone is no subject, else None."""
    if token.kind != "word":
        return _KINDS[token.kind]
    if token.is_unknown:
        return "the model does not know these letters"
    return "the space before a word" if token.start == token.stop else None


_KINDS = {
    "start": "start token",
    "end": "end token",
    "truncated": "cut off, the model never sees it",
}
