"""The actors as the driver sees them: it hires them, hands them pieces, and hears what becomes of them.

All that the driver says to Ray while it works is said here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray._private.worker import global_worker
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from aae_batch.errors import AaeBatchError, JobError, ModelError
from aae_batch.job.actor import CONCURRENCY, Actor, Assignment, Report
from aae_batch.job.cluster import ActorPlan, in_words
from aae_batch.job.plan import Piece
from aae_batch.job.progress import Tally

NODE_LOSS_SECONDS = 2.0
"""How long Ray may take to notice that a node is gone after it has given up the actors on it: only then
is it known whether a death was the actor's own."""

VERDICT_SECONDS = 60.0
"""How long an actor that cannot be reached may be neither dead nor alive."""


@dataclass(eq=False)
class Member:
    """One actor.

    Attributes:
        pieces: what is out with it.
        tallies: how far it last said these were.
        ready: its model is loaded.
        leaving: its machine is about to end: it finishes what it has, and is given nothing.
        moved: when it last finished anything, or was given something while it had nothing.
    """

    pieces: list[Piece] = field(default_factory=list)
    tallies: dict[Piece, Tally] = field(default_factory=dict)
    ready: bool = False
    leaving: bool = False
    moved: float = 0.0


@dataclass(frozen=True)
class Ready:
    """An actor has loaded its model; `loaded` is what its `load` has returned."""

    member: Member
    loaded: Any


@dataclass(frozen=True)
class Told:
    """An actor has said how far its pieces are; some of them may have come back since."""

    member: Member
    tallies: dict[Piece, Tally]


@dataclass(frozen=True)
class Done:
    """An actor has finished a piece."""

    member: Member
    piece: Piece
    report: Report[Any]


@dataclass(frozen=True)
class Died:
    """An actor is gone, or of no more use. `node_lost`: because its machine is gone."""

    member: Member
    words: str
    node_lost: bool = False


@dataclass(frozen=True)
class Failed:
    """An actor met with what no other actor will do better: the job has to stop."""

    member: Member
    error: AaeBatchError


Event = Ready | Told | Done | Died | Failed


class Crew(Protocol):
    """What the driver needs of actors."""

    @property
    def members(self) -> Sequence[Member]: ...

    def room(self) -> int:
        """How many actors the cluster has room for, those that are there and stay included.

        Raises:
            JobError: there will never be one again.
        """

    def heed_notices(self) -> None:
        """Mark the members whose machine is about to end as leaving."""

    def hire(self) -> None:
        """Ask for one more actor. It is a member from now on, and ready later."""

    def give(self, member: Member, task: Assignment) -> None:
        """Hand a piece to a member."""

    def ask(self, member: Member) -> None:
        """Ask a member how far it is, unless it has been asked and has not answered."""

    def dismiss(self, member: Member) -> None:
        """End a member at once."""

    def events(self, seconds: float) -> list[Event]:
        """What has happened; waits up to so many seconds for the first thing to happen."""


def _answer(ref: Any) -> Any:
    """What a call came to: its value, or the error that it ended with."""
    try:
        return ray.get(ref)
    except RayError as error:
        return error


@dataclass(eq=False)
class _Actor(Member):
    """A member, its handle, and the calls that are out with it."""

    handle: Any = None
    node: str | None = None
    locating: Any = None
    loading: Any = None
    asked: Any = None
    calls: dict[Any, Piece] = field(default_factory=dict)

    def waits_for(self) -> list[Any]:
        return [ref for ref in (self.locating, self.loading, self.asked, *self.calls) if ref]


@dataclass
class _Lost:
    """An actor that ended or cannot be reached, while it is not known why.

    Attributes:
        probe: a call that Ray answers when it knows whether the actor is alive.
    """

    actor: _Actor
    words: str
    deadline: float
    probe: Any = None


