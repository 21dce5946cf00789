"""Where a job's actors run, and when they are given up."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from aae_batch.settings import Settings


def _actor_range(value: Any) -> Any:
    """`(least, most)` from 4, "4" or "1:8"."""
    if isinstance(value, (int, str)):
        parts = [int(part) for part in str(value).split(":")]
        value = (parts[0], parts[-1]) if len(parts) <= 2 else value
    if isinstance(value, tuple) and not 1 <= value[0] <= value[1]:
        raise ValueError("give a number, or MIN:MAX with 1 <= MIN <= MAX, e.g. 1:8")
    return value


ActorRange = Annotated[tuple[int, int], BeforeValidator(_actor_range)]
Dtype = Annotated[
    str,
    Field(
        description="auto (bfloat16 or float16 on CUDA, else float32), float32, float16, bfloat16, "
        "float64."
    ),
]


class ActorSettings(Settings):
    """Where a job's actors run, and when they are given up.

    Raises:
        SettingsError: a value is unknown or out of range.
    """

    group = "Actors and storage"

    actors: ActorRange | None = Field(
        None,
        description="Number of worker processes, each with its own model; or MIN:MAX to use what a "
        "cluster has room for. MIN are always requested, which makes an autoscaling cluster "
        "grow. Default: one per GPU as they come, else one.",
    )
    gpus_per_actor: float | None = Field(
        None,
        ge=0,
        description="GPUs per actor, e.g. 0.5 for two actors on each GPU. Default: 1 where "
        "there are GPUs, else 0.",
    )
    device: str = Field(
        "auto", description="Torch device of each actor; auto is CUDA, else MPS, else CPU."
    )
    dtype: Dtype = "auto"
    ray_address: str | None = Field(
        None,
        description="Ray cluster to join, e.g. 'auto'. Default: that of RAY_ADDRESS, else one on this "
        "machine.",
    )
    grace: float = Field(
        30.0,
        ge=0,
        description="Seconds that work in progress has to finish after SIGTERM or Ctrl-C: rows when "
        "generating, whose finished ones are kept for the next run, shards when scoring. A second signal "
        "stops at once.",
    )
    row_timeout: float = Field(
        1800.0, gt=0, description="Seconds without a finished row after which an actor is replaced."
    )
    max_deaths: int = Field(
        20,
        ge=1,
        description="Stop after more than this many actor deaths in a row with nothing finished.",
    )
    s3_endpoint: str | None = Field(
        None, description="URL of an S3-compatible store. Default: AWS_ENDPOINT_URL, or AWS."
    )

    @property
    def actors_s3_endpoint(self) -> str | None:
        """The S3 endpoint for actors, whose environment may differ from this machine's: the
        configured one, else this environment's. An endpoint that contains credentials is not
        passed on."""
        names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        given = [self.s3_endpoint, *(os.environ.get(name) for name in names)]
        return next((endpoint for endpoint in given if endpoint and "@" not in endpoint), None)
