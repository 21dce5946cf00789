"""The driver's view of its workers: start them, hand them pieces, and report events.

While the driver works, all its calls to Ray are in this module.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.worker import global_worker
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from aae_batch.errors import AaeBatchError, JobError, ModelError
from aae_batch.job.cluster import WorkerPlan, in_words
from aae_batch.job.plan import Piece
from aae_batch.job.progress import Tally
from aae_batch.job.records import Loaded
from aae_batch.job.worker import CONCURRENCY, Task, Worker, WorkerContext

NODE_LOSS_SECONDS = 2.0
"""How long Ray may take to report a lost node after it has reported the actors on it as dead.
Only then is it known whether a worker's death was its own fault."""

VERDICT_SECONDS = 60.0
"""How long Ray may take to decide whether an unreachable worker is dead."""


@dataclass(eq=False)
class WorkerHandle:
    """The driver's handle of one worker.

    Attributes:
        actor: Ray's actor handle.
        calls: pending calls: the name of a method, or a piece.
        tallies: the progress last reported for its pieces.
        finished: those of its pieces of which only the commit is left.
        node: the Ray node it runs on, once known.
        ready: its model is loaded.
        leaving: its machine is about to go away: it finishes its pieces and gets no new ones.
        moved: when it last finished anything, or received a piece while idle.
    """

    actor: Any = None
    calls: dict[Any, str | Piece] = field(default_factory=dict)
    tallies: dict[Piece, Tally] = field(default_factory=dict)
    finished: Set[Piece] = frozenset()
    node: str | None = None
    ready: bool = False
    leaving: bool = False
    moved: float = field(default_factory=time.monotonic)

    @property
    def pieces(self) -> list[Piece]:
        """The pieces it is working on."""
        return [call for call in self.calls.values() if isinstance(call, Piece)]

    def call(self, method: str, *arguments: Any) -> None:
        self.calls[getattr(self.actor, method).remote(*arguments)] = method


@dataclass(frozen=True)
class Ready:
    """A worker has loaded its model."""

    worker: WorkerHandle
    loaded: Loaded


@dataclass(frozen=True)
class Done:
    """A worker has finished a piece, or has been stopped first; see `Worker.perform`."""

    worker: WorkerHandle
    piece: Piece
    tally: Tally
    outcomes: list[Any] | None


@dataclass(frozen=True)
class Died:
    """A worker is dead or unusable. `node_lost` is True if the reason is the loss of its
    machine."""

    worker: WorkerHandle
    words: str
    node_lost: bool = False


Event = Ready | Done | Died


@dataclass(eq=False)
class _Lost:
    """A worker that died or cannot be reached, while the cause is unknown.

    Attributes:
        probe: a call that Ray answers once it knows whether the worker is alive.
    """

    worker: WorkerHandle
    words: str
    deadline: float
    probe: Any = None


def _answer(ref: Any) -> Any:
    """Return a call's result, or the error it ended with."""
    try:
        return ray.get(ref)
    except RayError as error:
        return error


