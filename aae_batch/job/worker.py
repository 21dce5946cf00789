"""A worker: a process that holds one model and works on pieces of shards."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
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
"""The first rows of the next piece start while the last rows of the previous one finish."""

COMMITS_AT_ONCE = 2
"""Pieces of a worker besides, of which only the commit is left: a slow store takes seconds for one. Their
images may still be in memory."""

PIECES = PIECES_AT_ONCE + COMMITS_AT_ONCE
"""Pieces of a worker at most."""

CONCURRENCY = PIECES + 3
"""Concurrent calls of a worker: its pieces, `finished`, and one or two queries."""

logger = logging.getLogger("aae_batch.worker")


@dataclass(frozen=True)
class WorkerContext:
    """What every worker of a job receives.

    Attributes:
        root: the output root.
        lease: the token of the driver's lock on `root`; nothing is written without it.
        settings: the job's settings, with the S3 endpoint for workers.
        run: the run's record as planned: without what the first worker resolves, and so without the
            fingerprint, which comes with the task.
        threads: torch's threads; None keeps torch's default.
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
        fingerprint: the run's fingerprint.
        commit: True if the piece is a whole shard, which the worker commits; otherwise its outcomes
            are returned.
    """

    piece: Piece
    fingerprint: str
    commit: bool


class Worker(ABC, Generic[T]):
    """Works on several pieces at a time, each in its own thread. Ray keeps the process's log in
    a file, which Ray's dashboard shows."""

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
        self._counted = threading.Condition(self._lock)
        self._tallies: dict[Piece, Tally] = {}

    @abstractmethod
    def load(self) -> Loaded:
        """Load the model. The caller reports errors."""

    @abstractmethod
    def work(self, task: Any) -> list[T] | None:
        """Work on a piece, counting its rows with `count`; commit it if the task says so. Returns its
        outcomes; None if the job stopped first.

        Raises:
            AaeBatchError: every other worker would fail too.
            Exception: any other error, which makes this worker unusable.
        """

    def stop(self, grace: float) -> None:
        """Prepare for the end of the job: keep what is finished of a piece, if that is possible, after
        `grace` seconds at the latest. Other workers finish their pieces, or are killed."""

    def node(self) -> str:
        """Return the id of its Ray node."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def perform(self, task: Task) -> tuple[Tally, list[T] | None]:
        """Work on a piece. Returns the tally of its rows, and its outcomes (none if the shard was
        committed); None if the job stopped first.

        Raises: as `work`.
        """
        piece = task.piece
        with self._lock:
            self._tallies[piece] = Tally()
        try:
            outcomes = self.work(task)
            if outcomes is None:
                return self._tallies[piece], None
            logger.info("shard=%d rows=%d done", piece.shard, len(piece))
            return self._tallies[piece], [] if task.commit else outcomes
        finally:
            with self._lock:
                del self._tallies[piece]

    def progress(self) -> dict[Piece, Tally]:
        """Return the tally so far of each piece in progress."""
        with self._lock:
            return dict(self._tallies)

    def finished(self, known: Set[Piece]) -> Set[Piece]:
        """Return the pieces in progress whose rows are all finished, as soon as there is one that is not
        known. Of these only the commit is left."""

        def found() -> set[Piece]:
            return {p for p, tally in self._tallies.items() if tally.done + tally.before >= len(p)}

        with self._counted:
            self._counted.wait_for(lambda: found() - known)
            return found()

    def count(self, piece: Piece, tally: Tally) -> None:
        """Add finished rows to a piece's tally."""
        with self._counted:
            self._tallies[piece] += tally
            self._counted.notify_all()

    def set_torch_threads(self) -> None:
        if self.context.threads is not None:
            import torch

            torch.set_num_threads(self.context.threads)

    def refuse_other_weights(self, model: str, here: str | None, begun_with: str | None) -> None:
        """Check the digest of a model, or of a LoRA, on this machine against the run's.

        Raises:
            ModelError: they differ.
        """
        if here != begun_with:
            raise ModelError(
                f"{model} on this machine is not the one that the run was begun with; "
                "use the same files on every machine, or name those in an object store."
            )
