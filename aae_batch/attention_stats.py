"""What is recorded of each subject's cross-attention, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SubjectAttention:
    """One subject of one image. Per-step arrays are float32, one entry per denoising step.

    Attributes:
        subject: its words, as the tokens spell them.
        token_indices: its positions in the tokenizer's output.
        tokens: the tokens at these positions.
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
        neglected: the worst subject's attention never reached the last threshold.
    """

    subjects: tuple[SubjectAttention, ...] = ()
    loss: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    num_refinements: int = 0
    final_loss: float | None = None
    neglected: bool | None = None
