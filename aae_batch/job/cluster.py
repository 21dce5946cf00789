"""Join or start Ray, and decide what each worker gets of a machine."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import stat
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from aae_batch.errors import JobError
from aae_batch.job.settings import ActorSettings

logger = logging.getLogger("aae_batch.job")

CONNECT_SECONDS = 10.0

QUIET = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}


@dataclass(frozen=True)
class WorkerPlan:
    """The number of workers, and the resources of each.

    Attributes:
        least: requested even if the cluster has no room, which makes an autoscaling cluster grow.
        most: None for as many as there is room for.
        threads: torch's threads in each worker; None keeps torch's default.
    """

    least: int
    most: int | None
    cpus: float
    gpus: float
    threads: int | None

    @classmethod
    def of(cls, wanted: tuple[int, int] | None, gpus_per_worker: float, cores: int) -> WorkerPlan:
        """Plan one worker per GPU. Without GPUs, plan one worker, or as many as `wanted`,
        sharing all cores."""
        if gpus_per_worker:
            least, most = wanted or (1, None)
            return cls(least, most, cpus=1, gpus=gpus_per_worker, threads=None)
        least, most = wanted or (1, 1)
        return cls(least, most, cpus=1, gpus=0, threads=max(1, cores // most))


@contextmanager
def cluster(settings: ActorSettings) -> Iterator[WorkerPlan]:
    """Use the Ray cluster already joined, or join the configured one, or start one on this
    machine."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    ours = not ray.is_initialized()
    printed = ray_worker.print_to_stdstream
    if ours:
        ray_worker.print_to_stdstream = _log
        close_token_file()
        logging.getLogger("ray").setLevel(logging.ERROR)
        address = settings.ray_address or _address_of_environment()
        if address is not None:
            _join(address)
        else:
            # Every worker requests one CPU; the user may choose more workers than cores.
            most = settings.actors[1] if settings.actors else 1
            start_ray(num_cpus=max(cores, most), **QUIET)
    try:
        plan = WorkerPlan.of(settings.actors, _gpus_per_worker(settings), cores)
        asked = os.environ.get("OMP_NUM_THREADS", "")  # in workers, Ray overrides it
        if plan.threads is not None and asked.isdigit():
            plan = replace(plan, threads=min(plan.threads, max(1, int(asked))))
        yield plan
    finally:
        if ours:
            stop_ray()
            ray_worker.print_to_stdstream = printed


def _log(data: dict[str, Any], ignore_prefix: bool) -> None:
    """Log what Ray would print of its own processes. What a user must know, the driver says."""
    for line in data["lines"]:
        logging.getLogger("aae_batch.ray").info("%s: %s", data["pid"], line)


def _address_of_environment() -> str | None:
    """Return the cluster that `RAY_ADDRESS` names, if it names one."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return None
    if address.startswith(("http://", "https://")):
        logger.warning(
            "RAY_ADDRESS is %s, which is for `ray job submit`: this job runs on this machine alone",
            address,
        )
        return None
    logger.warning("joining Ray at %s, which RAY_ADDRESS names", address)
    return address


def _join(address: str) -> None:
    named = os.environ.get("RAY_ADDRESS") if address == "auto" else address
    host, _, port = (named or "").removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself would wait for minutes, and warn
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        with _without_warnings():
            ray.init(address=address, **QUIET)
    except Exception as error:  # Ray raises bare ones, too
        if "AuthenticationError" in f"{error!r} {error.__cause__}":
            raise JobError(
                f"Ray at {address} asks for another token: set RAY_AUTH_MODE=token, with its token in "
                "~/.ray/auth_token or RAY_AUTH_TOKEN."
            ) from error
        whose = ", as RAY_ADDRESS says" if named and named == os.environ.get("RAY_ADDRESS") else ""
        raise JobError(f"No Ray at {named or address}{whose}: {in_words(error)}.") from error


def _gpus_per_worker(settings: ActorSettings) -> float:
    """Return the configured value; else 1 if the device can be a GPU and the cluster has or will
    have one, else 0."""
    if settings.gpus_per_actor is not None:
        return settings.gpus_per_actor
    if settings.device.startswith("cuda"):
        return 1.0
    return 1.0 if settings.device == "auto" and ray.cluster_resources().get("GPU", 0) else 0.0


def start_ray(attempts: int = 3, **ray_settings: Any) -> None:
    """Start Ray on this machine, for this process and its workers only. Stop it with `stop_ray`.

    All its ports are on the loopback interface and require a token that is in no file. On a very
    busy machine Ray's own processes may time out waiting for each other, so it is tried `attempts`
    times.

    Raises:
        JobError: Ray does not start.
    """
    try:
        with _private_to_this_process(), _without_warnings():
            ray.init(address="local", include_dashboard=False, **ray_settings)
    except Exception as error:  # Ray raises bare ones, too
        stop_ray()
        if attempts == 1:
            raise JobError(f"Ray did not start: {in_words(error)}") from error
        start_ray(attempts - 1, **ray_settings)


def stop_ray() -> None:
    """Stop or leave Ray and forget its token, so that this process can join another cluster."""
    ray.shutdown()
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")  # reads RAY_AUTH_MODE again


@contextmanager
def _private_to_this_process() -> Iterator[None]:
    """Set the environment that Ray's processes inherit while they start, and restore it
    afterwards."""
    # With clusters disabled, Ray uses 127.0.0.1 as the machine's address and opens no port on another.
    # Passing 127.0.0.1 as the address does not work, because Ray replaces it.
    inherited = {
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    } | _short_temp_dir()
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


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep Ray's advice on its own environment variables and future versions from users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _short_temp_dir() -> dict[str, str]:
    """Return what keeps the paths of Ray's sockets within the 107 bytes that Linux has for them."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    if len(os.fsencode(os.environ.get(name, ""))) <= 107 - len(_SOCKET):
        return {}
    logger.warning("%s is too long for Ray's sockets: Ray's own files are in /tmp", name)
    return {"RAY_TMPDIR": "/tmp"}


_SOCKET = "/ray/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store.12345"
"""What Ray appends to its temporary folder, at most."""


def close_token_file() -> None:
    """Restrict `~/.ray/auth_token` to its owner, because Ray writes it readable by everybody."""
    path = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):  # it does not exist, or is not ours
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)


@dataclass
class Stop:
    """Whether the job was asked to stop, and when, by the monotonic clock."""

    since: float | None = None

    @property
    def requested(self) -> bool:
        return self.since is not None

    @property
    def seconds(self) -> float:
        """Seconds since the request; 0 without one."""
        return 0.0 if self.since is None else time.monotonic() - self.since


@contextmanager
def stop_on_signals(grace: float) -> Iterator[Stop]:
    """Ask the job to stop on Ctrl-C or on a scheduler's SIGTERM; a second signal interrupts it.

    Enter this after Ray has started, because Ray installs its own handlers.
    """
    stop = Stop()

    def ask(*_: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt("Stopped at once: complete shards are kept.")
        stop.since = time.monotonic()
        logger.warning(
            "stopping: what is in progress has %.0f s to finish; a second signal stops at once",
            grace,
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
    """Return an error's type and message in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__
