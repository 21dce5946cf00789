"""The files a job writes beside its shards: `run.json`, which later runs are checked against,
`progress.json` and `summary.json`."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aae_batch.columns import TRIES_NAMES
from aae_batch.dataset import layout
from aae_batch.dataset.layouts import shard_of
from aae_batch.dataset.outcome import Outcome
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.run_record import (
    MANIFEST_RULES,
    Shards,
    own_columns,
    reads_manifest_alike,
    sealed,
    tries_again,
)
from aae_batch.dataset.tries import OF_ROWS, OF_TRIES, WORDS, TryCounts
from aae_batch.dataset.verify_shard import unlike_manifest
from aae_batch.errors import ManifestError, OutputError, SettingsError
from aae_batch.generate.settings import JobSettings
from aae_batch.job.plan import JobPlan, Ledger
from aae_batch.job.progress import Progress, shortened
from aae_batch.job.records import AUTO, RESOLVED, as_json, differences, new_run, versions
from aae_batch.manifest.reader import Manifest
from aae_batch.methods import DEFAULT, Steering
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.store.base import Storage, is_url

MAKERS = ("aae_batch", "torch", "diffusers", "transformers")
"""Packages whose versions affect the images."""


@dataclass(frozen=True)
class Plan(JobPlan[Outcome]):
    """What a job has to do, given its existing output.

    Attributes:
        committed: shards that are done.
        again: rows of committed shards to generate again, as manifest indices.
    """

    committed: frozenset[int]
    again: dict[int, list[int]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.run["rows"]

    @property
    def shard_size(self) -> int:
        return self.run["shard_size"]

    def retrying(self, dataset: Dataset) -> Plan:
        """Return the plan with failed rows to be generated again."""
        failed = dataset.failed_rows().items()
        size = self.shard_size
        again = {shard: [shard * size + place for place in places] for shard, places in failed}
        return replace(self, again=again)

    def ledger(self) -> Ledger[Outcome]:
        return Ledger.of(self.rows, self.shard_size, self.committed, self.again)


def make_plan(settings: JobSettings, manifest: Manifest, storage: Storage) -> Plan:
    """Check a job against its output, and plan what is left.

    Raises:
        OutputError: the output belongs to another run, or was not made by a run.
    """
    if settings.acceptance is not None:
        _refuse_columns_of_tries(manifest)
    pixels = settings.pixels(manifest.digest)
    dataset = Dataset(storage)
    before = dataset.run
    there = storage.anything(besides=_own_manifest(manifest, storage))
    if before is None:
        if there is not None:
            raise OutputError(
                f"{storage.root} is not empty (it has {there}) and has no {layout.RUN}, so no run made it: "
                "choose another output."
            )
        form = settings.form({})
        of_manifest = {"manifest": manifest.name, "manifest_rules": MANIFEST_RULES}
        run = new_run(pixels, **form, rows=len(manifest), **of_manifest, counts_forwards=True)
        return Plan(run, begun=False, committed=frozenset())
    found = before["settings"]
    pixels |= {name: found.get(name, AUTO) for name in RESOLVED if pixels[name] == AUTO}
    form = settings.form(before)
    found, pixels = _comparable(found, pixels)
    # What methods are steered by derives from other settings: only if nothing else differs, it is
    # another version that steers one of them differently.
    steering = differences(found.pop("steering"), pixels.pop("steering"), "steering.")
    changed = differences(found, pixels) or steering
    changed += differences({name: before.get(name) for name in form}, form)
    if changed:
        raise OutputError(
            f"{storage.root} was begun with other settings ({'; '.join(changed)}): choose another "
            "output, or go back to these settings to finish it."
        )
    _check_versions(before, settings.other_versions)
    if not reads_manifest_alike(before):
        _check_reading(dataset, before, manifest)
    return Plan(before, begun=True, committed=frozenset(dataset.shards()))


def _check_reading(dataset: Dataset, run: Mapping[str, Any], manifest: Manifest) -> None:
    """Check that the committed shards of a run hold the manifest as this version reads it.

    Raises:
        OutputError: they do not, so that the rest would not fit them.
    """
    planned, committed = Shards.of(run), dataset.shards()
    for shard, table in zip(committed, dataset.tables(shards=committed), strict=True):
        rows = planned[shard]
        if table.num_rows != len(rows):  # damaged, as `verify` says
            continue
        into = shard_of(run, dataset.storage, shard)
        own = into.metadata_schema(pa.schema([])).names
        columns = {field.name: field.type for field in table.schema if field.name not in own}
        wanted = {field.name: field.type for field in manifest.extras}
        unlike = unlike_manifest(run, manifest.part(rows.start, rows.stop), table)
        row, what = next(unlike, (None, ""))
        if columns != wanted and not what:
            name = next(n for n in [*columns, *wanted] if columns.get(n) != wanted.get(n))
            one, other = (kinds.get(name, "missing") for kinds in (columns, wanted))
            what = f"its column {name} is {one}, and in the manifest {other}"
        if what:
            where = f"shard {shard}" if row is None else f"row {row}"
            version = run.get("versions", {}).get("aae_batch", "unknown")
            raise OutputError(
                f"{dataset.storage.root} was begun by an earlier version, which read {manifest.path} "
                f"otherwise ({where}: {what}): finish it with that version (aae_batch {version}, "
                f"used on {run.get('started', 'an unknown day')[:10]}), or choose another output."
            )


def _own_manifest(manifest: Manifest, storage: Storage) -> str:
    """Return the manifest's name if it lies in the output, as that of `aae-batch make` does; else ""."""
    place = manifest.path if is_url(manifest.path) else os.path.abspath(manifest.path)
    return manifest.name if place == storage.place(manifest.name) else ""


