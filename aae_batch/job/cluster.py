"""Ray, and what each actor gets of a machine."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray

from aae_batch.errors import JobError
from aae_batch.job.settings import JobSettings


@dataclass(frozen=True)
class ActorPlan:
    """How many actors, and what of a machine each takes."""

    count: int
    cpus: float
    gpus: float
    threads: int | None

    @classmethod
    def of(cls, wanted: int | None, gpus: int, cores: int) -> ActorPlan:
        """One actor per GPU; without GPUs one actor with all cores, or as many as are wanted, which
        share the cores."""
        if gpus:
            return cls(wanted or gpus, cpus=1, gpus=1, threads=None)
        count = wanted or 1
        return cls(count, cpus=1, gpus=0, threads=max(1, cores // count))


@contextmanager
def cluster(settings: JobSettings) -> Iterator[ActorPlan]:
    """Join the cluster, or one that is already joined, or start one on this machine."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    ours = not ray.is_initialized()
    if ours:
        local = settings.ray_address is None
        logging.getLogger("ray").setLevel(logging.ERROR)
        ray_settings = {
            "logging_level": logging.ERROR,
            "log_to_driver": False,
            "configure_logging": False,
        }
        if local:
            # Every actor asks for one CPU; more of them than cores is a person's own choice.
            start_ray(num_cpus=max(cores, settings.actors or 1), **ray_settings)
        else:
            try:
                ray.init(address=settings.ray_address, **ray_settings)
            except Exception as error:  # Ray raises bare ones, too
                raise JobError(f"No Ray at {settings.ray_address}: {in_words(error)}") from error
    try:
        wants_gpu = settings.device == "auto" or settings.device.startswith("cuda")
        gpus = math.floor(ray.cluster_resources().get("GPU", 0)) if wants_gpu else 0
        plan = ActorPlan.of(settings.actors, gpus, cores)
        asked = os.environ.get("OMP_NUM_THREADS", "")
        if (
            plan.threads is not None and asked.isdigit()
        ):  # inside the actors, Ray sets one of its own
            plan = replace(plan, threads=min(plan.threads, max(1, int(asked))))
        yield plan
    finally:
        if ours:
            ray.shutdown()


def start_ray(attempts: int = 3, **ray_settings: Any) -> None:
    """Start Ray on this machine. Where the machine is very busy, Ray's own processes may wait for
    each other in vain, so it is tried again.

    Raises:
        JobError: it does not start.
    """
    try:
        ray.init(address="local", include_dashboard=False, **ray_settings)
    except Exception as error:  # Ray raises bare ones, too
        ray.shutdown()
        if attempts == 1:
            raise JobError(f"Ray did not start: {in_words(error)}") from error
        start_ray(attempts - 1, **ray_settings)


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """A scheduler's polite end of a job is handled as Ctrl-C is. To be entered when Ray has started,
    which puts a handler of its own there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def in_words(error: BaseException) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
