"""What is said of the subjects of prompts before they become rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from aae_batch.errors import ManifestError, RowError
from aae_batch.manifest.build.prompt import Prompt, Prompts
from aae_batch.methods import METHODS
from aae_batch.request import Request
from aae_batch.sampling.words import Tokenizer, noun_phrase, resolve_subjects


@dataclass(frozen=True)
class Found:
    """Prompts with the subjects that were found for those that had none, and the places of these."""

    prompts: Prompts
    places: tuple[int, ...]

    def with_fewer_than(self, number: int) -> int:
        """In how many of these prompts fewer subjects were found."""
        return sum(len(self.prompts.prompts[i].subjects or ()) < number for i in self.places)


def may_be_guided(prompt: Prompt, methods: Sequence[str]) -> bool:
    """Whether some row of a prompt must have subjects; one of no method, which the run decides, may.

    Args:
        methods: of every prompt; empty for that of its table.
    """
    named: Sequence[str | None] = methods or [prompt.settings.get("method")]
    return any(method not in METHODS or METHODS[method].least_subjects > 0 for method in named)


def suits(method: str, prompt: Prompt) -> bool:
    """Whether a prompt's subjects are enough for a method. One without subjects is left as it is, and will
    be told of."""
    needs = METHODS[method]
    named = prompt.subjects or prompt.token_indices
    if not named:
        return True
    if len(named) < needs.least_subjects:
        return False
    if "modifiers" not in needs.needs or prompt.subjects is None:
        return True
    return any(len(noun_phrase(subject.split())) > 1 for subject in prompt.subjects)


def unguidable(prompts: Prompts, methods: Sequence[str]) -> int:
    """How many prompts have no subject and a row that must have one."""
    return sum(
        not (prompt.subjects or prompt.token_indices) and may_be_guided(prompt, methods)
        for prompt in prompts.prompts
    )


def find_subjects(
    prompts: Prompts,
    finder: Callable[[], Callable[[str], tuple[str, ...]]],
    wanted: Callable[[Prompt], bool] = lambda prompt: True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """Look for subjects in the prompts that have none given. One without is left as it was.

    Args:
        finder: makes what finds the subjects of a text; called only if some prompt needs it.
        wanted: whether to look in such a prompt.
    """
    some = list(prompts.prompts)
    places = tuple(i for i, p in enumerate(some) if not p.has_subjects and wanted(p))
    find = cache(finder()) if places else None  # a table may have a prompt in many rows
    for done, i in enumerate(places, 1):
        some[i] = replace(some[i], subjects=find(some[i].text) or None)  # type: ignore[misc]
        on_progress(done, len(places))
    return Found(replace(prompts, prompts=some), places)


def with_token_indices(prompts: Prompts, tokenizer: Tokenizer) -> Prompts:
    """Add the positions of the subjects' tokens.

    Raises:
        ManifestError: a subject is not in its prompt, or is cut off.
    """
    indexed = []
    for prompt in prompts.prompts:
        request = Request(prompt.text, prompt.subjects, prompt.token_indices)
        try:
            subjects = resolve_subjects(tokenizer, request)
        except RowError as error:
            raise ManifestError(f"Prompt {prompt.text!r}: {error.reason}.") from None
        indices = tuple(subject.token_indices for subject in subjects)
        indexed.append(replace(prompt, token_indices=indices or None))
    return replace(prompts, prompts=indexed)
