"""Verify that an output matches its run's record. All of it is read, a few shards at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from aae_batch.dataset import layout, partial
from aae_batch.dataset.layout import Layout
from aae_batch.dataset.layouts import LAYOUTS, shard_of
from aae_batch.dataset.problem import Problem, not_ours
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.run_record import Shards
from aae_batch.dataset.verify_shard import ShardCheck
from aae_batch.errors import DroppedError, OutputError
from aae_batch.store.base import Storage
from aae_batch.store.read_ahead import read_ahead

if TYPE_CHECKING:
    from aae_batch.manifest.reader import Manifest


@dataclass
class Verification:
    """The result of verifying an output.

    Attributes:
        layout: None without a readable `run.json`.
        rows, shards: expected numbers.
        committed: number of committed shards.
        images: number of rows with an image.
        failures: rows without an image, by `error_type`.
        made_again: committed shards with rows in `partial/` that a stopped `--retry-failed` made again.
    """

    layout: Layout | None = None
    rows: int = 0
    shards: int = 0
    committed: int = 0
    images: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    made_again: list[int] = field(default_factory=list)

    @property
    def proved(self) -> bool:
        return not self.problems

    @property
    def only_incomplete(self) -> bool:
        """Whether parts are missing and everything that exists is correct."""
        return bool(self.problems) and all(p.kind == "missing" for p in self.problems)

    def advice(self, output: str) -> Iterator[str]:
        """Yield what to do about the problems and failures, a sentence each.

        Args:
            output: how the user names the output.
        """
        kinds = {problem.kind for problem in self.problems}
        if kinds & {"broken", "stray", "summary"}:
            yield (
                f"Run `aae-batch verify {output} --repair`, which lists what is broken and asks before it "
                "deletes that, and then the same `aae-batch generate` again."
            )
        elif [p.kind for p in self.problems].count("missing") > len(self.made_again):
            yield "Run the same `aae-batch generate` again to make what is missing."
        if self.made_again:
            yield (
                "Run the same `aae-batch generate` with --retry-failed again to use the rows that it made "
                "again before it was stopped."
            )
        if self.failures.keys() - {DroppedError.__name__} and not kinds:
            yield (
                "Add --retry-failed to the same `aae-batch generate` to try failed rows again; the column "
                "error in metadata says why they failed."
            )

    def __str__(self) -> str:
        state = (
            "proved" if self.proved else "incomplete" if self.only_incomplete else "problems found"
        )
        return (
            f"{self.committed} of {self.shards} shards, {self.rows} rows: {self.images} images, "
            f"{self.failures.total()} failed; {state}"
        )


def verify(
    storage: Storage,
    manifest: Manifest | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Check an output against its `run.json` and, if given, the manifest.

    Memory use is a few shards plus eight bytes per row. In the layout `files`, stray images are searched
    only in the folders of committed shards.

    Args:
        progress: called with the numbers of checked and of committed shards.

    Raises:
        OutputError: the storage cannot be read.
        ManifestError: the manifest cannot be read.
    """
    dataset = Dataset(storage)
    try:
        run = dataset.run
    except OutputError as error:
        return Verification(problems=[Problem("other", str(error))])
    if run is None:
        text = f"There is no {layout.RUN}, so the expected content is unknown."
        return Verification(problems=[Problem("other", text)])
    shards = Shards.of(run)
    found = Verification(run["layout"], shards.rows, len(shards))
    if manifest is not None and manifest.digest != run["settings"]["manifest"]:
        text = f"{manifest.path} is not the manifest of {layout.RUN}: its SHA-256 differs."
        found.problems.append(Problem("other", text))
        manifest = None
    committed = _committed(storage, len(shards), found)
    found.committed = len(committed)
    hashes: list[tuple[int, np.ndarray]] = []

    def check_of(shard: int) -> ShardCheck:
        rows = shards[shard]
        part = None if manifest is None else manifest.part(rows.start, rows.stop)
        return ShardCheck(shard_of(run, storage, shard), run, part)

    checks = map(check_of, committed)  # the manifest is read in this thread
    for done, check in enumerate(read_ahead(ShardCheck.run, checks), 1):
        found.problems += check.told()
        found.images += len(check.images)
        found.failures += check.failures
        hashes.append((check.shard.index, _hashes(check.images)))
        progress(done, len(committed))
    found.problems += _repeated_ids(dataset, hashes)
    found.problems += _strangers(storage, run["layout"], len(shards))
    for name in storage.list(layout.REWRITING):
        text = f"{name} is an unfinished rewrite: run the same command again."
        found.problems.append(Problem("missing", text, layout.shard_of(name)))
    found.problems += _partial(dataset, run["fingerprint"], {*committed}, found.made_again)
    found.problems += _summary(dataset, found)
    return found


