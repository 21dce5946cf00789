"""CONFORM (Meral et al., CVPR 2024, arXiv 2312.06059, section 4).

    L = mean_(a, p) -log [ e^(s(a, p) / t) / (e^(s(a, p) / t) + sum_n e^(s(a, n) / t)) ],   t = 0.5

The maps of the words of one subject attract each other, and those of other subjects repel them:
`a` and `p` are two maps of one subject, in either order, `n` are those of the others, and `s` is the
cosine similarity of two maps after the softmax over words, blurred. From the second step on, the
previous step's maps take part as well, as constants: those of its last forward, before the step's
own update.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aae_batch.sampling.objectives.maps import on_device, smooth
from aae_batch.sampling.objectives.seen import Seen

TEMPERATURE = 0.5


def conform(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return the loss, and e^-loss: how surely a map is attributed to its own subject.

    The latter is 1 if no subject has two maps, as at the first step if all subjects are single
    words.
    """
    now = smooth(seen.word_maps).flatten(2)
    before, has_before = _before(seen, now)
    features = F.normalize(torch.cat([now, before], dim=1), dim=2, eps=1e-12)
    likeness = features @ features.mT / TEMPERATURE

    owner = torch.cat([seen.owner, seen.owner], dim=1)
    there = torch.cat([seen.is_word, seen.is_word & has_before[:, None]], dim=1)
    both = there[:, :, None] & there[:, None, :]
    same = owner[:, :, None] == owner[:, None, :]
    itself = torch.eye(owner.shape[1], dtype=torch.bool, device=owner.device)
    of_one, of_two = both & same & ~itself, both & ~same

    repelling = likeness.masked_fill(~of_two, -torch.inf).logsumexp(dim=2, keepdim=True)
    surprise = torch.logaddexp(likeness, repelling) - likeness
    loss = (surprise * of_one).sum(dim=(1, 2)) / of_one.sum(dim=(1, 2)).clamp_min(1)
    return loss, torch.exp(-loss)


def _before(seen: Seen, now: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's maps of the previous step, shaped like `now`, and which rows have any.

    Stores the current step's maps; the last ones stored for a step count.
    """
    before, has = torch.zeros_like(now), []
    for row, (memory, step) in enumerate(zip(seen.memory, seen.steps, strict=True)):
        words = sum(len(subject.modifiers) + 1 for subject in seen.subjects[row])
        earlier = _turned(memory, step, now[row, :words].detach())
        if earlier is not None:
            before[row, :words] = earlier
        has.append(earlier is not None)
    return before, on_device(has, now.device)


def _turned(memory: dict[str, Any], step: int, maps: Tensor) -> Tensor | None:
    """Store a step's maps and return those of the previous step."""
    if memory.get("step") != step:
        memory["before"], memory["step"] = memory.get("now"), step
    memory["now"] = maps
    return memory["before"]
