"""SynGen (Rassin et al., NeurIPS 2023, arXiv 2306.08877, section 3).

    L = sum_(m, n) { D(A_m, A_n) - 1/2 [mean_u D(A_m, A_u) + mean_u D(A_n, A_u)] }

`A` are raw cross-attention maps, each divided by its sum over the image, and `D` is the symmetric
Kullback-Leibler divergence, 1/2 (KL(p, q) + KL(q, p)). `m` runs over the modifiers of all subjects,
`n` is the noun of `m`, and `u` runs over the tokens of the prompt outside their subject. The second
term has no lower bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aae_batch.sampling.objectives.maps import shares
from aae_batch.sampling.objectives.seen import Seen


def syngen(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return the loss, and the excitation of the most neglected subject, which no threshold
    uses."""
    of_words = shares(seen.raw_word_maps).flatten(2)
    of_tokens = shares(seen.maps.movedim(-1, 1)).flatten(2)
    together = symmetric_divergence(of_words, of_words)
    apart = symmetric_divergence(of_words, of_tokens)

    outside = _outside(seen).to(apart)
    mean_apart = (apart * outside).sum(dim=2) / outside.sum(dim=2).clamp_min(1)
    pairs = together - (mean_apart[:, :, None] + mean_apart[:, None, :]) / 2
    return (pairs * seen.modifies).sum(dim=(1, 2)), seen.least_excitation


def symmetric_divergence(some: Tensor, others: Tensor) -> Tensor:
    """Return the divergence, in nats, of each of [rows, n, places] from each of [rows, m, places]:
    [rows, n, m]."""
    least = torch.finfo(some.dtype).tiny
    logs, other_logs = some.clamp_min(least).log(), others.clamp_min(least).log()
    own = (some * logs).sum(dim=2)[:, :, None] + (others * other_logs).sum(dim=2)[:, None, :]
    return (own - some @ other_logs.mT - logs @ others.mT) / 2


def _outside(seen: Seen) -> Tensor:
    """[rows, words, tokens], True if a token is a word of the prompt outside the word's subject."""
    own = seen.subject_tokens.bool()
    rows = torch.arange(len(own), device=own.device)[:, None]
    of_owner = own[rows, seen.owner.clamp_min(0)]  # [rows, words, tokens]
    return seen.prompt[:, None] & ~of_owner & seen.is_word[:, :, None]
