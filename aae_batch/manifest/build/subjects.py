"""Finds and checks the subjects of prompts before rows are built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from aae_batch.errors import ManifestError, RowError
from aae_batch.manifest.build.prompt import Prompt, Prompts
from aae_batch.methods import METHODS
from aae_batch.request import Request
from aae_batch.sampling.words import (
    Reads,
    noun_phrase,
    places_of,
    plainly_named,
    resolve_subjects,
    streams_of,
)


@dataclass(frozen=True)
class Found:
    """Prompts with the subjects found, and the positions of the prompts that were searched."""

    prompts: Prompts
    places: tuple[int, ...]

    def with_fewer_than(self, number: int) -> int:
        """Return how many of the searched prompts have fewer subjects than `number`."""
        return sum(len(self.prompts.prompts[i].subjects or ()) < number for i in self.places)


def may_be_guided(prompt: Prompt, methods: Sequence[str]) -> bool:
    """Return whether any row of a prompt may need subjects. A row without a method may, since the run
    decides its method.

    Args:
        methods: the methods of every prompt; empty to use the prompt's own.
    """
    named: Sequence[str | None] = methods or [prompt.settings.get("method")]
    return any(method not in METHODS or METHODS[method].least_subjects > 0 for method in named)


def suits(method: str, prompt: Prompt) -> bool:
    """Return whether a prompt has the subjects and modifiers that a method needs. True for a prompt without
    subjects, which is reported separately."""
    needs = METHODS[method]
    named = prompt.subjects or prompt.token_indices
    if not named:
        return True
    if len(named) < needs.least_subjects:
        return False
    if "modifiers" not in needs.needs:
        return True
    if prompt.subjects is None:
        return any(len(positions) > 1 for positions in prompt.token_indices or ())
    return any(len(noun_phrase(subject.split())) > 1 for subject in prompt.subjects)


def unguidable(prompts: Prompts, methods: Sequence[str]) -> int:
    """Return how many prompts have no subjects although one of their rows may need them."""
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
    """Find subjects for the prompts that specify none. A prompt in which none are found is unchanged.

    Args:
        finder: returns the function that finds the subjects of a text; called only if a prompt needs it.
        wanted: whether to search a prompt.
    """
    some = list(prompts.prompts)
    places = tuple(i for i, p in enumerate(some) if not p.has_subjects and wanted(p))
    find = cache(finder()) if places else None  # a table may repeat a prompt in many rows
    for done, i in enumerate(places, 1):
        some[i] = replace(some[i], subjects=find(some[i].text) or None)  # type: ignore[misc]
        on_progress(done, len(places))
    return Found(replace(prompts, prompts=some), places)


def check_subjects(prompts: Prompts) -> None:
    """Check that each subject stands in its prompt, whatever tokenizer reads it.

    Raises:
        ManifestError: a subject does not.
    """
    for prompt in prompts.prompts:
        if prompt.subjects and not plainly_named(prompt.text, prompt.subjects):
            try:
                places_of(prompt.text, "", prompt.subjects)
            except RowError as error:
                raise _of(prompt, error) from None


def _of(prompt: Prompt, error: RowError) -> ManifestError:
    said = f"Prompt {prompt.text!r}: {error.reason}"
    return ManifestError(said if said.endswith("?") else f"{said}.")


def with_token_indices(prompts: Prompts, reads: Reads) -> Prompts:
    """Add the token positions of the subjects.

    Raises:
        ManifestError: a subject is not in its prompt, or is truncated.
    """
    indexed = []
    for prompt in prompts.prompts:
        request = Request(prompt.text, prompt.subjects, prompt.token_indices)
        try:
            subjects = resolve_subjects(reads, request)
        except RowError as error:
            raise _of(prompt, error) from None
        indices = tuple(subject.token_indices for subject in subjects)
        # With several streams a word has several positions, and rows are not taken by indices.
        one = len(streams_of(reads)) == 1
        indexed.append(replace(prompt, token_indices=indices or None) if one else prompt)
    return replace(prompts, prompts=indexed)
