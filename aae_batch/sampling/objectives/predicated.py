"""Predicated Diffusion (Sueyoshi and Matsubara, CVPR 2024, arXiv 2311.16117, section 3).

    L = mean_n -log(1 - prod_xy (1 - A_n))                                       there is an n
      + mean_(m, n) -log[(1 - A_m (1 - A_n)) (1 - A_n (1 - A_m))]                where m is, n is, and back
      + 0.3 mean_(m, k) -log(1 - A_m A_k)                                        m is not where k is

Maps are taken as how true it is that something is in a place, and the loss is how surprising the prompt is:
`n` runs over the nouns of all subjects, `m` over the modifiers of `n`, `k` over the other nouns. The last two are means
over the places as well, so that they do not grow with the size of the maps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aae_batch.sampling.objectives.seen import Seen

LEAKAGE = 0.3


def predicated(seen: Seen) -> tuple[Tensor, Tensor]:
    """The loss, and e^-loss: how true the prompt is."""
    words = seen.of_words(seen.words).flatten(2)
    words = words.clamp_max(1 - torch.finfo(words.dtype).eps)
    modifies, head = seen.modifies, seen.is_head

    nowhere = torch.log1p(-words).sum(dim=2).clamp_max(-torch.finfo(words.dtype).tiny)
    missing = -torch.log(-torch.expm1(nowhere))
    existence = (missing * head).sum(dim=1) / head.sum(dim=1)

    m, n = words[:, :, None], words[:, None]
    both_ways = -(torch.log1p(-m * (1 - n)) + torch.log1p(-n * (1 - m))).mean(dim=3)
    leaks = -torch.log1p(-m * n).mean(dim=3)
    modifier = seen.is_word & ~head
    elsewhere = modifier[:, :, None] & head[:, None, :] & ~modifies
    loss = existence + _mean(both_ways, modifies) + LEAKAGE * _mean(leaks, elsewhere)
    return loss, torch.exp(-loss)


def _mean(values: Tensor, some: Tensor) -> Tensor:
    """Over the pairs that count, [rows]; 0 where there are none."""
    return (values * some).sum(dim=(1, 2)) / some.sum(dim=(1, 2)).clamp_min(1)
