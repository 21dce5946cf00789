"""Records each subject's cross-attention, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aae_batch.request import AttentionRecord, SubjectAttention
from aae_batch.sampling.words import Subject


def describe(maps: Tensor, excitations: Tensor) -> Tensor:
    """Return statistics of each subject's map at one step.

    Args:
        maps: [batch, subjects, height, width], after the softmax over words.
        excitations: [batch, subjects], the largest value after smoothing.

    Returns:
        [batch, subjects, 5]: max, mean, entropy, centre x, centre y, as in `SubjectAttention`.
    """
    height, width = maps.shape[-2:]
    share = maps / maps.sum(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    across = (torch.arange(width, device=maps.device, dtype=maps.dtype) + 0.5) / width
    down = (torch.arange(height, device=maps.device, dtype=maps.dtype) + 0.5) / height
    return torch.stack(
        [
            excitations,
            maps.mean(dim=(-2, -1)),
            torch.special.entr(share).sum(dim=(-2, -1)),
            (share.sum(dim=-2) * across).sum(dim=-1),
            (share.sum(dim=-1) * down).sum(dim=-1),
        ],
        dim=-1,
    )


class AttentionTrace:
    """Collects one sample's records, step by step; a later record of a step replaces the earlier
    one.

    Args:
        map_steps: the steps whose maps are kept. Default: the last.
    """

    def __init__(
        self, subjects: tuple[Subject, ...], steps: int, map_steps: Sequence[int] | None = None
    ) -> None:
        self.subjects = subjects
        self._map_steps = frozenset(map_steps or [steps - 1])
        self._maps: dict[int, Tensor] = {}
        self._figures = np.zeros((steps, len(subjects), 5), dtype=np.float32)
        self._loss = np.zeros(steps, dtype=np.float32)

    def keeps(self, step: int) -> bool:
        """Whether the step's maps are kept."""
        return step in self._map_steps

    def observe(self, step: int, figures: np.ndarray, loss: float, maps: Tensor) -> None:
        """Record one forward.

        Args:
            step: the denoising step.
            figures: [subjects, 5], from `describe`.
            loss: the guidance objective's loss.
            maps: [subjects, height, width], cross-attention before the softmax over words, on the CPU; used
                only of steps whose maps are kept.
        """
        self._figures[step] = figures
        self._loss[step] = loss
        if self.keeps(step):
            self._maps[step] = maps

    def worst(self, step: int) -> float:
        """Return the largest attention of the worst subject at a step; 1 without subjects."""
        return float(self._figures[step, :, 0].min(initial=1.0))

    def record(self, num_refinements: int, last_threshold: float | None) -> AttentionRecord:
        """Return the complete `AttentionRecord`."""
        if not self._maps:
            return AttentionRecord()
        maps = torch.stack([*self._maps.values()], dim=1).float().numpy()
        best = self._figures[:, :, 0].max(axis=0)
        return AttentionRecord(
            subjects=tuple(self._subject(i, maps[i]) for i in range(len(self.subjects))),
            loss=self._loss,
            num_refinements=num_refinements,
            final_loss=float(self._loss[-1]),
            neglected=None if last_threshold is None else bool(best.min() < last_threshold),
        )

    def _subject(self, index: int, maps: np.ndarray) -> SubjectAttention:
        """Return the record of one subject, given its maps: [map_steps, height, width]."""
        subject, figures = self.subjects[index], self._figures[:, index]
        scales = maps.max(axis=(1, 2))
        shares = maps / np.where(scales > 0, scales, 1)[:, None, None]
        return SubjectAttention(
            subject=subject.name,
            token_indices=subject.token_indices,
            tokens=subject.tokens,
            max_attention=figures[:, 0].copy(),
            mean_attention=figures[:, 1].copy(),
            entropy=figures[:, 2].copy(),
            center_x=figures[:, 3].copy(),
            center_y=figures[:, 4].copy(),
            map_steps=tuple(self._maps),
            maps=np.round(shares * 255).astype(np.uint8),
            map_scales=scales,
        )
