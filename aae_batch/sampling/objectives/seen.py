"""What an objective is given of the samples that it guides, in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from aae_batch.sampling.objectives.maps import Pooling, excitation, pool, smooth
from aae_batch.sampling.words import Subject


@dataclass(frozen=True, eq=False)
class Seen:
    """Some samples, `rows` of them, in one forward. Everything is differentiable in the latents.

    Subjects and their words are padded to the most that one sample has; `is_subject` and `is_word` say
    which are there. Maps of what is not there are 0.

    Attributes:
        maps: [rows, height, width, tokens], cross-attention as it is, the mean over heads and layers.
        words: the same after the softmax over words, as Attend-and-Excite takes it.
        ends: per row, the position of the end token, at which the words of the prompt end.
        subjects: per row, its subjects, each with its head and its modifiers.
        pooling: how the maps of several tokens become one.
        steps: per row, the denoising step.
        memory: per row, what the objective has kept of earlier forwards of the sample.
        affinity: [rows, places, places], self-attention between the places of the maps, row by row;
            None unless the method needs it.
    """

    maps: Tensor
    words: Tensor
    ends: Sequence[int]
    subjects: Sequence[Sequence[Subject]]
    pooling: Pooling
    steps: Sequence[int]
    memory: Sequence[dict[str, Any]]
    affinity: Tensor | None = None

    def rows(self, start: int, stop: int, affinity: Tensor | None = None) -> Seen:
        """Some of the rows, with their affinity. What has been made of all of them is not made again."""
        some = slice(start, stop)
        if (start, stop) == (0, len(self.ends)):
            part = replace(self, affinity=affinity)
        else:
            part = Seen(
                self.maps[some],
                self.words[some],
                self.ends[some],
                self.subjects[some],
                self.pooling,
                self.steps[some],
                self.memory[some],
                affinity,
            )
        most = max(map(len, part.subjects))
        for name in ("subject_maps", "smoothed", "excitations"):
            if name in vars(self):
                vars(part)[name] = vars(self)[name][some, :most]
        return part

    # --- subjects: [rows, subjects, ...] ---

    @cached_property
    def is_subject(self) -> Tensor:
        """[rows, subjects]"""
        most = max(map(len, self.subjects))
        there = [[i < len(subjects) for i in range(most)] for subjects in self.subjects]
        return torch.tensor(there, device=self.maps.device)

    @cached_property
    def subject_maps(self) -> Tensor:
        """Of all tokens of each subject, after the softmax over words: [rows, subjects, height, width]."""
        places = [[subject.token_indices for subject in some] for some in self.subjects]
        return pool(self.words, places, self.pooling)

    @cached_property
    def smoothed(self) -> Tensor:
        """`subject_maps`, blurred."""
        return smooth(self.subject_maps)

    @cached_property
    def excitations(self) -> Tensor:
        """How strongly each subject is attended to at its best place: [rows, subjects]."""
        return excitation(self.smoothed)

    @cached_property
    def least_excitation(self) -> Tensor:
        """That of the most neglected subject: [rows]."""
        return self.excitations.masked_fill(~self.is_subject, torch.inf).amin(dim=1)

    # --- words of subjects, each subject's modifiers and then its head: [rows, words, ...] ---

    @cached_property
    def _word_places(self) -> list[list[tuple[int, ...]]]:
        return [
            [place for subject in some for place in (*subject.modifiers, subject.head)]
            for some in self.subjects
        ]

    def of_words(self, maps: Tensor) -> Tensor:
        """The maps of the subjects' words, [rows, words, height, width], out of [rows, height, width, tokens]."""
        return pool(maps, self._word_places, self.pooling)

    @cached_property
    def owner(self) -> Tensor:
        """[rows, words], the subject that each word belongs to; -1 where there is no word."""
        owners = [
            list(chain.from_iterable([s] * (len(one.modifiers) + 1) for s, one in enumerate(some)))
            for some in self.subjects
        ]
        return self._padded(owners, -1)

    @cached_property
    def is_head(self) -> Tensor:
        """[rows, words]"""
        heads = [
            list(chain.from_iterable((*[False] * len(one.modifiers), True) for one in some))
            for some in self.subjects
        ]
        return self._padded(heads, False)

    @cached_property
    def is_word(self) -> Tensor:
        """[rows, words]"""
        return self.owner >= 0

    @cached_property
    def modifies(self) -> Tensor:
        """[rows, words, words], whether the first modifies the second: it is of the same subject, whose head
        the second is."""
        same = (self.owner[:, :, None] == self.owner[:, None, :]) & self.is_word[:, :, None]
        return same & ~self.is_head[:, :, None] & self.is_head[:, None, :]

    def _padded(self, lists: list[list[Any]], filler: Any) -> Tensor:
        most = max(map(len, lists))
        whole = [[*some, *[filler] * (most - len(some))] for some in lists]
        return torch.tensor(whole, device=self.maps.device)


class Objective(Protocol):
    """What latents are moved down."""

    def __call__(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """The loss of each row, and how far it has come: both [rows]. A step with a threshold refines while
        the second is below it. No row's value may depend on another's."""
        ...
