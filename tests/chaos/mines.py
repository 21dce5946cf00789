"""Mines in the way of a process: at a write or a deletion of its storage it ends, or falls asleep.

A mine is a file in the folder that `AAE_CHAOS_MINES` names. The first process that comes by takes it,
by renaming it, and then does to itself what it says: so each mine goes off once, at a known place, and
whoever laid it sees that it did. What processes do to their storages is also noted, in `trace`.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from uuid import uuid4

FOLDER = "AAE_CHAOS_MINES"
LEASE = "AAE_CHAOS_LEASE"
"""Seconds between renewals of a bucket's lock, and after which it belongs to nobody: `1,5`."""

_CHANGES = re.compile(r"(write|delete|create|put|replace|copy|append|rename|move|remove)(_\w+)?")


@dataclass(frozen=True)
class Mine:
    """
    Attributes:
        who: driver or actor.
        when: before a change of the storage, amid it, or after it.
        verb: the first word of the storage's method, e.g. write; or any.
        place: what the object's name begins with up to the first slash; or any.
    """

    who: str
    when: str
    verb: str = "any"
    place: str = "any"

    def lay(self, folder: Path) -> Path:
        path = folder / "laid" / "~".join([*astuple(self), uuid4().hex[:6]])
        path.touch()
        return path

    def met(self, who: str, when: str, verb: str, place: str) -> bool:
        return (
            (self.who, self.when) == (who, when)
            and self.verb in ("any", verb)
            and self.place in ("any", place)
        )


def prepare(folder: Path) -> None:
    for name in ("laid", "gone-off"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "trace").touch()


def watch(who: str, *roots: str) -> None:
    """From now on, changes of storages such as those of `roots` are noted, and meet mines."""
    if FOLDER not in os.environ:
        return
    from aae_batch.store.open import open_storage

    _set_lease()
    for root in roots:
        kind = type(open_storage(root))
        for name in dir(kind):
            method = getattr(kind, name)
            change = _CHANGES.fullmatch(name)
            if change and callable(method) and not hasattr(method, "mined"):
                setattr(kind, name, _mined(method, who, change.group(1)))


def _mined(method: Callable[..., Any], who: str, verb: str) -> Callable[..., Any]:
    @wraps(method)
    def mined(self: Any, name: Any = "", *more: Any, **named: Any) -> Any:
        place = str(name).partition("/")[0]
        _note(f"{who} {verb} {name}")
        _meet(who, "before", verb, place)
        _meet(who, "amid", verb, place)
        done = method(self, name, *more, **named)
        _meet(who, "after", verb, place)
        return done

    mined.mined = True  # type: ignore[attr-defined]
    return mined


def _meet(who: str, when: str, verb: str, place: str) -> None:
    folder = Path(os.environ[FOLDER])
    for name in os.listdir(folder / "laid"):
        mine = Mine(*name.split("~")[:4])
        if not mine.met(who, when, verb, place) or random.random() < 0.5:
            continue
        try:
            os.rename(folder / "laid" / name, folder / "gone-off" / f"{name}~{os.getpid()}")
        except FileNotFoundError:  # another was quicker
            continue
        if when == "amid":
            threading.Thread(target=_die_soon, daemon=True).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def _die_soon() -> None:
    time.sleep(random.uniform(0, 0.004))
    os.kill(os.getpid(), signal.SIGKILL)


def _note(text: str) -> None:
    line = f"{time.monotonic():.3f} {os.getpid()} {text}\n".encode()
    trace = os.open(Path(os.environ[FOLDER], "trace"), os.O_WRONLY | os.O_APPEND)
    try:
        os.write(trace, line)
    finally:
        os.close(trace)


def _set_lease() -> None:
    """The times of a bucket's lock, so that nobody waits 90 s for what 5 show as well."""
    if LEASE in os.environ:
        from aae_batch.store.lock import TIMING

        renew, stale = map(float, os.environ[LEASE].split(","))
        object.__setattr__(TIMING, "renew", renew)
        object.__setattr__(TIMING, "stale", stale)
