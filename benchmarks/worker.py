"""Whether sampling waits for a slow store: `python -m benchmarks.worker --help`.

The driver, its actors, the S3 requests and the encoding of images are real. The engine is not: its pictures
are noise, which no format compresses, and it makes them at a steady pace as long as its slots are full. Every
PUT to the store takes as long as asked, however many there are at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from aae_batch.dataset.layouts import LAYOUTS
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.rewriting import writing
from aae_batch.generate.driver import GenerateJob
from aae_batch.generate.records import make_plan
from aae_batch.generate.settings import JobSettings
from aae_batch.generate.worker import GenerateTask, GenerateWorker
from aae_batch.job.cluster import start_ray, stop_ray
from aae_batch.job.driver import run_on_workers
from aae_batch.job.records import Loaded
from aae_batch.manifest.reader import open_manifest
from aae_batch.request import Request, Result
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.store.open import open_storage

BUCKET = "bucket"


# --- the store -----------------------------------------------------------------------------------


@contextmanager
def slow_s3(put_seconds: float) -> Iterator[str]:
    """Run an S3 whose PUTs take this long, in a process of its own. Yields its URL."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    server = spawn.Process(target=_serve, args=(there, put_seconds), daemon=True)
    server.start()
    there.close()  # so that the end of the server ends the wait for it
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        server.kill()
        server.join()


