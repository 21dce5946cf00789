"""Resolve a request: merge its overrides with the run's settings, find its subjects, or say why
not.

These are all the checks that need no model, shared by the engine and by everything that checks rows
beforehand. Their order decides which error a request gets.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from aae_batch.columns import NAMES, OVERRIDES
from aae_batch.errors import PromptError, RequestError, SettingsError, SubjectError
from aae_batch.manifest.row import is_missing, read_values
from aae_batch.methods import BASELINE, METHODS
from aae_batch.request import Request
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.families import SIZES, STABLE_DIFFUSION, Family, Sizes
from aae_batch.sampling.words import Reads, Subject, resolve_subjects, why_unknown


def as_read(request: Request) -> Request:
    """Return a request with Python's own values of the types that `Request` names, whatever types
    tables and arrays gave them: what a manifest's column may hold, a request may.

    Raises:
        RequestError: a value does not stand for one of the right type.
    """
    values = {name: _plain(getattr(request, name)) for name in NAMES}
    given = {name: value for name, value in values.items() if not is_missing(value)}
    row = str(given.pop("id")) if "id" in given else repr(request.prompt)
    read, unfit = read_values(given)
    if "prompt" not in given:
        unfit["prompt"] = f"is {request.prompt}; write what the image shows"
    if unfit:
        raise RequestError(row, "; ".join(f"{name}: {reason}" for name, reason in unfit.items()))
    return Request(id=row, **read)


def _plain(value: Any) -> Any:
    """Return a value of NumPy, PyTorch, Arrow or pandas as Python's own: None for a missing one, a list
    for any sequence or set."""
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' is not imported for this
        return None
    for convert in ("as_py", "tolist", "to_pylist", "to_list"):
        if hasattr(value, convert):
            value = getattr(value, convert)()
            break
    if isinstance(value, Set):
        value = sorted(value, key=str)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return [_plain(one) for one in value]
    return value


def resolve(
    request: Request,
    config: GuidanceConfig,
    reads: Reads,
    family: Family,
    sizes: Sizes,
) -> tuple[GuidanceConfig, tuple[Subject, ...]]:
    """Return a request's settings and subjects.

    Args:
        config: the run's settings.
        reads: how the model reads prompts.
        family: the model's.
        sizes: of images that the model can make.

    Raises:
        RowError: the request cannot be sampled.
    """
    settings = settings_of(request, config, family, sizes)
    return settings, subjects_of(request, settings.method, reads)


def overridden(request: Request, config: GuidanceConfig) -> dict[str, Any]:
    """Return the settings that a request may override: its own values, else the run's.

    Only None means that the request has no value of its own: 0 and an empty text count.
    """
    return {
        name: getattr(config, name) if (own := getattr(request, name)) is None else own
        for name in OVERRIDES
    }


def settings_of(
    request: Request,
    config: GuidanceConfig,
    family: Family = STABLE_DIFFUSION,
    sizes: Sizes = SIZES,
) -> GuidanceConfig:
    """Return the settings that a request is sampled with.

    Raises:
        RequestError: a setting is out of range, or height, width or the method does not fit the
            model.
    """
    try:
        settings = config.updated(**overridden(request, config))
    except SettingsError as error:
        raise RequestError(request.name, str(error)) from error
    for name, pixels in {"height": settings.height, "width": settings.width}.items():
        if pixels is not None and (wrong := sizes.why_not(name, pixels)):
            raise RequestError(request.name, wrong)
    method = METHODS[settings.method]
    if method.is_guided and settings.steering().update == "velocity" and not family.is_flow:
        raise RequestError(
            request.name,
            f"update is velocity, which {family.name} does not predict; set it to latents",
        )
    if method.texts == "phrases" and not family.has_cross_attention:
        raise RequestError(
            request.name,
            f"method {settings.method} needs cross-attention with values of its own, which "
            f"{family.name} does not have; set another method",
        )
    return settings


def subjects_of(request: Request, method: str, reads: Reads) -> tuple[Subject, ...]:
    """Return the subjects of a request with their token positions; empty if it names none.

    Raises:
        PromptError: the prompt is empty or has words that the model does not know, or the method is
            guided and the request names no subject.
        RequestError: the negative prompt has such words.
        SubjectError: a subject is not in the prompt, an index does not point at a word, or the
            method needs other subjects.
    """
    subjects = resolve_subjects(reads, request)
    needs = METHODS[method]
    if needs.least_subjects and not subjects:
        raise PromptError(
            request.name,
            f"no subject is named; give subjects or token_indices, or set method to '{BASELINE}'",
        )
    if len(subjects) < needs.least_subjects:
        raise SubjectError(
            request.name,
            f"method {method} needs {needs.least_subjects} subjects or more, and {len(subjects)} is named; "
            "name another, or set another method",
        )
    if "modifiers" in needs.needs and not any(subject.modifiers for subject in subjects):
        raise SubjectError(
            request.name,
            f"method {method} needs a subject with an adjective or another word before its noun, such as "
            "'red circle'; name one so, or set another method",
        )
    return subjects


def why_ignored(settings: GuidanceConfig, family: Family) -> str | None:
    """Return why a row's negative prompt has no effect, else None. Composed conjuncts have one
    always."""
    if not settings.negative_prompt or family.rows(settings) > 1:
        return None
    if METHODS[settings.method].texts == "conjuncts":
        return None
    scale = "true_cfg_scale" if family.is_guidance_embedded else "guidance_scale"
    return f"is ignored without classifier-free guidance; set {scale} above 1, or leave it out"


def check_settings(reads: Reads, config: GuidanceConfig) -> None:
    """Check the run's negative prompt.

    Raises:
        SettingsError: it has words that the model does not know.
    """
    if config.negative_prompt and (unknown := why_unknown(reads, config.negative_prompt)):
        raise SettingsError(f"negative_prompt {unknown}.")
