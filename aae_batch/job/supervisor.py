"""The supervision loop: pieces of shards to actors, results to tallies, deaths to new actors.

What the pieces are for, a job says in a subclass.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from aae_batch.dataset.layout import PROGRESS_SECONDS
from aae_batch.errors import JobError
from aae_batch.job.actor import PIECES_AT_ONCE, Assignment, Report
from aae_batch.job.cluster import ActorPlan, Stop
from aae_batch.job.crew import Crew, Died, Done, Failed, Member, Ready, Told
from aae_batch.job.plan import Ledger, Piece
from aae_batch.job.progress import Progress, Tally
from aae_batch.job.settings import ActorSettings
from aae_batch.store.lock import Lock

T = TypeVar("T")
POLL_SECONDS = 1.0

GAVE_UP = "ActorDied"
"""`error_type` of a row that has ended its process twice while it was alone."""

logger = logging.getLogger("aae_batch.job")


class Supervisor(ABC, Generic[T]):
    """Keeps a crew at work until every piece is done.

    Args:
        rows: of the whole dataset, those that earlier runs finished included.
        model: what the actors load, in words.
        actors: how many members the crew should have.
        report: is told about once a second how far the job is.
        stop: whether a person or a scheduler wants the job to end.
    """

    def __init__(
        self,
        settings: ActorSettings,
        rows: int,
        model: str,
        ledger: Ledger[T],
        crew: Crew,
        actors: ActorPlan,
        report: Callable[[Progress], None],
        stop: Stop,
        lock: Lock,
    ) -> None:
        self.limits = settings
        self.rows = rows
        self.model = model
        self.ledger = ledger
        self.crew = crew
        self.actors = actors
        self.report = report
        self.stop = stop
        self.lock = lock
        self.before = rows - ledger.rows_left
        self.finished = Tally()
        self.deaths_in_a_row = 0
        self.deaths_while_loading = 0
        self.started: float | None = None
        self._looked_at = self._told_at = -math.inf

    # --- what a job says ---

    @abstractmethod
    def _task(self, piece: Piece) -> Assignment:
        """What an actor is given of a piece."""

    @abstractmethod
    def _return(self, piece: Piece, outcomes: list[T]) -> None:
        """Take in a piece that is a part of a shard; commit the shard with its last part."""

    @abstractmethod
    def _give_up(self, piece: Piece, words: str) -> None:
        """A piece of one row has killed twice while it was alone: say so in its place."""

    def _tell(self) -> None:
        """Say how far the job is to whoever is not here; called every 15 s, and at the end."""

    def _judge(self) -> None:
        """Raise where what has come back so far makes the job hopeless."""

    # --- the loop ---

    def run(self) -> dict[str, Any]:
        """Returns the figures of this session.

        Raises:
            JobError: the job is hopeless.
            KeyboardInterrupt: it was told to stop, and what was under way is finished or dropped.
        """
        try:
            while not self.ledger.finished:
                if self._is_over():
                    raise KeyboardInterrupt
                if time.monotonic() - self._looked_at > POLL_SECONDS:
                    self._look_around()
                if not self.stop.requested:
                    self._assign()
                for event in self.crew.events(POLL_SECONDS):
                    self._hear(event)
                self._judge()
                self.report(self.progress())
        finally:
            for member in list(self.crew.members):
                self.crew.dismiss(member)
            self._tell()
        progress = self.progress()
        return {
            "rows": progress.now.done,
            "seconds": round(progress.seconds, 1),
            "images_per_second": round(progress.images_per_second, 3),
        }

    def progress(self) -> Progress:
        under_way = (tally for member in self.crew.members for tally in member.tallies.values())
        now = Tally.sum([self.finished, *under_way])
        seconds = time.monotonic() - self.started if self.started is not None else 0.0
        return Progress(self.rows, self.before, now, seconds)

    # --- what is done about once a second ---

    def _look_around(self) -> None:
        self._looked_at = time.monotonic()
        self.lock.check()
        if self._looked_at - self._told_at > PROGRESS_SECONDS:
            self._told_at = self._looked_at
            self._tell()
        if not self.stop.requested:
            self._staff()
        for member in list(self.crew.members):
            if not member.pieces:
                continue
            still = time.monotonic() - member.moved
            if still > self.limits.row_timeout:
                self.crew.dismiss(member)
                self._died(Died(member, f"it finished no row in {still:.0f} s (row_timeout)"))
            else:
                self.crew.ask(member)

    def _staff(self) -> None:
        """As many actors as there is room for, between the least and the most that are wanted."""
        self.crew.heed_notices()
        for member in [member for member in self.crew.members if member.leaving]:
            if not member.pieces:
                self.crew.dismiss(member)
        staying = [member for member in self.crew.members if not member.leaving]
        room = self.crew.room()
        most = self.actors.most if self.actors.most is not None else max(room, self.actors.least)
        places = min(max(room, self.actors.least), most)
        pieces = len(self.ledger.todo) + sum(len(member.pieces) for member in staying)
        for _ in range(min(places, pieces) - len(staying)):
            self.crew.hire()
        # Of those that a lost node leaves without a place, none is waited for.
        idle = [member for member in staying if not member.ready]
        for member in idle[: max(0, len(staying) - places)]:
            self.crew.dismiss(member)

    def _is_over(self) -> bool:
        """The job was told to stop, and nothing is under way or the time for it is up."""
        if not self.stop.requested:
            return False
        at_work = any(member.pieces for member in self.crew.members)
        return not at_work or self.stop.seconds > self.limits.grace

    # --- pieces go out ---

    def _assign(self) -> None:
        """First one piece to every actor that is ready, then the next one, for its free slots."""
        for others in range(PIECES_AT_ONCE):
            for member in self.crew.members:
                if not self.ledger.todo:
                    return
                if not member.ready or member.leaving or len(member.pieces) != others:
                    continue
                if self._is_alone(member):
                    continue
                piece = self.ledger.take(busy=others > 0)
                if piece is not None:
                    self.crew.give(member, self._task(piece))

    def _is_alone(self, member: Member) -> bool:
        return any(self.ledger.is_suspect(piece) for piece in member.pieces)

    # --- what comes back ---

    def _hear(self, event: Ready | Told | Done | Died | Failed) -> None:
        if isinstance(event, Ready):
            self.started = self.started or time.monotonic()
        elif isinstance(event, Told):
            member = event.member
            tallies = {p: tally for p, tally in event.tallies.items() if p in member.pieces}
            if tallies != member.tallies:
                member.moved = time.monotonic()
            member.tallies = tallies
        elif isinstance(event, Done):
            self._done(event.piece, event.report)
        elif isinstance(event, Failed):
            raise event.error if not event.member.ready else JobError(str(event.error))
        else:
            self._died(event)

    def _done(self, piece: Piece, report: Report[T]) -> None:
        self.deaths_in_a_row = 0
        self.finished += report.tally
        logger.info("shard=%d rows=%d-%d done", piece.shard, piece.start, piece.stop - 1)
        if self.ledger.is_whole(piece):
            self.ledger.committed(piece)
        else:
            self._return(piece, report.outcomes)

    def _died(self, death: Died) -> None:
        """Queue again what the actor had, and give up the row that has killed for the second time."""
        if not death.member.ready and self.started is None and not death.node_lost:
            self.deaths_while_loading += 1
            if self.deaths_while_loading > 1:
                raise JobError(
                    f"Actors died twice while they loaded {self.model} and none has loaded "
                    f"it yet, the last with: {death.words}"
                )
        pieces = list(reversed(death.member.pieces))
        shards = ",".join(str(piece.shard) for piece in pieces) or "none"
        if death.node_lost:
            logger.warning("shards=%s a node was lost; others take over", shards)
            for piece in pieces:
                self.ledger.requeue(piece)
            return
        logger.warning("shards=%s an actor died (%s); another takes over", shards, death.words)
        self.deaths_in_a_row += 1
        if self.deaths_in_a_row > self.limits.max_deaths:
            raise JobError(
                f"{self.deaths_in_a_row} actors died one after another without finishing anything, "
                f"the last with: {death.words}"
            )
        for piece in pieces:
            if self.ledger.killed(piece):
                self._give_up(piece, death.words)
