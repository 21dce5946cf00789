"""What a job leaves beside its shards: `run.json`, which a later run is held against, and `summary.json`."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import pyarrow.compute as pc

import aae_batch
from aae_batch.dataset import layout, writer
from aae_batch.dataset.image_format import ImageFormat
from aae_batch.dataset.layout import Layout
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.storage import Storage
from aae_batch.errors import OutputError
from aae_batch.job.plan import Ledger
from aae_batch.job.progress import Progress
from aae_batch.job.settings import JobSettings, differences, fingerprint
from aae_batch.manifest import Manifest


@dataclass(frozen=True)
class Plan:
    """What a job comes to, given what its output already holds.

    Attributes:
        run: what `run.json` says or is going to say.
        begun: the output has shards of this run already.
        committed: shards that are done.
        again: of these, rows that are to be made again, as places in the manifest.
    """

    run: dict[str, Any]
    begun: bool
    committed: frozenset[int]
    again: dict[int, list[int]] = field(default_factory=dict)

    @property
    def shard_size(self) -> int:
        return self.run["shard_size"]

    @property
    def layout(self) -> Layout:
        return self.run["layout"]

    @property
    def image_format(self) -> ImageFormat:
        return ImageFormat(**self.run["image_format"])

    def retrying(self, dataset: Dataset) -> Plan:
        """The same, with the rows that have failed to be made again."""
        failed = dataset.failed_rows().items()
        size = self.shard_size
        again = {shard: [shard * size + place for place in places] for shard, places in failed}
        return replace(self, again=again)

    def ledger(self) -> Ledger[writer.Outcome]:
        return Ledger.of(self.run["rows"], self.shard_size, self.committed, self.again)


def make_plan(settings: JobSettings, manifest: Manifest, storage: Storage) -> Plan:
    """Hold a job against its output.

    Raises:
        OutputError: the output belongs to another run.
    """
    pixels = settings.pixels(manifest.digest)
    dataset = Dataset(storage)
    before = dataset.run
    committed = frozenset(dataset.shards())
    if before is None and committed:
        raise OutputError(
            f"{storage.root} holds metadata but no {layout.RUN}, so there is no telling what made "
            "it; choose another output."
        )
    if before is None and any(storage.list(prefix) for prefix in (layout.IMAGES, layout.ATTENTION)):
        raise OutputError(
            f"{storage.root} holds {layout.IMAGES} or {layout.ATTENTION} of someone else's, which a run "
            "would write over; choose another output."
        )
    if before is None or not committed:  # nothing is lost by beginning anew
        run = {
            "fingerprint": fingerprint(pixels),
            "settings": pixels,
            **settings.form({}),
            "rows": len(manifest),
            "manifest": manifest.name,
            "versions": versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return Plan(run, begun=False, committed=committed)
    form = settings.form(before)
    changed = differences(before.get("settings", {}), pixels)
    changed += differences({name: before.get(name) for name in form}, form)
    if changed:
        raise OutputError(
            f"{storage.root} was begun with other settings ({'; '.join(changed)}): choose another "
            "output, or go back to these settings to finish it."
        )
    return Plan(before, begun=True, committed=committed)


def summarize(dataset: Dataset, session: dict[str, Any] | None) -> dict[str, Any]:
    """Counts over a complete dataset, from its tables."""
    methods: dict[str, Counter[str]] = defaultdict(Counter)
    failures: Counter[str] = Counter()
    for table in dataset.tables(
        ["method", "status", "error_type", "num_refinements", "neglected", "seconds"]
    ):
        failures.update(table["error_type"].drop_null().to_pylist())
        ok = table.filter(pc.equal(table["status"], "ok"))
        for method in pc.unique(ok["method"]).to_pylist():
            part = ok.filter(pc.equal(ok["method"], method))
            methods[method]["images"] += part.num_rows
            methods[method]["refinements"] += pc.sum(part["num_refinements"]).as_py() or 0
            methods[method]["neglected"] += pc.sum(part["neglected"]).as_py() or 0
    images = sum(counts["images"] for counts in methods.values())
    return {
        "rows": images + sum(failures.values()),
        "images": images,
        "failed": sum(failures.values()),
        "failures": dict(failures.most_common()),
        "methods": {
            method: {
                "images": counts["images"],
                "mean_refinements": round(counts["refinements"] / counts["images"], 3),
                "neglected": counts["neglected"],
            }
            for method, counts in sorted(methods.items())
        },
        "last_session": session,
    }


def progress_record(
    progress: Progress, failures: Mapping[str, int], now: float
) -> layout.ProgressRecord:
    """What `progress.json` says.

    Args:
        failures: rows that failed, by `error_type`, those of `earlier_failures` included.
        now: seconds since 1970.
    """
    return {
        "time": datetime.fromtimestamp(now, timezone.utc).isoformat(timespec="seconds"),
        "rows": progress.total,
        "done": progress.done,
        "failures": dict(Counter(failures).most_common()),
        "images_per_second": round(progress.images_per_second, 3),
        "mean_refinements": round(progress.mean_refinements, 3),
        "eta_seconds": None if progress.eta is None else round(progress.eta, 1),
    }


def earlier_failures(dataset: Dataset) -> Counter[str]:
    """Failed rows by `error_type`, as the last session on this output has left them in
    `progress.json`."""
    record = dataset.progress
    return Counter() if record is None else Counter(record["failures"])


def versions() -> dict[str, str]:
    """Of Python, this package, and those that results depend on."""
    packages = ("torch", "diffusers", "transformers", "ray")
    found = {"python": platform.python_version(), "aae_batch": aae_batch.__version__}
    return found | {package: version(package) for package in packages}


def begin(storage: Storage, plan: Plan) -> None:
    """Write `run.json`, and remove what a run that committed nothing has left."""
    for prefix in (layout.IMAGES, layout.ATTENTION):
        for name in storage.list(prefix):
            storage.delete(name)
    storage.delete(layout.PROGRESS)
    storage.write_bytes(layout.RUN, as_json(plan.run))


def as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
