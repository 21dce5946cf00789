"""A metric's `run.json` and score tables in a dataset, and the plan of what remains to be scored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aae_batch.dataset import layout
from aae_batch.dataset.reader import Dataset
from aae_batch.errors import OutputError
from aae_batch.evaluate.metric import Metric
from aae_batch.evaluate.settings import OF_OUTPUT, ScoreSettings
from aae_batch.job.plan import JobPlan, Ledger, Piece, shards
from aae_batch.job.records import AUTO, as_json, differences, new_run

READERS = 8
"""Threads that read tables."""


@dataclass(frozen=True)
class ScorePlan(JobPlan[dict[str, Any]]):
    """What a scoring run has to do.

    Attributes:
        shards: all shards of the dataset, generated or not.
        todo: shards that are generated and not scored.
        kept: shards that are scored and whose images have not changed.
        given_up: number of images in kept shards that could not be scored and are not retried.
        again: kept shard -> rows to retry, as positions in the manifest.
    """

    shards: tuple[Piece, ...]
    todo: tuple[Piece, ...]
    kept: frozenset[int]
    given_up: int
    again: Mapping[int, list[int]]

    @property
    def missing(self) -> int:
        """How many shards are not generated yet."""
        return len(self.shards) - len(self.todo) - len(self.kept)

    @property
    def rows(self) -> int:
        """Number of rows in the shards that are generated."""
        return sum(map(len, self.todo)) + sum(len(self.shards[shard]) for shard in self.kept)

    def ledger(self) -> Ledger[dict[str, Any]]:
        last, size = self.shards[-1].stop, len(self.shards[0])
        others = {piece.shard for piece in self.shards} - {piece.shard for piece in self.todo}
        return Ledger.of(last, size, others, self.again)


def metric_run(
    settings: ScoreSettings, metric: Metric, dataset: Dataset
) -> tuple[dict[str, Any], bool]:
    """Return the content of the metric's `run.json`, and whether an earlier run wrote it.

    Raises:
        OutputError: there is nothing to score, or part of it was scored with other settings.
    """
    run, name = dataset.run, settings.metric
    if run is None or not dataset.shards():
        raise OutputError(
            f"There is nothing to score in {dataset.storage.root}: check the path, or generate first."
        )
    depends_on = settings.depends_on(metric, run)
    before = dataset.metric_run(name) if dataset.scored_shards(name) else None
    if before is not None and not settings.again:
        if depends_on.get("dtype") == AUTO:  # use what the first actor chose
            depends_on["dtype"] = before["settings"].get("dtype", AUTO)
        if changed := differences(before["settings"], depends_on):
            raise OutputError(
                f"{dataset.storage.place(layout.metric_run_name(name))} was begun with other settings "
                f"({'; '.join(changed)}): go back to them to finish it, or score everything "
                "again with --again."
            )
        return before, True
    return {"metric": name, **new_run(depends_on)}, False


def make_score_plan(settings: ScoreSettings, metric: Metric, dataset: Dataset) -> ScorePlan:
    """Plan a scoring run. Reads the ids and hashes of every table of scores.

    Raises:
        OutputError: see `metric_run`.
    """
    run, begun = metric_run(settings, metric, dataset)
    made = dataset.run
    assert made is not None
    pieces = tuple(shards(made["rows"], made["shard_size"]))
    generated = {shard for shard in dataset.shards() if shard < len(pieces)}
    unscored: dict[int, list[int]] = {}
    if begun:
        name, mark = settings.metric, run["fingerprint"]
        there = sorted(generated.intersection(dataset.scored_shards(name)))
        with ThreadPoolExecutor(READERS) as pool:
            found = pool.map(lambda shard: _unscored(dataset, name, shard, mark), there)
            for shard, places in zip(there, found, strict=True):
                if places is not None:
                    unscored[shard] = [pieces[shard].start + place for place in places]
    left = generated.difference(unscored)
    todo = tuple(piece for piece in pieces if piece.shard in left)
    again = {shard: rows for shard, rows in unscored.items() if rows and settings.retry_failed}
    given_up = 0 if settings.retry_failed else sum(map(len, unscored.values()))
    return ScorePlan(run, begun, pieces, todo, frozenset(unscored), given_up, again)


def begin_scores(dataset: Dataset, run: dict[str, Any]) -> None:
    """Write the metric's `run.json`. Tables of an earlier run stay until they are replaced, but those of
    shards that the dataset no longer has are deleted."""
    name, storage = run["metric"], dataset.storage
    present = {*dataset.shards()}
    for shard in dataset.scored_shards(name):
        if shard not in present:
            storage.delete(layout.metric_name(name, shard))
    storage.write_bytes(layout.metric_run_name(name), as_json(run))


def differing_judges(datasets: Mapping[str, Dataset]) -> dict[str, str]:
    """Return the metrics whose settings or weights differ between outputs -> a sentence on what differs.

    Args:
        datasets: label -> output.
    """
    found: dict[str, str] = {}
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for output, dataset in datasets.items():
        for metric in dataset.metrics():
            run = dataset.metric_run(metric)
            if run is None or not dataset.scored_shards(metric):
                continue
            judge = {name: value for name, value in run["settings"].items() if name != OF_OUTPUT}
            other, before = first.setdefault(metric, (output, judge))
            if metric not in found and (changed := differences(before, judge)):
                found[metric] = (
                    f"{metric} is left out, since its settings in {other} and {output} differ "
                    f"({'; '.join(changed)}): score both by the same."
                )
    return found


def whole_shard(
    made: Iterable[dict[str, Any]], dataset: Dataset, metric: str, shard: int, again: bool
) -> list[dict[str, Any]]:
    """Return the scores of a whole shard in the order of its metadata.

    Args:
        made: the new scores, in any order.
        again: `made` replaces some of the existing scores; otherwise it has all rows.
    """
    rows = {row["id"]: row for row in dataset.scores_of(metric, shard).to_pylist()} if again else {}
    rows |= {row["id"]: row for row in made}
    return [rows[name] for name in _pictures(dataset, shard)["id"].to_pylist()]


def _unscored(dataset: Dataset, metric: str, shard: int, fingerprint: str) -> list[int] | None:
    """Return the positions in the shard of images that could not be scored, or None if the scores are of
    another run or of other images, or are damaged."""
    names = [column.name for column in layout.SCORED_COLUMNS]
    try:
        scores, marks = dataset.marked_scores_of(metric, shard, names)
    except OutputError:
        return None
    pictures = _pictures(dataset, shard)
    if marks.get(layout.SCORES_FINGERPRINT) != fingerprint or not scores.equals(
        pictures.select(names)
    ):
        return None
    without = pa.array(json.loads(marks.get(layout.SCORES_UNSCORED, "[]")), pa.string())
    return pictures.filter(pc.is_in(pictures["id"], without))["place"].to_pylist()


def _pictures(dataset: Dataset, shard: int) -> pa.Table:
    """Return `id`, `sha256` and `place`, the position in the shard, of a shard's images."""
    table = dataset.table(shard, ["id", "sha256", "status"])
    table = table.append_column("place", pa.array(range(table.num_rows), pa.int64()))
    return table.filter(pc.equal(table["status"], "ok")).drop_columns("status")
