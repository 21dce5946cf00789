"""Whether a row can be sampled, found out without the model: the verdict that the engine will give.

The order is the engine's (`aae_batch.sampling.sample.admit`): what the row says, its size, its subjects.
"""

from __future__ import annotations

from aae_batch.errors import PromptError, RequestError, RowError, SettingsError
from aae_batch.manifest.row import Row
from aae_batch.request import Request
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.words import Tokenizer, resolve_subjects, why_unknown


def check_row(
    tokenizer: Tokenizer, row: Row, config: GuidanceConfig, vae_scale_factor: int = 8
) -> RowError | None:
    """What is wrong with a row of a manifest, or None.

    Args:
        config: the run's settings, where the row has none of its own.
        vae_scale_factor: pixels to a cell of the latents.
    """
    try:
        if row.error is not None:
            raise row.error
        check_size(row.request, config, vae_scale_factor)
        check_subjects(tokenizer, row.request, config)
    except RowError as error:
        return error
    return None


def check_size(request: Request, config: GuidanceConfig, vae_scale_factor: int) -> None:
    """Raises: RequestError: height or width does not fit the model."""
    for name in ("height", "width"):
        pixels = getattr(request, name) or getattr(config, name)
        if pixels is not None and (pixels % vae_scale_factor or pixels < 4 * vae_scale_factor):
            raise RequestError(
                request.name,
                f"{name} is {pixels}; it must be a multiple of {vae_scale_factor}, and at least "
                f"{4 * vae_scale_factor}",
            )


def check_settings(tokenizer: Tokenizer, config: GuidanceConfig) -> None:
    """Raises: SettingsError: the run's negative prompt has words that the model does not know."""
    if config.negative_prompt and (unknown := why_unknown(tokenizer, config.negative_prompt)):
        raise SettingsError(f"negative_prompt {unknown}.")


def check_subjects(tokenizer: Tokenizer, request: Request, config: GuidanceConfig) -> int:
    """How many subjects a request has.

    Raises:
        PromptError: the prompt is empty or has words that the model does not know, or nothing is named in
            a request to be guided.
        RequestError: the negative prompt has such words.
        SubjectError: a subject is not in the prompt, or an index does not point at a word.
    """
    subjects = resolve_subjects(tokenizer, request)
    if (request.method or config.method) == "attend-and-excite" and not subjects:
        raise PromptError(
            request.name,
            "no subject is named; give subjects or token_indices, or set method to "
            "'stable-diffusion'",
        )
    return len(subjects)
