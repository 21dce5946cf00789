"""When a worker gets its next piece: its slots stay full while a slow store commits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from aae_batch.generate.settings import JobSettings
from aae_batch.job.cluster import Stop
from aae_batch.job.driver import Driver
from aae_batch.job.plan import Piece
from aae_batch.job.pool import Done, Event, Ready, WorkerHandle
from aae_batch.job.progress import Tally
from aae_batch.job.records import Loaded
from aae_batch.job.worker import PIECES, PIECES_AT_ONCE, Task, Worker, WorkerContext
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.store.lock import Lock
from benchmarks.driver import SimulatedPool, job_of


class Committing(Worker):
    """Has all rows at once; a commit takes until the test lets it end."""

    def load(self) -> Loaded:
        raise NotImplementedError

    def work(self, task: Task) -> list:
        self.count(task.piece, Tally(done=1, before=len(task.piece) - 1))
        self.may_end.wait(60)
        return []


@pytest.fixture
def committing(tmp_path) -> Committing:
    settings = JobSettings(manifest="m.csv", output=str(tmp_path), guidance=GuidanceConfig())
    worker = Committing(WorkerContext(str(tmp_path), "", settings, {}, None))
    worker.may_end = threading.Event()
    return worker


def called(function, *arguments) -> Future:
    """Call it in a thread, as Ray does."""
    answer: Future = Future()
    thread = threading.Thread(target=lambda: answer.set_result(function(*arguments)), daemon=True)
    thread.start()
    return answer


def test_a_worker_says_when_only_the_commit_of_a_piece_is_left(committing):
    one, other = Piece(0, 0, 3), Piece(1, 3, 6)
    called(committing.perform, Task(one, "", commit=True))
    assert called(committing.finished, set()).result(20) == {one}
    next_time = called(committing.finished, {one})
    called(committing.perform, Task(other, "", commit=True))
    assert next_time.result(20) == {one, other}
    committing.may_end.set()


class SlowStore(SimulatedPool):
    """A worker's rows are finished whenever it is asked what has happened; of all the commits, only the
    oldest ends, and only when nothing else happens."""

    def __init__(self) -> None:
        super().__init__(1)
        self.held: list[tuple[int, int]] = []

    def events(self, seconds: float) -> Iterator[Event]:
        (worker,) = self.workers
        if self._ready:
            self._ready.clear()
            yield Ready(worker, Loaded("cpu", "float32"))
            return
        sampling = [piece for piece in worker.pieces if piece not in worker.finished]
        self.held.append((len(worker.pieces), len(sampling)))
        if sampling:
            worker.finished = {*worker.finished, sampling[0]}
        if not sampling or len(worker.finished) == PIECES:
            yield self._committed(worker, worker.pieces[0])

    def _committed(self, worker: WorkerHandle, piece: Piece) -> Done:
        del worker.calls[piece]
        worker.finished = worker.finished - {piece}
        return Done(worker, piece, Tally(len(piece)), [])


def test_a_worker_has_rows_for_its_slots_while_it_commits(tmp_path):
    pool = SlowStore()
    with job_of(tmp_path, shards=10, shard_size=2) as job:
        root = job.storage.root
        Driver(job, pool, Stop(), Lock(root), lambda progress: None).run()
    pieces, sampling = zip(*pool.held, strict=True)
    assert max(sampling) == PIECES_AT_ONCE
    assert max(pieces) == PIECES
    assert pool.held[:3] == [(2, 2), (3, 2), (4, 2)]
