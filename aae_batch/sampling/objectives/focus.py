"""FOCUS (Bill et al. 2025, arXiv 2510.02315).

    L = 1/2 [mean_s JSD(words of s) + 1 - JSD(subjects)]

`JSD` is the Jensen-Shannon divergence of maps that are blurred, cubed and normalised to sum 1,
divided by the logarithm of their number, so that it is in [0, 1]. The words of a subject should
agree (`mean_s` is over subjects of several words, 0 if there are none), and the subjects should
differ. A subject's map is the mean of its words' blurred maps, before they are cubed; these are raw
cross-attention, without the softmax over words.

The paper adds the gradient to the velocity of flow models; here it moves the latents, as in the
other objectives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aae_batch.sampling.objectives.maps import divergence, shares, smooth
from aae_batch.sampling.objectives.seen import Seen

SIGMA = 0.5**0.5
"""The `sigma` at which `smooth` blurs with a Gaussian of sigma 1."""


def focus(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return the loss, in [0, 1], and one minus it."""
    words = smooth(seen.raw_word_maps, SIGMA)
    subjects = torch.arange(seen.is_subject.shape[1], device=words.device)
    members = seen.owner[:, None, :] == subjects[:, None]
    count = members.sum(dim=2)

    within = _normalized(_cubed(words)[:, None].expand(-1, len(subjects), -1, -1, -1), members)
    several = count > 1
    disagreement = (within * several).sum(dim=1) / several.sum(dim=1).clamp_min(1)

    weights = members.to(words) / count[:, :, None].clamp_min(1)
    of_subjects = torch.einsum("rsk,rkhw->rshw", weights, words)
    apart = _normalized(_cubed(of_subjects), seen.is_subject)
    loss = (disagreement + 1 - apart) / 2
    return loss, 1 - loss


def _cubed(maps: Tensor) -> Tensor:
    return shares(maps**3)


def _normalized(distributions: Tensor, members: Tensor) -> Tensor:
    """Return the divergence in [0, 1]; 0 for fewer than two distributions."""
    count = members.sum(dim=-1).clamp_min(2)
    return divergence(distributions, members) / count.to(distributions).log()
