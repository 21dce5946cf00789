"""The losses of the guidance methods as their papers write them, over one picture's maps in plain loops.

Each takes cross-attention [height, width, tokens], self-attention [places, places], the step, and what is asked
for, and returns the loss and what it has reached of its threshold. Like `oracle.py` this knows nothing of
`aae_batch`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests import oracle
from tests.oracle import blur, compete, pool


@dataclass(frozen=True)
class Phrase:
    """A subject: positions of its noun, and of each of its modifiers."""

    noun: tuple[int, ...]
    modifiers: tuple[tuple[int, ...], ...] = ()

    @property
    def words(self) -> list[tuple[int, ...]]:
        return [*self.modifiers, self.noun]

    @property
    def tokens(self) -> list[int]:
        return [token for word in self.words for token in word]


@dataclass(frozen=True)
class Asked:
    """What a picture is asked to show.

    Attributes:
        end: the position of the end token.
        words: the positions that compete in the softmax over words.
        pooling: "sum" or "max" over the tokens of a subject or a word.
        memory: the maps of each step, the last ones that were seen of it.
        spoken: the positions of the prompt's words; empty for all from 1 to the end token.
    """

    subjects: Sequence[Phrase]
    end: int
    words: slice | list[int]
    pooling: str = "sum"
    memory: dict[int, list[tuple[int, Tensor]]] = field(default_factory=dict)
    spoken: Sequence[int] = ()

    def of_subjects(self, maps: Tensor) -> list[Tensor]:
        return [pool(maps, subject.tokens, self.pooling) for subject in self.subjects]

    def of_word(self, maps: Tensor, word: Sequence[int]) -> Tensor:
        return pool(maps, word, self.pooling)


def mean(values: list[Tensor]) -> Tensor:
    """0 of none."""
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


# --- Attend-and-Excite ---


def attend_and_excite(cross, affinity, step, asked: Asked) -> tuple[Tensor, Tensor]:
    subjects = [subject.tokens for subject in asked.subjects]
    return oracle.attend_and_excite(cross, affinity, step, subjects, asked.words, asked.pooling)


# --- Divide & Bind (Li et al., BMVC 2023, arXiv 2307.10864) ---


def divide_and_bind(cross, affinity, step, asked: Asked) -> tuple[Tensor, Tensor]:
    shares = compete(cross, asked.words)
    nouns = [asked.of_word(shares, subject.noun) for subject in asked.subjects]
    flattest = torch.stack([variation(blur(map)) for map in nouns]).min()
    apart = []
    for subject in asked.subjects:
        for modifier in subject.modifiers:
            p, q = (
                blur(asked.of_word(shares, word)).flatten().softmax(dim=0)
                for word in (modifier, subject.noun)
            )
            apart.append(jensen_shannon([p, q]))
    return mean(apart) - flattest, flattest


def variation(map: Tensor) -> Tensor:
    height, width = map.shape
    across = [(map[y, x + 1] - map[y, x]).abs() for y in range(height) for x in range(width - 1)]
    down = [(map[y + 1, x] - map[y, x]).abs() for y in range(height - 1) for x in range(width)]
    return mean(across) + mean(down)


def jensen_shannon(distributions: list[Tensor]) -> Tensor:
    middle = torch.stack(distributions).mean(dim=0)
    return mean([kullback_leibler(one, middle) for one in distributions])


def kullback_leibler(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


# --- SynGen (Rassin et al., NeurIPS 2023, arXiv 2306.08877) ---


def syngen(cross, affinity, step, asked: Asked) -> tuple[Tensor, Tensor]:
    def apart(some: Sequence[int], others: Sequence[int]) -> Tensor:
        p, q = (asked.of_word(cross, word) for word in (some, others))
        p, q = p / p.sum(), q / q.sum()
        return (kullback_leibler(p, q) + kullback_leibler(q, p)) / 2

    spoken = asked.spoken or range(1, asked.end)
    losses = []
    for subject in asked.subjects:
        outside = [token for token in spoken if token not in subject.tokens]
        for modifier in subject.modifiers:
            from_modifier = mean([apart(modifier, (token,)) for token in outside])
            from_noun = mean([apart(subject.noun, (token,)) for token in outside])
            losses.append(apart(modifier, subject.noun) - (from_modifier + from_noun) / 2)
    _, reached = attend_and_excite(cross, affinity, step, asked)
    return torch.stack(losses).sum(), reached


# --- CONFORM (Meral et al., CVPR 2024, arXiv 2312.06059) ---


def conform(cross, affinity, step, asked: Asked) -> tuple[Tensor, Tensor]:
    shares = compete(cross, asked.words)
    now = [
        (number, blur(asked.of_word(shares, word)).flatten())
        for number, subject in enumerate(asked.subjects)
        for word in subject.words
    ]
    asked.memory[step] = [(number, map.detach()) for number, map in now]
    maps = now + asked.memory.get(step - 1, [])
    losses = []
    for i, (of_anchor, anchor) in enumerate(maps):
        against = sum(
            (likeness(anchor, other) / 0.5).exp() for of, other in maps if of != of_anchor
        )
        for j, (of, positive) in enumerate(maps):
            if of == of_anchor and i != j:
                alike = (likeness(anchor, positive) / 0.5).exp()
                losses.append(-(alike / (alike + against)).log())
    loss = mean(losses) if losses else 0 * cross.sum()
    return loss, (-loss).exp()


def likeness(some: Tensor, other: Tensor) -> Tensor:
    return (some @ other) / (some.norm() * other.norm())


# --- InitNO (Guo et al., CVPR 2024, arXiv 2404.04650) ---


def initno(cross, affinity, step, asked: Asked) -> tuple[Tensor, Tensor]:
    maps = [blur(map) for map in asked.of_subjects(compete(cross, asked.words))]
    neglect = 1 - torch.stack([map.max() for map in maps]).min()
    regions = [blur(affinity[map.argmax()].view_as(map)) for map in maps]
    conflicts = [
        torch.minimum(some, other).sum() / (some + other).sum()
        for i, some in enumerate(regions)
        for other in regions[:i]
    ]
    conflict = mean(conflicts)
    return neglect + conflict, on_the_way(neglect, conflict)


def on_the_way(neglect: Tensor, conflict: Tensor) -> Tensor:
    """1 where both are 0, and 0.8 where the first is 0.2 or the second 0.3, whichever is further off."""
    return 1 - 0.2 * torch.maximum(neglect / 0.2, conflict / 0.3)


# --- Self-Cross guidance (Qiu et al., CVPR 2025, arXiv 2411.18936) ---


def self_cross(cross, affinity, step, asked: Asked) -> tuple[Tensor, Tensor]:
    maps = [blur(map).flatten() for map in asked.of_subjects(compete(cross, asked.words))]
    neglect = 1 - torch.stack([map.max() for map in maps]).min()
    conflicts = []
    for i, some in enumerate(maps):
        threshold = otsu(some.tolist())
        bright = [place for place in range(len(some)) if some[place] > threshold]
        region = sum(some[place] * affinity[place] for place in bright)
        region = region / sum(some[place] for place in bright)
        for j, other in enumerate(maps):
            if i != j:
                conflicts.append(torch.minimum(region, other / other.sum()).sum())
    conflict = mean(conflicts)
    return neglect + conflict, on_the_way(neglect, conflict)


def otsu(values: list[float]) -> float:
    """The threshold between whose sides the variance is largest (Otsu 1979)."""
    best, threshold = -math.inf, math.nan
    for one in sorted(set(values))[:-1]:
        dark = [value for value in values if value <= one]
        bright = [value for value in values if value > one]
        gap = sum(bright) / len(bright) - sum(dark) / len(dark)
        between = len(dark) * len(bright) * gap**2
        if between > best:
            best, threshold = between, one
    return threshold


# --- FOCUS (Bill et al. 2025, arXiv 2510.02315) ---


def focus(cross, affinity, step, asked: Asked) -> tuple[Tensor, Tensor]:
    def distribution(map: Tensor) -> Tensor:
        cubed = blur(map, sigma=math.sqrt(0.5)) ** 3
        return (cubed / cubed.sum()).flatten()

    def apart(maps: list[Tensor]) -> Tensor:
        if len(maps) < 2:
            return torch.zeros((), dtype=torch.float64)
        return jensen_shannon([distribution(map) for map in maps]) / math.log(len(maps))

    words = [[asked.of_word(cross, word) for word in subject.words] for subject in asked.subjects]
    within = mean([apart(maps) for maps in words if len(maps) > 1])
    between = apart([sum(maps) / len(maps) for maps in words])
    loss = (within + 1 - between) / 2
    return loss, 1 - loss


# --- Predicated Diffusion (Sueyoshi and Matsubara, CVPR 2024, arXiv 2311.16117) ---


def predicated(cross, affinity, step, asked: Asked) -> tuple[Tensor, Tensor]:
    shares = compete(cross, asked.words)

    def truth(word) -> Tensor:
        map = asked.of_word(cross, word)
        return ((map - map.min()) / (map.max() - map.min())).clamp(max=0.999)

    there, bound, leaks = [], [], []
    for subject in asked.subjects:
        noun = asked.of_word(shares, subject.noun).clamp(max=0.999)
        there.append(-(1 - (1 - noun).prod() ** (1 / noun.numel())).log())
        noun = truth(subject.noun)
        for modifier in subject.modifiers:
            own = truth(modifier)
            bound.append(-((1 - own * (1 - noun)) * (1 - noun * (1 - own))).log().mean())
            others = [other.noun for other in asked.subjects if other is not subject]
            elsewhere = [truth(noun) for noun in others]
            leaks += [-(1 - own * other).log().mean() for other in elsewhere]
    loss = 0.1 * mean(there) + mean(bound) + 0.3 * mean(leaks)
    return loss, (-loss).exp()


LOSSES = {
    "attend-and-excite": attend_and_excite,
    "divide-and-bind": divide_and_bind,
    "syngen": syngen,
    "conform": conform,
    "initno": initno,
    "self-cross": self_cross,
    "focus": focus,
    "predicated": predicated,
}
