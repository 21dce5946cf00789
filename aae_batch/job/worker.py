"""A worker: a process with one model, which is handed pieces of shards."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from aae_batch.errors import ModelError
from aae_batch.job.plan import Piece
from aae_batch.job.progress import Tally
from aae_batch.job.records import Loaded
from aae_batch.job.settings import ActorSettings
from aae_batch.store.open import open_storage

T = TypeVar("T")

PIECES_AT_ONCE = 2
"""While the last rows of one piece finish, the first of the next are started."""

CONCURRENCY = PIECES_AT_ONCE + 2
"""Of a worker: its pieces, and a question or two."""

logger = logging.getLogger("aae_batch.worker")


@dataclass(frozen=True)
class WorkerContext:
    """What every worker of a job is told.

    Attributes:
        root: the output root.
        lease: the token of the driver's lock on it: without that nothing is written.
        settings: of the job, with the endpoint as the workers should see it.
        run: the record of the run as planned: without what the first worker finds out, and so without the
            fingerprint, which is the task's.
        threads: torch's threads; None leaves them as they are.
    """

    root: str
    lease: str
    settings: ActorSettings
    run: Mapping[str, Any]
    threads: int | None


@dataclass(frozen=True)
class Task:
    """A piece to work on.

    Attributes:
        fingerprint: of the run.
        commit: the piece is a whole shard; otherwise its outcomes are returned instead.
    """

    piece: Piece
    fingerprint: str
    commit: bool


class Worker(ABC, Generic[T]):
    """Works on pieces, several at a time, each in a thread of its own. Ray keeps its log in a file of
    the process, which Ray's dashboard shows."""

    context: WorkerContext
    settings: ActorSettings

    def __init__(self, context: WorkerContext) -> None:
        log = logging.getLogger("aae_batch")
        if not log.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(
                logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
            )
            log.addHandler(handler)
            log.setLevel(logging.INFO)
        self.context = context
        self.settings = context.settings
        self.storage = open_storage(context.root, context.settings.s3_endpoint)
        self.storage.heed(context.lease)
        self._lock = threading.Lock()
        self._tallies: dict[Piece, Tally] = {}

    @abstractmethod
    def load(self) -> Loaded:
        """Load the model. Errors are the caller's to report."""

    @abstractmethod
    def work(self, task: Any) -> list[T]:
        """Work on a piece, counting its rows with `count`; commit it if the task says so.

        Raises:
            AaeBatchError: no other worker will do better.
            Exception: whatever else makes the worker useless.
        """

    def node(self) -> str:
        """The Ray node it is on."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def perform(self, task: Task) -> tuple[Tally, list[T]]:
        """Work on a piece. Returns the tally of its rows, and its outcomes, none where the shard was
        committed. Raises as `work`."""
        piece = task.piece
        with self._lock:
            self._tallies[piece] = Tally()
        try:
            outcomes = self.work(task)
            logger.info("shard=%d rows=%d done", piece.shard, len(piece))
            return self._tallies[piece], [] if task.commit else outcomes
        finally:
            with self._lock:
                del self._tallies[piece]

    def progress(self) -> dict[Piece, Tally]:
        """What is finished of each piece that is under way."""
        with self._lock:
            return dict(self._tallies)

    def count(self, piece: Piece, tally: Tally) -> None:
        """Rows of a piece are finished."""
        with self._lock:
            self._tallies[piece] += tally

    def set_torch_threads(self) -> None:
        if self.context.threads is not None:
            import torch

            torch.set_num_threads(self.context.threads)

    def refuse_other_weights(self, model: str, here: str | None, begun_with: str | None) -> None:
        """Raises: ModelError: a model's digest on this machine is not the one that the run names."""
        if here != begun_with:
            raise ModelError(
                f"The model {model} is another one on this machine than the run was begun with; "
                "give every machine the same, or name one in an object store."
            )
