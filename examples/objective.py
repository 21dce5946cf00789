"""A custom method that gives every subject the same share of attention.

    aae-batch generate manifest.csv output --plugin objective --method even-shares

Run this in this folder, or install the module, so that Python finds it. On a cluster every machine needs it
(`ray job submit --working-dir`).
"""

import torch
from torch import Tensor

from aae_batch.methods import Method, Steering, register_method
from aae_batch.sampling.objectives import Seen


def even_shares(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return each row's loss, and its progress: the least share relative to an equal share. Both [rows]."""
    attention = seen.subject_maps.mean(dim=(2, 3))  # [rows, subjects]; 0 for padding
    shares = attention / attention.sum(dim=1, keepdim=True)
    least = shares.masked_fill(~seen.is_subject, torch.inf).amin(dim=1)
    reached = least * seen.is_subject.sum(dim=1)
    return 1 - reached, reached


register_method(
    "even-shares",
    Method(
        "every subject has the same share of attention",
        objective=even_shares,
        steering=Steering(thresholds={0: 0.5, 10: 0.8}, scale_factor=10.0),
        least_subjects=2,
    ),
)