def _serve(port: Connection, put_seconds: float) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    s3 = DomainDispatcherApplication(create_backend_app)

    def app(environ: Any, start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "PUT":
            time.sleep(put_seconds)
        return s3(environ, start_response)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    port.send(server.server_port)
    server.serve_forever()


# --- the worker ----------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a worker saw of itself until its last row had a slot.

    Attributes:
        started: when the first row got a slot; `ended`: when the last one did.
        busy: slots in use, summed over time, in slot seconds.
        waited: seconds for which the engine's thread waited for room for a finished image.
        waiting: images that waited to be written, at most.
        cpu: seconds of CPU time since the engine was loaded.
        memory: the process's resident memory in bytes at the end of each shard, in order.
    """

    slots: int
    started: float = 0.0
    ended: float = 0.0
    busy: float = 0.0
    rows: int = 0
    waited: float = 0.0
    waiting: int = 0
    writers: int = 0
    cpu: float = 0.0
    memory: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.ended - self.started


class NoiseBatch:
    """As `aae_batch.sampling.engine.Batch` is fed and asked. A picture takes one step for each slot."""

    def __init__(self, step_seconds: float, side: int, seen: Seen) -> None:
        self.slots = seen.slots
        self.seconds: dict[str, float] = {}
        self._step_seconds, self._side, self._seen = step_seconds, side, seen
        self._samples: list[tuple[Request, int]] = []
        self._looked = 0.0
        self._busy = 0.0

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def free(self) -> int:
        return self.slots - len(self)

    def expect(self, requests: Iterable[Request]) -> int:
        return sum(1 for _ in requests)

    def add(self, request: Request) -> None:
        self._look()
        seen = self._seen
        seen.started = seen.started or self._looked
        seen.ended, seen.busy, seen.rows = self._looked, self._busy, seen.rows + 1
        self._samples.append((request, self.slots))

    def step(self) -> list[Result]:
        time.sleep(self._step_seconds)
        self._look()
        left = [(request, steps - 1) for request, steps in self._samples]
        self._samples = [(request, steps) for request, steps in left if steps]
        return [self._result(request) for request, steps in left if not steps]

    def _look(self) -> None:
        now = time.perf_counter()
        self._busy += len(self) * (now - self._looked) if self._looked else 0.0
        self._looked = now

    def _result(self, request: Request) -> Result:
        side = self._side
        image = Image.frombytes("RGB", (side, side), os.urandom(3 * side * side))
        return Result(request, image=image)


class NoiseEngine:
    model = SimpleNamespace(device=SimpleNamespace(type="cpu"), dtype="float32")

    def __init__(self, batch: NoiseBatch) -> None:
        self._batch = batch

    @contextmanager
    def open(self, config: GuidanceConfig) -> Iterator[NoiseBatch]:
        yield self._batch


def measured_worker(rate: float, side: int, told: str) -> type[GenerateWorker]:
    """Return a worker that makes `rate` pictures a second, and writes what it has seen into the folder
    `told` whenever it has finished a shard."""

    class MeasuredWorker(GenerateWorker):
        def load(self) -> Loaded:
            self.context = replace(self.context, threads=None)  # they are torch's
            self._telling = threading.Lock()
            assert self.settings.slots != "auto"
            self.seen = Seen(self.settings.slots)
            loaded = super().load()
            self._cpu = time.process_time()
            return loaded

        def load_engine(self) -> Any:
            return NoiseEngine(NoiseBatch(1 / rate, side, self.seen))

        def _finish(self, flight: Any, result: Result) -> None:
            start = time.perf_counter()
            super()._finish(flight, result)
            self.seen.waited += time.perf_counter() - start
            self.seen.waiting = max(self.seen.waiting, self._writers.waiting)

        def work(self, task: GenerateTask) -> Any:
            outcomes = super().work(task)
            with self._telling:
                self.seen.memory.append(psutil.Process().memory_info().rss)
                self.seen.cpu = time.process_time() - self._cpu
                self.seen.writers = sum(t.name == "writer" for t in threading.enumerate())
                Path(told, f"{os.getpid()}.json").write_text(json.dumps(asdict(self.seen)))
            return outcomes

    return MeasuredWorker


# --- the measurement -----------------------------------------------------------------------------


def measured(options: argparse.Namespace, layout: str, put_ms: float) -> list[Seen]:
    """Run a job into a slow store, and return what each worker saw."""
    with tempfile.TemporaryDirectory() as folder, slow_s3(put_ms / 1000) as endpoint:
        shards = options.workers * options.shards
        rows = shards * options.shard_size
        manifest = Path(folder) / "manifest.parquet"
        pq.write_table(
            pa.table({"prompt": [f"a cat and a frog, {i}" for i in range(rows)]}), manifest
        )
        _s3(endpoint).create_bucket(Bucket=BUCKET)
        settings = JobSettings(
            manifest=str(manifest),
            output=f"s3://{BUCKET}/out",
            guidance=GuidanceConfig(),
            shard_size=options.shard_size,
            slots=options.slots,
            layout=layout,
            actors=(options.workers, options.workers),
            s3_endpoint=endpoint,
        )
        storage = open_storage(settings.output, endpoint)
        told = Path(folder) / "told"
        told.mkdir()
        worker_class = measured_worker(options.rate, options.side, str(told))
        with open_manifest(manifest) as opened, writing(storage) as lock:
            plan = make_plan(settings, opened, storage)
            job = GenerateJob(settings, plan, opened, Dataset(storage), worker_class)
            run_on_workers(job, lock, lambda progress: None)
        assert len(Dataset(storage).shards()) == shards
        return [Seen(**json.loads(path.read_text())) for path in told.iterdir()]


def _s3(endpoint: str) -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=endpoint)


def line(layout: str, put_ms: float, seen: list[Seen]) -> str:
    """Return a line of the table: means over the workers, and the worst of them."""
    seconds = sum(worker.seconds for worker in seen)
    early = max(worker.memory[len(worker.memory) // 3] for worker in seen) / 2**20
    late = max(worker.memory[-1] for worker in seen) / 2**20
    cells = [
        layout,
        f"{put_ms:g}",
        f"{sum(worker.rows for worker in seen) / seconds:.1f}",
        f"{sum(worker.waited for worker in seen) / seconds:.1%}",
        f"{sum(worker.busy / worker.slots for worker in seen) / seconds:.1%}",
        f"{max(worker.waiting for worker in seen)}",
        f"{max(worker.writers for worker in seen)}",
        f"{early:.0f}, {late:.0f}",
        f"{sum(worker.cpu for worker in seen) / max(worker.seconds for worker in seen):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = """\
| layout | a PUT, ms | pictures/s a worker | sampling waited | slots in use | images waiting | writers \
| memory early and late, MiB | cores |
|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.worker",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--workers", type=int, default=8, help="actors on this machine")
    add("--rate", type=float, default=10, help="pictures a second of each, with all slots in use")
    add("--slots", type=int, default=8, help="pictures in progress in each")
    add("--side", type=int, default=64, help="pixels of a picture's side; a core encodes about 20 "
        "pictures of 512 in a second")  # fmt: skip
    add("--shards", type=int, default=6, help="shards for each worker")
    add("--shard-size", type=int, default=32, help="pictures in each")
    add("--put-ms", type=float, nargs="+", default=[100, 500], help="how long a PUT takes")
    add("--layouts", nargs="+", choices=[*LAYOUTS], default=[*LAYOUTS])
    options = parser.parse_args()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    start_ray(num_cpus=options.workers, num_gpus=0, log_to_driver=False)
    try:
        print(HEAD)
        for layout in options.layouts:
            for put_ms in options.put_ms:
                print(line(layout, put_ms, measured(options, layout, put_ms)), flush=True)
    finally:
        stop_ray()


if __name__ == "__main__":
    main()
