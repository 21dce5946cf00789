"""What is recorded of each subject's cross-attention, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from aae_batch.sampling.words import Subject


@dataclass(frozen=True)
class SubjectAttention:
    """One subject of one image. Per-step arrays are float32, one entry per denoising step.

    Where a prompt is denoised conjunct by conjunct (composable-diffusion), the maps are those of the
    subject's own conjunct, and "words" are that conjunct's.

    Attributes:
        subject: its words, as the row names them, or as the prompt has them.
        token_indices: its positions in the tokenizer's output.
        tokens: the part of the prompt at each of these positions.
        max_attention: the largest value of the subject's map after softmax and smoothing, in
            [0, 1]: one minus this is the subject's part of the loss.
        mean_attention: the mean over the picture of the subject's map after softmax.
        entropy: in nats, of that map as a distribution over the picture.
        center_x, center_y: its centre of mass in [0, 1], from the left and from the top.
        map: uint8 [height, width], the cross-attention of the last step, averaged over heads and
            layers (before the softmax over words), scaled so that 255 stands for `map_scale`.
        map_scale: the largest probability of `map`.
    """

    subject: str
    token_indices: tuple[int, ...]
    tokens: tuple[str, ...]
    max_attention: np.ndarray
    mean_attention: np.ndarray
    entropy: np.ndarray
    center_x: np.ndarray
    center_y: np.ndarray
    map: np.ndarray
    map_scale: float


@dataclass(frozen=True)
class AttentionRecord:
    """What the engine saw of one image.

    Attributes:
        subjects: one entry per subject; empty where the request named none.
        loss: float32 [steps], the loss of the step's last guided forward, before its update.
        num_refinements: latent updates of iterative refinement, over all steps.
        final_loss: the loss at the last step.
        neglected: the worst subject's attention never reached the last threshold; None without
            thresholds.
    """

    subjects: tuple[SubjectAttention, ...] = ()
    loss: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    num_refinements: int = 0
    final_loss: float | None = None
    neglected: bool | None = None


def describe(maps: Tensor, excitations: Tensor) -> Tensor:
    """The figures of each subject's map at one step.

    Args:
        maps: [batch, subjects, height, width], after the softmax over words.
        excitations: [batch, subjects], the largest value after smoothing.

    Returns:
        [batch, subjects, 5]: max, mean, entropy, centre x, centre y, as `SubjectAttention` has them.
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
    """Collects what is seen of one sample, a step at a time; a later look at a step replaces an earlier."""

    def __init__(self, subjects: tuple[Subject, ...], steps: int) -> None:
        self.subjects = subjects
        self._figures = np.zeros((steps, len(subjects), 5), dtype=np.float32)
        self._loss = np.zeros(steps, dtype=np.float32)
        self._last_maps: Tensor | None = None

    def observe(self, step: int, figures: np.ndarray, loss: float, maps: Tensor) -> None:
        """Take in one forward.

        Args:
            step: the denoising step.
            figures: [subjects, 5], of `describe`.
            loss: of the guidance objective.
            maps: [subjects, height, width], cross-attention before the softmax over words.
        """
        self._figures[step] = figures
        self._loss[step] = loss
        self._last_maps = maps

    def record(self, num_refinements: int, last_threshold: float | None) -> AttentionRecord:
        """All of it, for keeping."""
        if self._last_maps is None:
            return AttentionRecord()
        maps = self._last_maps.float().cpu().numpy()
        best = self._figures[:, :, 0].max(axis=0)
        return AttentionRecord(
            subjects=tuple(self._subject(i, maps[i]) for i in range(len(self.subjects))),
            loss=self._loss,
            num_refinements=num_refinements,
            final_loss=float(self._loss[-1]),
            neglected=None if last_threshold is None else bool(best.min() < last_threshold),
        )

    def _subject(self, index: int, map: np.ndarray) -> SubjectAttention:
        subject, figures = self.subjects[index], self._figures[:, index]
        scale = float(map.max())
        return SubjectAttention(
            subject=subject.name,
            token_indices=subject.token_indices,
            tokens=subject.tokens,
            max_attention=figures[:, 0].copy(),
            mean_attention=figures[:, 1].copy(),
            entropy=figures[:, 2].copy(),
            center_x=figures[:, 3].copy(),
            center_y=figures[:, 4].copy(),
            map=np.round(map / (scale or 1.0) * 255).astype(np.uint8),
            map_scale=scale,
        )
