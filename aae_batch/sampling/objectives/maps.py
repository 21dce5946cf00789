"""Operations on attention maps, shared by the objectives.

Shapes: `batch` samples, `subjects` per sample (padded to the largest number), maps of `height` x
`width`, `tokens` positions of the text encoder. Everything is differentiable, and no sample's value
depends on another's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Pooling = Literal["sum", "max"]

SHARPNESS = 100.0
"""Factor before the softmax over words, because attention probabilities are small and close
together."""

SMOOTHING_SIGMA = 0.5


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a small tensor made of numbers on the host, without waiting for the device."""
    return sent(torch.tensor(values, dtype=dtype), device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor from the host to the device without waiting for it. CUDA copies such a tensor
    aside first; with MPS it would have to live until the copy is made."""
    return tensor.to(device, non_blocking=device.type != "mps")


def normalize_over_words(maps: Tensor, words: Tensor) -> Tensor:
    """Let the words compete for each place: the softmax of `SHARPNESS` x maps over `words`.

    Args:
        maps: [batch, height, width, tokens], probabilities.
        words: [batch, tokens], True at the positions that compete: without a start token, and up to
            the last one, as in diffusers, or to the end token (`normalize_eot`).

    Returns:
        [batch, height, width, tokens]; 0 elsewhere.
    """
    logits = (SHARPNESS * maps).masked_fill(~words[:, None, None, :], -torch.inf)
    return logits.softmax(dim=-1)


def membership(
    token_indices: Sequence[Sequence[Sequence[int]]], most: int, tokens: int, like: Tensor
) -> Tensor:
    """Return which tokens belong to which member (a subject or word): [batch, members, tokens] of 0
    and 1.

    Args:
        token_indices: per sample, per member, its positions.
        most: the number of members to pad to.
        like: tensor with the wanted dtype and device.
    """
    weights = [
        [[float(i in mine) for i in range(tokens)] for mine in map(set, members)]
        + [[0.0] * tokens] * (most - len(members))
        for members in token_indices
    ]
    return on_device(weights, like.device, like.dtype)


def pool(maps: Tensor, weights: Tensor, pooling: Pooling) -> Tensor:
    """Combine the maps of each subject's (or word's) tokens into one map.

    Args:
        maps: [batch, height, width, tokens].
        weights: from `membership`.
        pooling: `"sum"` is the subject's share of attention, at most 1 as for a single token.
            `"max"` is the strongest token at each place, the authors' advice for words of several
            tokens.

    Returns:
        [batch, subjects, height, width]; zeros for padding.
    """
    if pooling == "sum":
        return torch.einsum("bhwt,bst->bshw", maps, weights)
    absent = weights[:, :, None, None] == 0
    strongest = maps[:, None].masked_fill(absent, -torch.inf).amax(dim=-1)
    return strongest.masked_fill(absent.all(dim=-1), 0)


def smooth(maps: Tensor, sigma: float = SMOOTHING_SIGMA) -> Tensor:
    """Blur maps with upstream's 3 x 3 Gaussian, so that a subject needs a patch instead of one
    pixel.

    The kernel equals that of `GaussianSmoothing` in diffusers, to the last bit: the 2 inside its
    exponent turns a `sigma` of 0.5 into one of 0.707, and it is rounded to float32.

    Args:
        maps: [batch, subjects, height, width].
    """
    kernel = _bell(sigma, maps.dtype, maps.device)
    padded = F.pad(maps.flatten(0, 1).unsqueeze(1), (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel[None, None]).squeeze(1).unflatten(0, maps.shape[:2])


@lru_cache
def _bell(sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the kernel of `smooth`, [3, 3], which sums to 1."""
    offsets = torch.tensor([-1.0, 0.0, 1.0])
    bell = 1 / (sigma * math.sqrt(2 * math.pi)) * torch.exp(-((offsets / (2 * sigma)) ** 2))
    kernel = bell[:, None] * bell[None, :]
    return (kernel / kernel.sum()).to(device, dtype)


def excitation(smoothed: Tensor) -> Tensor:
    """Return the strongest attention of each subject at any place: [batch, subjects], in [0, 1]."""
    return smoothed.amax(dim=(-2, -1))


def shares(maps: Tensor) -> Tensor:
    """Normalise maps to distributions over the image: [..., height, width] that sum to 1."""
    return maps / maps.sum(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def divergence(distributions: Tensor, members: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of several distributions from their mean, in nats.

    It ranges from 0, if all are alike, to the logarithm of their number.

    Args:
        distributions: [..., members, height, width], each sums to 1.
        members: [..., members], False for padding.

    Returns:
        [...]; 0 for fewer than two members.
    """
    weights = members.to(distributions) / members.sum(dim=-1, keepdim=True).clamp_min(1)
    mean = torch.einsum("...k,...khw->...hw", weights, distributions)
    return _entropy(mean) - (weights * _entropy(distributions)).sum(dim=-1)


def _entropy(distributions: Tensor) -> Tensor:
    """Return the entropy in nats, with a finite gradient where a distribution is 0."""
    logs = distributions.clamp_min(torch.finfo(distributions.dtype).tiny).log()
    return -(distributions * logs).sum(dim=(-2, -1))


def otsu_mask(maps: Tensor) -> Tensor:
    """Return the bright part of each map, bool [..., height, width].

    Otsu's threshold (1979) maximises the variance between its two sides; here over the map's own
    values instead of a histogram.
    """
    values, _ = maps.detach().flatten(-2).sort(dim=-1)
    count = values.shape[-1]
    below = torch.arange(1, count, device=maps.device, dtype=maps.dtype)
    sums = values.cumsum(dim=-1)
    low = sums[..., :-1] / below
    high = (sums[..., -1:] - sums[..., :-1]) / (count - below)
    between = below * (count - below) * (high - low) ** 2
    last_below = between.argmax(dim=-1, keepdim=True)
    return maps.detach() > values.gather(-1, last_below).unsqueeze(-1)
