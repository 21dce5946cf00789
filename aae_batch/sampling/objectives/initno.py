"""InitNO (Guo et al., CVPR 2024, arXiv 2404.04650, section 3).

    L = max_s (1 - max_xy G * A_s) + mean_(s, t) sum_xy min(B_s, B_t) / sum_xy (B_s + B_t)

`A_s` and the blur `G` are those of Attend-and-Excite, and `B_s` is the self-attention of the place
where `G * A_s` is largest, blurred as well: two subjects must not grow out of one region. The same loss selects the noise
before the first step (`aae_batch.sampling.noise_search`). Terms and weights that are in the
authors' code but not in their paper are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aae_batch.sampling.objectives.maps import smooth
from aae_batch.sampling.objectives.seen import Seen

CROSS_TARGET, CONFLICT_TARGET = 0.2, 0.3
"""Noise is valid when the two terms are below these values. Only their ratio is used: the first is
the `target` of `aae_batch.methods.NoiseSearch`, as 1 - 0.2."""


def initno(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return the loss, and `reached` of its two terms."""
    cross = 1 - seen.least_excitation
    regions = smooth(affinity_at(seen, seen.smoothed.flatten(2).argmax(dim=2)))
    conflict = mean_over_pairs(seen, _overlap(regions))
    return cross + conflict, reached(cross, conflict)


def reached(cross: Tensor, conflict: Tensor) -> Tensor:
    """Return 1 - max(cross, 2/3 conflict): above 0.8 if both terms are below their targets."""
    return 1 - torch.maximum(cross, conflict * (CROSS_TARGET / CONFLICT_TARGET))


def affinity_at(seen: Seen, places: Tensor) -> Tensor:
    """Return what each of `places`, [rows, subjects], attends to:
    [rows, subjects, height, width]."""
    assert seen.affinity is not None
    chosen = places[:, :, None].expand(-1, -1, seen.affinity.shape[2])
    return seen.affinity.gather(1, chosen).unflatten(2, seen.maps.shape[1:3])


def mean_over_pairs(seen: Seen, values: Tensor) -> Tensor:
    """Return the mean of `values`, [rows, subjects, subjects], over pairs of different existing
    subjects: [rows]; 0 if there are no pairs."""
    both = seen.is_subject[:, :, None] & seen.is_subject[:, None, :]
    pairs = both & ~torch.eye(both.shape[1], dtype=torch.bool, device=both.device)
    return (values * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp_min(1)


def _overlap(regions: Tensor) -> Tensor:
    """Return half the share that each two regions have in common: [rows, subjects, subjects]."""
    flat = regions.flatten(2)
    common = torch.minimum(flat[:, :, None], flat[:, None, :]).sum(dim=3)
    sums = flat.sum(dim=2)
    return common / (sums[:, :, None] + sums[:, None, :])
