"""Predicated Diffusion (Sueyoshi and Matsubara, CVPR 2024, arXiv 2311.16117, section 3).

    L = 0.1 mean_n -log(1 - (prod_xy (1 - A_n))^(1 / places))                  there is an n +
      mean_(m, n) -log[(1 - B_m (1 - B_n)) (1 - B_n (1 - B_m))]              where m is, n is, and
      back + 0.3 mean_(m, k) -log(1 - B_m B_k)                                      m is not where k
      is

A map's value is the truth of something being in a place, and the loss is how surprising the prompt
is. `n` runs over the nouns of all subjects, `m` over the modifiers of `n`, `k` over the other
nouns. `A` is a map after the softmax over words; `B` is a raw cross-attention map, scaled to lie
between 0 and 1. Truth is capped at 0.999 to bound the gradient.

Where the paper has a product over the places, this uses their geometric mean, as in the authors'
code; the last two terms are means over the places as well. Without it the first proposition is true
of nearly every map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aae_batch.sampling.objectives.seen import Seen

EXISTENCE, LEAKAGE = 0.1, 0.3
SUREST = 0.999


def predicated(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return the loss, and e^-loss: how true the prompt is."""
    head, modifies = seen.is_head, seen.modifies
    nowhere = torch.log1p(-seen.word_maps.flatten(2).clamp_max(SUREST)).mean(dim=2)
    missing = -torch.log(-torch.expm1(nowhere.clamp_max(-torch.finfo(nowhere.dtype).tiny)))
    existence = (missing * head).sum(dim=1) / head.sum(dim=1)

    truth = _scaled(seen.raw_word_maps.flatten(2)).clamp_max(SUREST)
    m, n = truth[:, :, None], truth[:, None]
    both_ways = -(torch.log1p(-m * (1 - n)) + torch.log1p(-n * (1 - m))).mean(dim=3)
    leaks = -torch.log1p(-m * n).mean(dim=3)
    modifier = seen.is_word & ~head
    elsewhere = modifier[:, :, None] & head[:, None, :] & ~modifies
    loss = EXISTENCE * existence + _mean(both_ways, modifies) + LEAKAGE * _mean(leaks, elsewhere)
    return loss, torch.exp(-loss)


def _scaled(maps: Tensor) -> Tensor:
    """Scale each map, [..., places], to lie between 0 and 1."""
    low, high = maps.amin(dim=-1, keepdim=True), maps.amax(dim=-1, keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def _mean(values: Tensor, some: Tensor) -> Tensor:
    """Return the mean over the pairs in `some`, [rows]; 0 if there are none."""
    return (values * some).sum(dim=(1, 2)) / some.sum(dim=(1, 2)).clamp_min(1)
