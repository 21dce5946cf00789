"""What every actor of a job has in common, whatever it does with its pieces."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from aae_batch.job.plan import Piece
from aae_batch.job.progress import Tally

T = TypeVar("T")

PIECES_AT_ONCE = 2
"""While the last rows of one piece finish, the first of the next are taken up."""

CONCURRENCY = PIECES_AT_ONCE + 2
"""Of the actor: its pieces, and a question or two."""


class Assignment(Protocol):
    """A piece, with whatever an actor needs to know to work on it."""

    @property
    def piece(self) -> Piece: ...


@dataclass(frozen=True)
class Report(Generic[T]):
    """A piece is done. `outcomes` is empty where the shard was committed."""

    tally: Tally
    outcomes: list[T]


class Actor(ABC):
    """Works on pieces, several at a time, in a process of its own. What it logs, Ray keeps in a file
    of that process, which its dashboard shows."""

    def __init__(self) -> None:
        log = logging.getLogger("aae_batch")
        if not log.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(
                logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
            )
            log.addHandler(handler)
            log.setLevel(logging.INFO)

    def node(self) -> str:
        """The Ray node it is on."""
        import ray

        return ray.get_runtime_context().get_node_id()

    @abstractmethod
    def load(self) -> Any:
        """Load the model; returns where, e.g. `cuda`, or what else the driver should know of it. Errors
        are the caller's to report."""

    @abstractmethod
    def perform(self, task: Any) -> Report[Any]:
        """Work on a piece; commit it if it is a shard.

        Raises:
            AaeBatchError: no other actor will do better.
            Exception: whatever else ends the actor's usefulness.
        """

    @abstractmethod
    def progress(self) -> dict[Piece, Tally]:
        """What is finished of each piece that is under way."""
