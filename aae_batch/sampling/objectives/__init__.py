"""Objectives of guidance: attention maps -> a loss per sample. One file each, from its paper."""

from aae_batch.sampling.objectives.seen import Objective, Seen

__all__ = ["Objective", "Seen"]