def _refuse_columns_of_tries(manifest: Manifest) -> None:
    """Raise a ManifestError if the manifest has a column that this run adds."""
    for name in manifest.extras.names:
        if name.lower() in TRIES_NAMES:
            raise ManifestError(
                f"Manifest {manifest.path} has a column {name}, a name that a run with several tries a "
                f"row adds; rename it, e.g. to my_{name}."
            )


def _comparable(
    found: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a run and of a job without what only one of two versions, or of two
    machines, can know: methods, and names of settings that the run's version did not have."""
    # Earlier versions could neither choose a variant, add a LoRA, nor judge.
    before = {"variant": None, "lora": [], "lora_weights": {}, "acceptance": None, **found}
    here = {**now, "guidance": dict(now["guidance"])}
    # A version with one guided method had its steering among the guidance.
    if "steering" not in before:
        steering = here["steering"][DEFAULT]
        before |= {"steering": {}, "plugin_versions": {}, "plugin": []}
        here["guidance"] |= steering
        before["guidance"] = {**here["guidance"], **before["guidance"]}
    # A setting that its version did not have was as it is by default.
    with suppress(SettingsError):
        before["guidance"] = GuidanceConfig(**before["guidance"]).model_dump(mode="json")
    before["steering"] = {
        method: {**asdict(Steering()), **steering}
        for method, steering in before["steering"].items()
    }
    for name in ("steering", "plugin_versions"):
        here[name] = {method: here[name].get(method) for method in before[name]}
    return before, here | {"plugin": before["plugin"]}


def _check_versions(run: Mapping[str, Any], accepted: bool) -> None:
    """Check the versions of the packages that affect images.

    Raises:
        OutputError: the run was begun with other versions, and they were not accepted.
    """
    before, here = run.get("versions", {}), versions()
    changed = differences(
        {name: before.get(name) for name in MAKERS}, {name: here[name] for name in MAKERS}
    )
    if changed and not accepted:
        raise OutputError(
            f"The run was begun with other versions ({'; '.join(changed)}), and images may differ: "
            "install those, or add --other-versions to continue anyway."
        )


def summarize(dataset: Dataset, session: dict[str, Any] | None) -> dict[str, Any]:
    """Count the rows of a complete dataset, from its tables."""
    methods: dict[str, Counter[str]] = defaultdict(Counter)
    failures: Counter[str] = Counter()
    examples: dict[str, str] = {}
    columns = [
        "method",
        "status",
        "error_type",
        "error",
        "num_refinements",
        "neglected",
        "forwards",
    ]
    if (run := dataset.run) is not None:
        columns = own_columns(run, columns)
    for table in dataset.tables(columns):
        for row in table.filter(pc.field("error_type").is_valid()).to_pylist():
            failures[row["error_type"]] += 1
            examples.setdefault(row["error_type"], shortened(row["error"] or ""))
        summed = [name for name in columns[4:] if name in table.column_names]
        ok = table.filter(pc.field("status") == "ok").group_by("method")
        counts = ok.aggregate([([], "count_all"), *((name, "sum") for name in summed)])
        for row in counts.to_pylist():
            methods[row["method"]] += Counter(
                images=row["count_all"],
                refinements=row["num_refinements_sum"] or 0,
                neglected=row["neglected_sum"] or 0,
                forwards=row.get("forwards_sum") or 0,
            )
    images = sum(counts["images"] for counts in methods.values())
    return {
        "rows": images + sum(failures.values()),
        "images": images,
        "failed": sum(failures.values()),
        "failures": dict(failures.most_common()),
        "examples": examples,
        "methods": {
            method: {
                "images": counts["images"],
                "mean_refinements": round(counts["refinements"] / counts["images"], 3),
                "mean_forwards": round(counts["forwards"] / counts["images"], 1) or None,
                "neglected": counts["neglected"],
            }
            for method, counts in sorted(methods.items())
        },
        **({"acceptance": tried} if (tried := count_tries(dataset)) else {}),
        "last_session": session,
    }


def count_tries(dataset: Dataset) -> dict[str, Any] | None:
    """Count what became of rows that were tried several times, and what it cost; None if they were not.

    Costs are as in the column `forwards`.
    """
    if dataset.run is None or not tries_again(dataset.run):
        return None
    tally = TryCounts()
    shards = dataset.shards()
    for shard, table in zip(shards, dataset.tables(OF_ROWS, shards), strict=True):
        tally.add(table, dataset.tries_of(shard, OF_TRIES))
    rows, rungs = tally.rows, tally.rungs
    nursed = next((rung for rung in rungs.values() if rung["nursed"]), None)
    forwards = sum(rung["forwards"] for rung in rungs.values())
    images = max(1, sum(rows[word] for word in WORDS.values()))
    of_all = nursed and nursed["nursing"] / nursed["nursed"]
    return {
        **{word: rows[word] for word in (*WORDS.values(), "dropped")},
        "tries": tally.tries,
        "forwards_an_image": round(forwards / images, 1),
        "forwards_nursing_each_row_once": of_all and round(of_all, 1),
        "rungs": {
            method: {name: counts[name] for name in ("tries", "settled", "given_up", "forwards")}
            for method, counts in rungs.items()
        },
    }


def progress_record(
    progress: Progress, failures: Mapping[str, int], now: float
) -> layout.ProgressRecord:
    """Return the content of `progress.json`.

    Args:
        failures: failed rows by `error_type`, including `earlier_failures`.
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
    """Return failed rows by `error_type`, as the last session left them in `progress.json`."""
    record = dataset.progress
    return Counter() if record is None else Counter(record["failures"])


def begin(storage: Storage, run: Mapping[str, Any]) -> None:
    """Write `run.json`, which claims the output for this run.

    Raises:
        OutputError: another run has begun there meanwhile.
    """
    record = as_json(sealed(run))
    if not storage.create_bytes(layout.RUN, record) and storage.read_bytes(layout.RUN) != record:
        raise OutputError(f"Another run has begun in {storage.root}: choose another output.")
