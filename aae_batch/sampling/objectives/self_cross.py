"""Self-Cross guidance (Qiu et al., CVPR 2025, arXiv 2411.18936, equations 5 to 8), on top of
InitNO.

    L = max_s (1 - max_xy A_s) + mean_(s, t) sum_xy min(B_s, A_t / sum A_t)
    B_s = sum_(p in M_s) A_s[p] S[p] / sum_(p in M_s) A_s[p]

`A_s` is the blurred map of a subject as in Attend-and-Excite, `M_s` its bright part by Otsu's
threshold, `S[p]` the self-attention of place `p`, and `(s, t)` runs over ordered pairs: what the whole of one subject attends to must not be where another
one is. Cross-attention maps are divided by their sum, as the authors do at sizes other than
16 x 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aae_batch.sampling.objectives.initno import mean_over_pairs, reached
from aae_batch.sampling.objectives.maps import otsu_mask, shares
from aae_batch.sampling.objectives.seen import Seen


def self_cross(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return the loss, and `reached` of its two terms."""
    assert seen.affinity is not None
    cross = 1 - seen.least_excitation
    maps = seen.smoothed
    bright = shares(maps * otsu_mask(maps)).flatten(2)
    regions = bright @ seen.affinity
    mixed = torch.minimum(regions[:, :, None], shares(maps).flatten(2)[:, None]).sum(dim=3)
    mixing = mean_over_pairs(seen, mixed)
    return cross + mixing, reached(cross, mixing)
