"""A method of your own: every subject is to have the same share of attention.

    aae-batch generate manifest.csv output --plugin objective --method even-shares

in this folder, where Python finds the module, or with a package that is installed. On a cluster every machine
needs it (`ray job submit --working-dir`).
"""

import torch
from torch import Tensor

from aae_batch.methods import Method, Steering, register_method
from aae_batch.sampling.objectives import Seen


def even_shares(seen: Seen) -> tuple[Tensor, Tensor]:
    """The loss of each row, and how far it has come: how near the least share is to an equal one."""
    attention = seen.subject_maps.mean(dim=(2, 3))  # [rows, subjects]; 0 where there is no subject
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
