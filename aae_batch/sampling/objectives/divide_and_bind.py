"""Divide & Bind (Li et al., BMVC 2023, arXiv 2307.10864, section 4).

    L = -min_n TV(G * A_n) + mean_(m, n) JSD(softmax(G * A_m), softmax(G * A_n))

`A` are maps after the softmax over words, `G` is the blur of Attend-and-Excite, the softmax here is
over places, `n` is the noun of each subject and `m` a modifier of `n`. Total variation rewards a map that is bright in some places and dark in others, and so several
places for several objects; the divergence binds a modifier `m` to its noun `n`.

The published thresholds (.05, .2, .3) apply to the mean over neighbours, not the sum. The authors'
code compares each row of a map with its last row; here, as in the paper, each row is compared with
the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aae_batch.sampling.objectives.maps import divergence, smooth
from aae_batch.sampling.objectives.seen import Seen


def divide_and_bind(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return the loss, and the smallest total variation of any subject."""
    words = smooth(seen.word_maps)
    variation = total_variation(words)
    at_least = variation.masked_fill(~seen.is_head, torch.inf).amin(dim=1)
    over_places = words.flatten(2).softmax(dim=2).view_as(words)
    pairs = torch.stack(torch.broadcast_tensors(over_places[:, :, None], over_places[:, None]), 3)
    apart = divergence(pairs, torch.ones_like(pairs[..., 0, 0], dtype=torch.bool))
    count = seen.modifies.sum(dim=(1, 2)).clamp_min(1)
    bound = (apart * seen.modifies).sum(dim=(1, 2)) / count
    return bound - at_least, at_least


def total_variation(maps: Tensor) -> Tensor:
    """Return the mean absolute difference between neighbours, across plus down: [..., height,
    width] -> [...]."""
    across = maps.diff(dim=-1).abs().mean(dim=(-2, -1))
    return across + maps.diff(dim=-2).abs().mean(dim=(-2, -1))
