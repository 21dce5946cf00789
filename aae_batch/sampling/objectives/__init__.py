"""Guidance objectives: attention maps to a loss per sample. One module per paper."""

from aae_batch.sampling.objectives.seen import Objective, Seen

__all__ = ["Objective", "Seen"]