class Pool:
    """Workers as Ray actors. Ray does not restart them: the driver starts new ones."""

    def __init__(
        self, worker_class: type[Worker[Any]], context: WorkerContext, plan: WorkerPlan
    ) -> None:
        self.workers: list[WorkerHandle] = []
        self._context = context
        self._plan = plan
        self._actor_class = ray.remote(worker_class)
        self._lost: list[_Lost] = []
        self._draining: set[str] = set()
        self._own_node = ray.get_runtime_context().get_node_id()

    def places(self) -> int:
        """Return how many workers there should be: what the cluster has room for, including running
        workers that stay, clamped to the requested range.

        Raises:
            JobError: the driver's node is lost, so no actor can start any more.
        """
        plan = self._plan
        resource, each = ("GPU", plan.gpus) if plan.gpus else ("CPU", plan.cpus)
        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        if self._own_node not in alive:  # Ray starts no more actors for a driver without its node
            raise JobError("The Ray node that the driver was on is lost.")
        staying = [has for node, has in alive.items() if node not in self._draining]
        room = math.floor(sum(has.get(resource, 0) for has in staying) / each + 1e-6)
        wanted = max(room, plan.least)
        return wanted if plan.most is None else min(wanted, plan.most)

    def heed_notices(self) -> None:
        """Mark workers as leaving if their machine is about to go away."""
        # Set by `ray drain-node` and Ray's autoscaler. Ray has no public API for it.
        self._draining = set(global_worker.gcs_client.get_draining_nodes())
        for worker in self.workers:
            worker.leaving = worker.node in self._draining

    def hire(self) -> None:
        """Start one more worker. It is in `workers` at once, and ready later."""
        options = self._actor_class.options(
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=CONCURRENCY,
            num_cpus=self._plan.cpus,
            num_gpus=self._plan.gpus,
        )
        worker = WorkerHandle(options.remote(self._context))
        worker.call("node")
        worker.call("load")
        self.workers.append(worker)

    def give(self, worker: WorkerHandle, task: Task) -> None:
        """Hand a piece to a worker."""
        if not worker.pieces:
            worker.moved = time.monotonic()
        worker.calls[worker.actor.perform.remote(task)] = task.piece
        if "finished" not in worker.calls.values():
            worker.call("finished", worker.finished)

    def ask(self, worker: WorkerHandle) -> None:
        """Ask a worker for its progress, unless a request is pending."""
        if "progress" not in worker.calls.values():
            worker.call("progress")

    def stop(self, grace: float) -> None:
        """Tell the workers with pieces that the job stops, and that they have `grace` seconds."""
        for worker in self.workers:
            if worker.pieces:
                worker.call("stop", grace)

    def dismiss(self, worker: WorkerHandle) -> None:
        """Kill a worker at once."""
        if worker in self.workers:
            self.workers.remove(worker)
        ray.kill(worker.actor)

    def events(self, seconds: float) -> Iterator[Event]:
        """Yield what has happened, after waiting up to `seconds` for the first event.

        Iterate to the end, or events are lost.

        Raises:
            AaeBatchError: a worker met an error that every other worker would meet too.
        """
        waiting = {ref: worker for worker in self.workers for ref in worker.calls}
        if self._lost:
            seconds = min(seconds, 0.2)
        done: list[Any] = []
        if waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=seconds)
        else:
            time.sleep(seconds)
        if done:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        answers = [(waiting[ref], ref, _answer(ref)) for ref in done]
        answers.sort(key=lambda heard: isinstance(heard[2], RayError))  # deaths last
        for worker, ref, answer in answers:
            if worker in self.workers:
                hear = self._failed if isinstance(answer, RayError) else self._answered
                event = hear(worker, ref, answer)
                if event is not None:
                    yield event
        yield from self._deaths()

    def _answered(self, worker: WorkerHandle, ref: Any, answer: Any) -> Event | None:
        call = worker.calls.pop(ref)
        if call == "node":
            worker.node = answer
        elif call == "load":
            worker.ready = True
            return Ready(worker, answer)
        elif call == "progress":  # some of these pieces may have finished since
            tallies = {piece: answer[piece] for piece in worker.pieces if piece in answer}
            if tallies != worker.tallies:
                worker.tallies, worker.moved = tallies, time.monotonic()
        elif call == "finished":
            worker.finished = answer.intersection(worker.pieces)
            if worker.pieces:
                worker.call("finished", worker.finished)
        elif isinstance(call, Piece):
            worker.finished = worker.finished - {call}
            worker.tallies.pop(call, None)
            worker.moved = time.monotonic()
            return Done(worker, call, *answer)
        return None

    def _failed(self, worker: WorkerHandle, ref: Any, error: RayError) -> Event | None:
        words = in_words(error)
        if isinstance(error, ActorUnavailableError):
            # Do not kill it yet, or Ray would attribute the death to us even if its node is gone.
            self.workers.remove(worker)
            probe = worker.actor.node.remote()
            self._lost.append(_Lost(worker, words, time.monotonic() + VERDICT_SECONDS, probe))
            return None
        self.dismiss(worker)  # it may be alive but unusable
        if getattr(error, "preempted", False):
            return Died(worker, words, node_lost=True)
        if not isinstance(error, RayTaskError):  # its process ended, or its answer is lost
            self._lost.append(_Lost(worker, words, time.monotonic() + NODE_LOSS_SECONDS))
            return None
        cause = error.cause
        if isinstance(cause, AaeBatchError):
            raise JobError(str(cause)) if worker.ready else cause
        if worker.calls[ref] == "load":
            raise ModelError(f"An actor could not load the model: {in_words(cause)}")
        return Died(worker, in_words(cause))

    def _deaths(self) -> Iterator[Died]:
        """Yield the deaths whose cause is known by now."""
        if not self._lost:
            return
        gone = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
        for lost in list(self._lost):
            self._look_at(lost)
            # An actor that never said where it is: Ray's words about its death name the node.
            named = any(node in lost.words for node in gone)
            node_lost = named if lost.worker.node is None else lost.worker.node in gone
            if node_lost or time.monotonic() > lost.deadline:
                ray.kill(lost.worker.actor)
                self._lost.remove(lost)
                yield Died(lost.worker, lost.words, node_lost)

    def _look_at(self, lost: _Lost) -> None:
        """Check whether Ray has decided about an unreachable worker."""
        if lost.probe is None or not ray.wait([lost.probe], timeout=0)[0]:
            return
        answer = _answer(lost.probe)
        if isinstance(answer, ActorUnavailableError):
            lost.probe = lost.worker.actor.node.remote()
            return
        lost.probe = None
        if isinstance(answer, RayError):
            lost.words = in_words(answer)
            lost.deadline = time.monotonic() + NODE_LOSS_SECONDS
        else:
            lost.deadline = 0.0  # it is alive, but its pieces are lost
