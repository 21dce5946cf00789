"""What every job records about itself in `run.json`."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import aae_batch
from aae_batch.dataset.run_record import fingerprint
from aae_batch.errors import JobError

AUTO = "auto"
RESOLVED = ("device", "dtype")
"""Settings that may be `auto` until a worker has loaded the model."""

_OF_SETTINGS = ("guidance", "image_format", "acceptance")

PACKAGES = ("torch", "diffusers", "transformers", "ray")


@dataclass(frozen=True)
class Loaded:
    """What a worker resolved the settings to: its device's type and its weights' dtype, e.g.
    `cuda` and `float16`. `dtype` is None without a model."""

    device: str = "cpu"
    dtype: str | None = None

    @classmethod
    def of(cls, model: Any) -> Loaded:
        """Read them from a torch model."""
        return cls(str(model.device.type), str(model.dtype).removeprefix("torch."))


def new_run(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the record of a run that begins now.

    Args:
        settings: everything that the results depend on.
    """
    return {
        "fingerprint": fingerprint(settings),
        "settings": settings,
        **more,
        "versions": versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def resolved(run: Mapping[str, Any], loaded: Loaded) -> dict[str, Any]:
    """Return the record with the settings resolved by the first worker."""
    found = {name: value for name, value in asdict(loaded).items() if name in run["settings"]}
    settings = run["settings"] | found
    return {**run, "fingerprint": fingerprint(settings), "settings": settings}


def check_loaded(run: Mapping[str, Any], loaded: Loaded) -> None:
    """Check that a worker resolved the settings as the run did.

    Raises:
        JobError: it did not, so its results would differ from the existing ones.
    """
    before = {name: run["settings"][name] for name in RESOLVED if name in run["settings"]}
    here = asdict(loaded)
    # Earlier versions recorded the settings as requested, including `auto`.
    changed = differences(before, {n: AUTO if before[n] == AUTO else here[n] for n in before})
    if changed:
        raise JobError(
            f"An actor has loaded the model differently from the first one ({'; '.join(changed)}): use "
            "the same hardware on all machines, or set --device and --dtype."
        )


def versions() -> dict[str, str]:
    """Return the versions of Python, this package, and the packages that results depend on."""
    found = {"python": platform.python_version(), "aae_batch": aae_batch.__version__}
    return found | {package: version(package) for package in PACKAGES}


def as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return `name: old -> new` for every value that differs."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict) and name in _OF_SETTINGS:
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {_short(before)} -> {_short(after)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return f"{text[:13]}...{text[-1]}" if isinstance(value, str) and len(value) == 64 else text