class RayCrew:
    """Ray actors. They are not restarted by Ray: the driver hires new ones."""

    members: list[_Actor]

    def __init__(self, actor_class: type[Actor], settings: Any, actors: ActorPlan) -> None:
        """
        Args:
            settings: what each actor is made with.
        """
        self.members = []
        self._settings = settings
        self._plan = actors
        self._remote = ray.remote(actor_class)
        self._lost: list[_Lost] = []
        self._draining: set[str] = set()
        self._own_node = ray.get_runtime_context().get_node_id()

    def room(self) -> int:
        resource, each = ("GPU", self._plan.gpus) if self._plan.gpus else ("CPU", self._plan.cpus)
        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        if self._own_node not in alive:  # Ray gives a driver without its node no actor any more
            raise JobError("The Ray node that the driver was on is lost.")
        staying = [has for node, has in alive.items() if node not in self._draining]
        return math.floor(sum(has.get(resource, 0) for has in staying) / each + 1e-6)

    def heed_notices(self) -> None:
        # What `ray drain-node` and Ray's autoscaler say of a node, which Ray has no public call for.
        self._draining = set(global_worker.gcs_client.get_draining_nodes())
        for member in self.members:
            member.leaving = member.node in self._draining

    def hire(self) -> None:
        handle = self._remote.options(
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=CONCURRENCY,
            num_cpus=self._plan.cpus,
            num_gpus=self._plan.gpus,
        ).remote(self._settings)
        actor = _Actor(handle=handle, moved=time.monotonic())
        actor.locating, actor.loading = handle.node.remote(), handle.load.remote()
        self.members.append(actor)

    def give(self, member: Member, task: Assignment) -> None:
        assert isinstance(member, _Actor)
        if not member.pieces:
            member.moved = time.monotonic()
        member.calls[member.handle.perform.remote(task)] = task.piece
        member.pieces.append(task.piece)

    def ask(self, member: Member) -> None:
        assert isinstance(member, _Actor)
        if member.asked is None:
            member.asked = member.handle.progress.remote()

    def dismiss(self, member: Member) -> None:
        assert isinstance(member, _Actor)
        if member in self.members:
            self.members.remove(member)
        ray.kill(member.handle)

    def events(self, seconds: float) -> list[Event]:
        waiting = {ref: actor for actor in self.members for ref in actor.waits_for()}
        if self._lost:
            seconds = min(seconds, 0.2)
        if waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=seconds)
        else:
            time.sleep(seconds)
            return self._deaths()
        if done:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        answers = [(ref, _answer(ref)) for ref in done]
        events: list[Event | None] = []
        for failed in (False, True):  # what was finished before a death counts
            for ref, answer in answers:
                actor = waiting[ref]
                if isinstance(answer, RayError) is not failed or actor not in self.members:
                    continue
                hear = self._bad if failed else self._good
                events.append(hear(actor, ref, answer))
        return [event for event in events if event is not None] + self._deaths()

    def _good(self, actor: _Actor, ref: Any, value: Any) -> Event | None:
        if ref == actor.locating:
            actor.locating, actor.node = None, value
            return None
        if ref == actor.loading:
            actor.loading, actor.ready = None, True
            return Ready(actor, value)
        if ref == actor.asked:
            actor.asked = None
            return Told(actor, value)
        piece = actor.calls.pop(ref)
        actor.pieces.remove(piece)
        actor.tallies.pop(piece, None)
        actor.moved = time.monotonic()
        return Done(actor, piece, value)

    def _bad(self, actor: _Actor, ref: Any, error: RayError) -> Event | None:
        if isinstance(error, ActorUnavailableError):
            # Not ended yet, or Ray would blame us for the end of an actor whose node is gone.
            self.members.remove(actor)
            probe = actor.handle.node.remote()
            self._lost.append(
                _Lost(actor, in_words(error), time.monotonic() + VERDICT_SECONDS, probe)
            )
            return None
        self.dismiss(actor)  # it may only be of no more use
        if getattr(error, "preempted", False):
            return Died(actor, in_words(error), node_lost=True)
        if not isinstance(error, RayTaskError):  # its process ended, or its answer is lost
            self._lost.append(_Lost(actor, in_words(error), time.monotonic() + NODE_LOSS_SECONDS))
            return None
        cause = error.cause
        if isinstance(cause, AaeBatchError):
            return Failed(actor, cause)
        if ref == actor.loading:
            return Failed(
                actor, ModelError(f"An actor could not load the model: {in_words(cause)}")
            )
        return Died(actor, in_words(cause))

    def _deaths(self) -> list[Event]:
        """The deaths whose cause is known by now."""
        if not self._lost:
            return []
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        known: list[Event] = []
        undecided = []
        for one in self._lost:
            self._look_at(one)
            node_lost = one.actor.node is not None and one.actor.node not in alive
            if node_lost or time.monotonic() > one.deadline:
                ray.kill(one.actor.handle)
                known.append(Died(one.actor, one.words, node_lost))
            else:
                undecided.append(one)
        self._lost = undecided
        return known

    def _look_at(self, one: _Lost) -> None:
        """Has Ray found out about an actor that could not be reached?"""
        if one.probe is None or not ray.wait([one.probe], timeout=0)[0]:
            return
        answer = _answer(one.probe)
        if isinstance(answer, ActorUnavailableError):
            one.probe = one.actor.handle.node.remote()
            return
        one.probe = None
        if isinstance(answer, RayError):
            one.words = in_words(answer)
            one.deadline = time.monotonic() + NODE_LOSS_SECONDS
        else:
            one.deadline = 0.0  # it lives, but what it had is lost
