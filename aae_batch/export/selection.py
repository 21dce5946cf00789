"""Select the rows of an output to export, from its tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aae_batch.dataset.condition import Condition
from aae_batch.errors import SettingsError, shown
from aae_batch.export.source import Source
from aae_batch.store.read_ahead import read_ahead

_NAMED = 3
"""Pairs of prompt and method that a note names."""

_COLUMNS = ["id", "prompt", "method", "seed", "final_loss", "status"]


@dataclass(frozen=True)
class Best:
    """Keep one image per prompt and method: the one with the lowest final loss, then the lowest seed.

    Attributes:
        of: choose among this many rows of a prompt, the first in the manifest; None: among all.
    """

    of: int | None = None

    def __post_init__(self) -> None:
        if self.of is not None and self.of < 1:
            raise SettingsError(f"--of {self.of}: give how many seeds a prompt has, at least 1.")


@dataclass
class Selection:
    """The rows to export.

    Attributes:
        places: the selected row positions of each shard, in order.
        rows: number of rows in the committed shards.
        failed: rows that are among the ids and satisfy the condition, but have no image.
        refused: rows that do not satisfy the condition.
        unlisted: rows that satisfy it, but are not among the ids.
        beaten: rows with an image that lost to another of the same prompt and method, or could not be
            compared.
        notes: sentences on what falls short of the request.
    """

    places: dict[int, np.ndarray] = field(default_factory=dict)
    rows: int = 0
    failed: int = 0
    refused: int = 0
    unlisted: int = 0
    beaten: int = 0
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(places) for places in self.places.values())


@dataclass(frozen=True)
class Ids:
    """Export only rows with these ids.

    Attributes:
        file: the name of the file that lists them, for messages.
    """

    listed: frozenset[str]
    file: str

    @classmethod
    def read(cls, file: str) -> Ids:
        """Read a text file with one id a line; empty lines and space around an id are ignored.

        Raises:
            SettingsError: the file cannot be read, is no text, or lists no id.
        """
        try:
            lines = Path(file).expanduser().read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise SettingsError(
                f"--ids {file}: give a UTF-8 text file with one id a line."
            ) from None
        except OSError as error:
            raise SettingsError(f"--ids {file} cannot be read: {error.strerror}.") from None
        listed = frozenset(line.strip() for line in lines if line.strip())
        if not listed:
            raise SettingsError(f"--ids {file} lists no id: give one a line.")
        return cls(listed, file)

    def refuse_unknown(self, known: set[str]) -> None:
        """Raise a SettingsError if an id is not among `known`."""
        if unknown := sorted(self.listed - known):
            raise SettingsError(
                f"--ids {self.file}: the output has no row with the id {_named(unknown)}; "
                f"{len(unknown)} of {len(self.listed)} are unknown. Remove them, or name the output that "
                "has them."
            )


def choose(
    source: Source,
    where: Condition | None,
    best: Best | None,
    ids: Ids | None,
    on_progress: Callable[[int, int], None],
) -> Selection:
    """Select the rows that have an image, are among `ids` and satisfy `where`, and the best of these.

    Reads the tables shard by shard with read-ahead. Memory use is 8 bytes per row, or about 300 with
    `best`.

    Raises:
        SettingsError: the condition does not fit the columns, no prompt has the `best.of` rows to
            choose from, or no row has one of the ids.
    """
    selection = Selection()
    admitted = []
    known: set[str] = set()

    def read(shard: int) -> pa.Table:
        if where is None:
            return source.dataset.table(shard, _COLUMNS)
        return source.scores.beside(source.dataset.table(shard), shard)

    shards = source.shards
    for done, (shard, table) in enumerate(zip(shards, read_ahead(read, shards), strict=True)):
        places = np.arange(table.num_rows)
        if where is not None:
            places = np.flatnonzero(where.admits(table))
        selection.refused += table.num_rows - len(places)
        if ids is not None:
            listed = np.array([one in ids.listed for one in table["id"].to_pylist()], bool)
            known |= ids.listed.intersection(table["id"].to_pylist())
            selection.unlisted += int((~listed[places]).sum())
            places = places[listed[places]]
        selection.rows += table.num_rows
        table = table.select(_COLUMNS).take(places)
        ok = pc.equal(table["status"], "ok").to_numpy()
        selection.failed += int((~ok).sum())
        if best is None:
            selection.places[shard] = places[ok]
        else:  # rows whose prompt or method could not be read have failed, and do not compete
            compete = pc.and_(table["prompt"].is_valid(), table["method"].is_valid())
            selection.places[shard] = places[compete.to_numpy()]
            admitted.append(table.filter(compete))
        on_progress(done + 1, len(shards))
    if ids is not None:
        ids.refuse_unknown(known)
    if best is not None:
        _keep_the_best(selection, pa.concat_tables(admitted), best)
    return selection


def _keep_the_best(selection: Selection, admitted: pa.Table, best: Best) -> None:
    """Narrow `selection` to the best rows.

    Args:
        admitted: the rows of `selection`, in the same order.
    """
    ok = pc.equal(admitted["status"], "ok").to_numpy()
    groups, pairs = _groups(admitted)
    asked = np.ones(len(groups), bool) if best.of is None else _rank(groups) < best.of
    losses = admitted["final_loss"].to_numpy()
    seeds = pc.fill_null(admitted["seed"], 0).to_numpy()
    candidates = np.flatnonzero(asked & ok & np.isfinite(losses))
    order = candidates[np.lexsort((seeds[candidates], losses[candidates], groups[candidates]))]
    having, firsts = np.unique(groups[order], return_index=True)
    kept = np.zeros(len(groups), bool)
    kept[order[firsts]] = True
    selection.beaten = int((ok & ~kept).sum())
    start = 0
    for shard, places in selection.places.items():
        selection.places[shard] = places[kept[start : start + len(places)]]
        start += len(places)
    sizes = np.bincount(groups[asked])
    if best.of is not None and sizes.size:
        if sizes.max() < best.of:
            raise SettingsError(
                f"--of {best.of}: no prompt has that many rows of one method to choose from; the most "
                f"is {sizes.max()}."
            )
        if len(short := np.flatnonzero(sizes < best.of)):
            selection.notes.append(
                f"{len(short)} of {len(sizes)} pairs of prompt and method have fewer than {best.of} "
                f"rows to choose from: {_named([f'{pairs[i]} ({sizes[i]})' for i in short])}."
            )
    if len(empty := np.setdiff1d(np.arange(len(pairs)), having)):
        selection.notes.append(
            f"{len(empty)} of {len(pairs)} pairs of prompt and method have no image with a final "
            f"loss, and are left out: {_named([pairs[i] for i in empty])}."
        )


def _named(pairs: Sequence[str]) -> str:
    return ", ".join([*pairs[:_NAMED], *(["..."] if len(pairs) > _NAMED else [])])


def _groups(rows: pa.Table) -> tuple[np.ndarray, list[str]]:
    """Number the pairs of prompt and method: int64 [rows], and the name of each pair in messages."""
    prompts = rows["prompt"].combine_chunks().dictionary_encode()
    methods = rows["method"].combine_chunks().dictionary_encode()
    count = max(1, len(methods.dictionary))
    pairs = prompts.indices.to_numpy() * count + methods.indices.to_numpy()
    used, groups = np.unique(pairs, return_inverse=True)
    prompt_of, method_of = prompts.dictionary.to_pylist(), methods.dictionary.to_pylist()
    places = (divmod(pair, count) for pair in used.tolist())
    return groups, [f"{shown(prompt_of[i])} by {method_of[j]}" for i, j in places]


def _rank(groups: np.ndarray) -> np.ndarray:
    """Return how many rows of the same group precede each row: int64 [rows]."""
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    rank = np.empty(len(groups), np.int64)
    rank[order] = np.arange(len(groups)) - starts
    return rank
