"""Attend-and-Excite (Chefer et al. 2023, arXiv 2301.13826, section 3).

    L = max_s (1 - max_xy G * A_s)

`A_s` is the map of subject `s` after the softmax over words, `G` a small blur.
"""

from __future__ import annotations

from torch import Tensor

from aae_batch.sampling.objectives.seen import Seen


def attend_and_excite(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return the loss of the most neglected subject, and that subject's excitation."""
    reached = seen.least_excitation
    return (1 - reached).clamp_min(0), reached