def to_delete(storage: Storage, found: Verification) -> list[str]:
    """Return the names that a repair deletes, in order: the summary, damaged and stray images, then of
    each broken shard what must be generated again, its commit last. An interrupted repair can be run
    again. Only names that a run gives are deleted; other objects are left to the user.
    """
    broken = sorted({p.shard for p in found.problems if p.kind == "broken" and p.shard is not None})
    names = [name for problem in found.problems for name in problem.names]
    for shard in broken:
        pictures = LAYOUTS[found.layout].pictures_of(shard) if found.layout else None
        names += [pictures] if pictures else []
        names += [layout.attention_name(shard), layout.tries_name(shard)]
        names += [layout.metadata_name(shard)]
    if names or any(problem.kind == "summary" for problem in found.problems):
        names.insert(0, layout.SUMMARY)
    return [name for name in dict.fromkeys(names) if storage.exists(name)]


def _committed(storage: Storage, shards: int, found: Verification) -> list[int]:
    """Return the run's committed shards, sorted. Missing shards and other objects in the metadata folder
    are added to the problems."""
    committed = []
    for name in storage.list(layout.METADATA):
        shard = layout.shard_of(name)
        if shard is None or layout.metadata_name(shard) != name:
            text = f"{name} is not a table of a shard: remove it, if you know what it is."
            found.problems.append(Problem("other", text))
        elif shard >= shards:
            text = (
                f"{name} belongs to no shard: the run has {shards}, numbered from 0. Move it away."
            )
            found.problems.append(Problem("other", text))
        else:
            committed.append(shard)
    missing = sorted(set(range(shards)) - set(committed))
    if missing:
        first = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        text = (
            f"{len(missing)} of {shards} shards are not committed ({first}): run the same command "
            "again."
        )
        only = missing[0] if len(missing) == 1 else None
        found.problems.append(Problem("missing", text, only))
    return sorted(committed)


def _hashes(ids: list[str]) -> np.ndarray:
    """Return an 8-byte hash per id, since all ids of a large run would fill the memory."""
    digests = (hashlib.blake2b(row_id.encode(), digest_size=8).digest() for row_id in ids)
    return np.frombuffer(b"".join(digests), np.uint64)


def _repeated_ids(dataset: Dataset, hashes: list[tuple[int, np.ndarray]]) -> Iterator[Problem]:
    """Yield rows with an image whose id an earlier row with an image has. (Failed rows may repeat an id:
    that is why they failed.)"""
    if not hashes:
        return
    values, counts = np.unique(np.concatenate([own for _, own in hashes]), return_counts=True)
    repeated = values[counts > 1]
    first: dict[str, int] = {}
    for shard, own in hashes if len(repeated) else ():
        if not np.isin(own, repeated).any():
            continue
        for row in dataset.table(shard, ["id", "status"]).to_pylist():
            if row["status"] != "ok":
                continue
            if row["id"] in first:
                text = f"its id is also that of a row of shard {first[row['id']]}."
                yield Problem("broken", text, shard, row["id"])
            first.setdefault(row["id"], shard)


def _strangers(storage: Storage, kind: Layout, shards: int) -> Iterator[Problem]:
    """Yield a problem for unknown objects among the images. (In the layout `files` each shard's check
    does this.)"""
    shard_kind = LAYOUTS[kind]
    if shard_kind.at_once:
        return
    ours = {shard_kind.pictures_of(shard) for shard in range(shards)}
    others = [name for name in storage.list(layout.IMAGES) if name not in ours]
    if others:
        yield not_ours(others)


def _partial(
    dataset: Dataset, mark: str, committed: set[int], made_again: list[int]
) -> Iterator[Problem]:
    """Yield the problems of `partial/`: rows of shards that are committed, and other objects. Committed
    shards with failed rows that were made again are added to `made_again`."""
    others: list[str] = []
    ours = partial.kept(dataset.storage, mark, others.append)
    made_again += partial.made_again(dataset, ours)
    for shard in sorted(committed.intersection(ours)):
        text = f"{layout.PARTIAL} has rows of it, which are of no more use: run the same command again."
        if shard in made_again:
            text = (
                f"rows that a stopped --retry-failed has made again are in {layout.PARTIAL}: run that "
                "command again."
            )
        yield Problem("missing", text, shard)
    for name in others:
        if layout.partial_of(name) is None:
            yield not_ours([name])
        else:
            text = f"{name} is damaged, or of another run."
            yield Problem("stray", text, names=(name,))


def _summary(dataset: Dataset, found: Verification) -> Iterator[Problem]:
    """Yield differences between the summary's counts and the tables, if no table is missing."""
    failed = found.failures.total()
    if found.images + failed != found.rows:
        return
    counted: dict[str, Any] = {"rows": found.rows, "images": found.images, "failed": failed}
    counted["failures"] = dict(found.failures)
    summary = dataset.summary
    if summary is None and dataset.storage.exists(layout.SUMMARY):
        yield Problem("summary", f"{layout.SUMMARY} is damaged.")
    for name, count in counted.items():
        if summary is not None and summary.get(name) != count:
            text = f"{layout.SUMMARY} says {name} {summary.get(name)}, the tables have {count}."
            yield Problem("summary", text)
