"""Image datasets with semantic guidance: Attend-and-Excite, in batches, on Ray.

>>> from aae_batch import Engine, GuidanceConfig, Request, open_dataset
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aae_batch.request import Request, Result

if TYPE_CHECKING:
    from aae_batch.dataset.notebook import open_dataset
    from aae_batch.sampling.config import GuidanceConfig
    from aae_batch.sampling.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "GuidanceConfig", "Request", "Result", "open_dataset"]


def __getattr__(name: str):
    """Import torch, pydantic and pyarrow only when needed, so that the command line starts
    quickly."""
    if name == "Engine":
        from aae_batch.sampling.engine import Engine

        return Engine
    if name == "GuidanceConfig":
        from aae_batch.sampling.config import GuidanceConfig

        return GuidanceConfig
    if name == "open_dataset":
        from aae_batch.dataset.notebook import open_dataset

        return open_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
