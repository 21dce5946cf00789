"""The interface of objectives: what they receive from a forward, and what they return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from aae_batch.sampling.objectives.maps import (
    Pooling,
    excitation,
    membership,
    on_device,
    pool,
    smooth,
)
from aae_batch.sampling.words import Subject


@dataclass(frozen=True, eq=False)
class Seen:
    """What one forward shows of some samples (`rows`). Everything is differentiable in the latents.

    Subjects and their words are padded to the largest number in any row; `is_subject` and `is_word`
    are False for padding, whose maps are 0.

    Attributes:
        maps: [rows, height, width, tokens], raw cross-attention, the mean over heads and layers. With
            joint attention, 0 at tokens that compete in no row.
        words: `maps` after the softmax over words, as in Attend-and-Excite.
        prompt: [rows, tokens], True at the positions of the prompt's words.
        subjects: per row, its subjects, each with its head and its modifiers.
        pooling: how the maps of several tokens become one.
        steps: per row, the denoising step.
        memory: per row, what the objective keeps between forwards of the sample.
        affinity: [rows, places, places], self-attention between the maps' places, in row-major
            order; None unless the method needs it.
    """

    maps: Tensor
    words: Tensor
    prompt: Tensor
    subjects: Sequence[Sequence[Subject]]
    pooling: Pooling
    steps: Sequence[int]
    memory: Sequence[dict[str, Any]]
    affinity: Tensor | None = None

    def split(self, sizes: Sequence[int], affinities: Sequence[Tensor | None]) -> list[Seen]:
        """Split into consecutive groups of rows, each with its own affinity.

        Values already computed for all rows are split, not recomputed. Padding stays the same.
        """
        parts, start = [], 0
        whole = (self.maps.split(list(sizes)), self.words.split(list(sizes)), sizes, affinities)
        for maps, words, size, affinity in zip(*whole, strict=True):
            some = slice(start, start + size)
            part = replace(
                self,
                maps=maps,
                words=words,
                prompt=self.prompt[some],
                subjects=self.subjects[some],
                steps=self.steps[some],
                memory=self.memory[some],
                affinity=affinity,
            )
            parts.append(part)
            start += size
        for name in _SHARED:
            if name in vars(self):
                of_all = vars(self)[name]
                pieces = (
                    of_all.split(list(sizes))
                    if isinstance(of_all, Tensor)
                    else [of_all] * len(parts)
                )
                for part, piece in zip(parts, pieces, strict=True):
                    vars(part)[name] = piece
        return parts

    # --- subjects: [rows, subjects, ...] ---

    @cached_property
    def most_subjects(self) -> int:
        return max(map(len, self.subjects))

    @cached_property
    def is_subject(self) -> Tensor:
        """[rows, subjects]"""
        there = [[i < len(some) for i in range(self.most_subjects)] for some in self.subjects]
        return on_device(there, self.maps.device)

    @cached_property
    def subject_tokens(self) -> Tensor:
        """[rows, subjects, tokens] of 0 and 1: which tokens belong to each subject."""
        places = [[subject.token_indices for subject in some] for some in self.subjects]
        return membership(places, self.most_subjects, self.maps.shape[-1], self.maps)

    @cached_property
    def subject_maps(self) -> Tensor:
        """Pooled maps of each subject's tokens after the softmax over words:
        [rows, subjects, height, width]."""
        return pool(self.words, self.subject_tokens, self.pooling)

    @cached_property
    def smoothed(self) -> Tensor:
        """`subject_maps`, blurred."""
        return smooth(self.subject_maps)

    @cached_property
    def excitations(self) -> Tensor:
        """The strongest attention of each subject at any place: [rows, subjects]."""
        return excitation(self.smoothed)

    @cached_property
    def least_excitation(self) -> Tensor:
        """The excitation of the most neglected subject: [rows]."""
        return self.excitations.masked_fill(~self.is_subject, torch.inf).amin(dim=1)

    # --- words of subjects, each subject's modifiers and then its head: [rows, words, ...] ---

    @cached_property
    def most_words(self) -> int:
        return max(map(len, self._word_places))

    @property
    def _word_places(self) -> list[list[tuple[int, ...]]]:
        return [
            [place for subject in some for place in (*subject.modifiers, subject.head)]
            for some in self.subjects
        ]

    @cached_property
    def word_tokens(self) -> Tensor:
        """[rows, words, tokens] of 0 and 1: which tokens belong to each word."""
        return membership(self._word_places, self.most_words, self.maps.shape[-1], self.maps)

    @cached_property
    def word_maps(self) -> Tensor:
        """Pooled maps of the subjects' words after the softmax over all words:
        [rows, words, height, width]."""
        return pool(self.words, self.word_tokens, self.pooling)

    @cached_property
    def raw_word_maps(self) -> Tensor:
        """Pooled raw maps of the subjects' words, from `maps`: [rows, words, height, width]."""
        return pool(self.maps, self.word_tokens, self.pooling)

    @cached_property
    def owner(self) -> Tensor:
        """[rows, words], the subject of each word; -1 for padding."""
        owners = [
            [s for s, one in enumerate(some) for _ in (*one.modifiers, one.head)]
            for some in self.subjects
        ]
        return self._padded(owners, -1)

    @cached_property
    def is_head(self) -> Tensor:
        """[rows, words]"""
        heads = [
            [is_head for one in some for is_head in (*[False] * len(one.modifiers), True)]
            for some in self.subjects
        ]
        return self._padded(heads, False)

    @cached_property
    def is_word(self) -> Tensor:
        """[rows, words]"""
        return self.owner >= 0

    @cached_property
    def modifies(self) -> Tensor:
        """[rows, words, words], True if the first word modifies the second: both belong to one
        subject, and only the second is its head."""
        same = (self.owner[:, :, None] == self.owner[:, None, :]) & self.is_word[:, :, None]
        return same & ~self.is_head[:, :, None] & self.is_head[:, None, :]

    def _padded(self, lists: list[list[Any]], filler: Any) -> Tensor:
        whole = [[*some, *[filler] * (self.most_words - len(some))] for some in lists]
        return on_device(whole, self.maps.device)


_SHARED = ("most_subjects", "subject_maps", "smoothed", "excitations")
"""Properties computed once for all rows, which `split` passes on."""


class Objective(Protocol):
    """A guidance objective."""

    def __call__(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Return each row's loss, which the latents are moved to reduce, and how far it has come:
        both [rows].

        A step with a threshold refines while the second value is below it. No row's value may
        depend on another's.
        """
        ...
