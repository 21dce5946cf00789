"""Ray, and what each worker gets of a machine."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from aae_batch.errors import JobError
from aae_batch.job.settings import ActorSettings

QUIET = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers, and what of a machine each takes.

    Attributes:
        least: asked for even where the cluster has no room, which makes one that scales grow.
        most: None for as many as there is room for.
        threads: of torch in each; None leaves them as they are.
    """

    least: int
    most: int | None
    cpus: float
    gpus: float
    threads: int | None

    @classmethod
    def of(cls, wanted: tuple[int, int] | None, gpus_per_worker: float, cores: int) -> WorkerPlan:
        """One worker per GPU; without GPUs one worker with all cores, or as many as are wanted, which
        share the cores."""
        if gpus_per_worker:
            least, most = wanted or (1, None)
            return cls(least, most, cpus=1, gpus=gpus_per_worker, threads=None)
        least, most = wanted or (1, 1)
        return cls(least, most, cpus=1, gpus=0, threads=max(1, cores // most))


@contextmanager
def cluster(settings: ActorSettings) -> Iterator[WorkerPlan]:
    """Join the cluster, or one that is already joined, or start one on this machine."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    ours = not ray.is_initialized()
    if ours:
        close_token_file()
        logging.getLogger("ray").setLevel(logging.ERROR)
        if settings.ray_address is not None:
            _join(settings.ray_address)
        else:
            # Every worker asks for one CPU; more of them than cores is a person's own choice.
            most = settings.actors[1] if settings.actors else 1
            start_ray(num_cpus=max(cores, most), **QUIET)
    try:
        plan = WorkerPlan.of(settings.actors, _gpus_per_worker(settings), cores)
        asked = os.environ.get("OMP_NUM_THREADS", "")  # inside the workers, Ray sets one of its own
        if plan.threads is not None and asked.isdigit():
            plan = replace(plan, threads=min(plan.threads, max(1, int(asked))))
        yield plan
    finally:
        if ours:
            stop_ray()


def _join(address: str) -> None:
    try:
        ray.init(address=address, **QUIET)
    except Exception as error:  # Ray raises bare ones, too
        if "AuthenticationError" in f"{error!r} {error.__cause__}":
            raise JobError(
                f"Ray at {address} asks for another token: set RAY_AUTH_MODE=token, with its token in "
                "~/.ray/auth_token or RAY_AUTH_TOKEN."
            ) from error
        raise JobError(f"No Ray at {address}: {in_words(error)}") from error


def _gpus_per_worker(settings: ActorSettings) -> float:
    """As was said; else one, where the device can be a GPU and the cluster has or will have any."""
    if settings.gpus_per_actor is not None:
        return settings.gpus_per_actor
    if settings.device.startswith("cuda"):
        return 1.0
    return 1.0 if settings.device == "auto" and ray.cluster_resources().get("GPU", 0) else 0.0


def start_ray(attempts: int = 3, **ray_settings: Any) -> None:
    """Start Ray on this machine, for this process and its workers alone: every port of it is on the
    loopback interface, and asks for a token that no file holds. To be ended by `stop_ray`.

    Where the machine is very busy, Ray's own processes may wait for each other in vain, so it is
    tried again.

    Raises:
        JobError: it does not start.
    """
    try:
        with _private_to_this_process():
            ray.init(address="local", include_dashboard=False, **ray_settings)
    except Exception as error:  # Ray raises bare ones, too
        stop_ray()
        if attempts == 1:
            raise JobError(f"Ray did not start: {in_words(error)}") from error
        start_ray(attempts - 1, **ray_settings)


def stop_ray() -> None:
    """End or leave Ray, and forget its token, so that this process can join another one."""
    ray.shutdown()
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")  # reads RAY_AUTH_MODE again


@contextmanager
def _private_to_this_process() -> Iterator[None]:
    """What Ray's processes are to inherit while they start. Nothing of it stays in our environment."""
    # Where Ray believes that it cannot be a cluster, it takes 127.0.0.1 for the machine's address and
    # opens nothing on another; it replaces an address of 127.0.0.1 that it is given.
    inherited = {
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    before = {name: os.environ.get(name) for name in inherited}
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(inherited)
    ray_constants.ENABLE_RAY_CLUSTER = False
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def close_token_file() -> None:
    """Ray writes `~/.ray/auth_token` readable by everybody: leave it to its owner alone."""
    path = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):  # there is none, or it is not ours
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)


@dataclass
class Stop:
    """Whether the job was told to stop, and when, by the monotonic clock."""

    since: float | None = None

    @property
    def requested(self) -> bool:
        return self.since is not None

    @property
    def seconds(self) -> float:
        """Since it was told."""
        return 0.0 if self.since is None else time.monotonic() - self.since


@contextmanager
def stop_on_signals(grace: float) -> Iterator[Stop]:
    """Ctrl-C, and SIGTERM, a scheduler's polite end of a job, ask the job to stop; the second of them
    interrupts it. To be entered when Ray has started, which puts handlers of its own there."""
    stop = Stop()

    def ask(*_: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.since = time.monotonic()
        logging.getLogger("aae_batch.job").warning(
            "stopping: shards under way have %.0f s to finish; a second signal stops at once", grace
        )

    ours = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if ours else ()
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_words(error: BaseException) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
