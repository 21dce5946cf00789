"""Check the tables and images of one committed shard."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from aae_batch.dataset import layout
from aae_batch.dataset.outcome import VERDICTS, may_have_left_a_picture
from aae_batch.dataset.problem import Problem
from aae_batch.dataset.run_record import Shards, reads_manifest_alike
from aae_batch.dataset.writer import Shard, as_used
from aae_batch.errors import shown
from aae_batch.ladder import Ladder
from aae_batch.sampling.config import GuidanceConfig

if TYPE_CHECKING:
    from aae_batch.manifest.reader import Part

PROBLEMS_A_SHARD = 20
"""Further problems of a shard are only counted."""

_PER_STEP = [
    column.name
    for column in layout.ATTENTION_SCHEMA
    if pa.types.is_list(column.type) and pa.types.is_floating(column.type.value_type)
]


@dataclass
class ShardCheck:
    """The check of one committed shard, and its results.

    Attributes:
        record: the content of `run.json`.
        expected: the shard's part of the manifest; None skips that comparison.
        images: ids of rows with an image.
        failed: ids of failed rows for which an earlier attempt may have left an image.
        failures: rows without an image, by `error_type`.
    """

    shard: Shard
    record: Mapping[str, Any]
    expected: Part | None
    images: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    def run(self) -> ShardCheck:
        """Read and check the whole shard; returns `self`."""
        read = self._table(layout.metadata_name(self.shard.index), self._with_extras)
        if read is not None:
            data, table = read
            self._check_whole(table)
            own = self._with_extras(pa.schema([])).names
            rows = table.select([n for n in own if n in table.column_names]).to_pylist()
            for row in rows:
                self._check_row(row)
            good = {row["id"]: row for row in rows if row["status"] == "ok" and row["id"]}
            self._check_pictures(good, data)
            self._check_attention(good)
            if self.shard.with_tries:
                self._check_tries(rows)
        return self

    def told(self) -> list[Problem]:
        """Return the shard's problems, with at most `PROBLEMS_A_SHARD` of kind `broken`; one more entry
        counts the rest. Strays are never cut, since a repair deletes them."""
        broken = [problem for problem in self.problems if problem.kind == "broken"]
        others = [problem for problem in self.problems if problem.kind != "broken"]
        if more := broken[PROBLEMS_A_SHARD:]:
            names = tuple(name for problem in more for name in problem.names)
            text = f"and {len(more)} more problems."
            more = [Problem("broken", text, self.shard.index, names=names)]
        return broken[:PROBLEMS_A_SHARD] + more + others

    def _broken(self, text: str, row: str | None = None, *names: str) -> None:
        self.problems.append(Problem("broken", text, self.shard.index, row, names))

    def _table(
        self, name: str, wanted: Callable[[pa.Schema], pa.Schema]
    ) -> tuple[bytes, pa.Table] | None:
        """Return a table as bytes and as a pyarrow table without images. If it cannot be read, or its
        schema is not `wanted(schema)`, add a problem and return None."""
        data = self.shard.read(name)
        if data is None:
            self._broken(f"{name} is missing.")
            return None
        try:
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            schema = file.schema_arrow
            table = file.read([n for n in schema.names if n != layout.IMAGE_COLUMN.name])
        except (pa.ArrowException, OSError) as error:
            self._broken(f"{name} cannot be read: {_first_line(error)}")
            return None
        if not schema.equals(wanted(schema)):
            self._broken(f"{name} has other columns, or columns of other types, than a run writes.")
            return None
        return data, table

    def _with_extras(self, found: pa.Schema) -> pa.Schema:
        """Return the metadata schema with those columns of `found` that are not standard as extras."""

        wanted = self.shard.metadata_schema
        own = wanted(pa.schema([])).names
        return wanted(pa.schema([column for column in found if column.name not in own]))

    # --- metadata

    def _check_whole(self, table: pa.Table) -> None:
        wanted = len(Shards.of(self.record)[self.shard.index])
        if table.num_rows != wanted:
            self._broken(f"it has {table.num_rows} rows, and should have {wanted}.")
        promised = {"shard": self.shard.index, "fingerprint": self.shard.fingerprint}
        for name, value in promised.items():
            if table[name].unique().to_pylist() not in ([], [value]):
                self._broken(f"the column {name} is not {value} in every row.")
        if self.expected is not None and table.num_rows == wanted:
            for row_id, text in unlike_manifest(self.record, self.expected, table):
                if reads_manifest_alike(self.record):
                    self._broken(f"{text}.", row_id)
                else:  # then nothing needs to be wrong with the shard
                    text += ": this version may read it otherwise than the one that began the run."
                    self.problems.append(Problem("other", text, self.shard.index, row_id))

    def _check_row(self, row: dict[str, Any]) -> None:
        row_id = row["id"]
        if row_id is None:
            self._broken("a row has no id.")
        elif row["status"] == "ok":
            self.images.append(row_id)
            name = self.shard.file_name(row_id)
            if row["file_name"] != name:
                self._broken(f"its file_name is {row['file_name']}, and should be {name}.", row_id)
        elif row["status"] == "failed":
            if may_have_left_a_picture(row):
                self.failed.append(row_id)
            self.failures[str(row["error_type"])] += 1
            for name in ("error", "error_type"):
                if not row[name]:
                    self._broken(f"it failed and has no {name}.", row_id)
            if row["file_name"] is not None:
                self._broken(f"it failed and has the file_name {row['file_name']}.", row_id)
        else:
            self._broken(f"its status is {row['status']}, neither ok nor failed.", row_id)

    # --- images

    def _check_pictures(self, good: dict[str, dict[str, Any]], metadata: bytes) -> None:
        seen = set()
        try:
            for found in self.shard.pictures(metadata, good, self.failed):
                if isinstance(found, Problem):
                    self.problems.append(found)
                    continue
                row_id, data = found
                if row_id in seen:
                    self._broken("it has two images.", row_id)
                elif row_id not in good:
                    self._broken("it has an image and is not ok.", row_id)
                else:
                    self._check_picture(good[row_id], data)
                seen.add(row_id)
        except (tarfile.TarError, EOFError, pa.ArrowException) as error:
            self._broken(f"its images cannot be read: {_first_line(error)}")
            return
        for row_id in good:
            if row_id not in seen:
                self._broken("its image is missing.", row_id)

    def _check_picture(self, row: dict[str, Any], data: bytes) -> None:
        text = _what_is_wrong(row, data)
        if text is not None:
            name = self.shard.file_name(row["id"])
            self._broken(text, row["id"], *([name] if name and self.shard.at_once else []))

    # --- attention

    def _check_attention(self, good: dict[str, dict[str, Any]]) -> None:
        name = layout.attention_name(self.shard.index)
        read = self._table(name, lambda found: self.shard.attention_schema)
        if read is None:
            return
        subjects = defaultdict(list)
        for subject in _measured(read[1]):
            subjects[subject["id"]].append(subject)
        for row_id in subjects.keys() - good.keys():
            self._broken(f"{name} has rows of it, and it has no image.", row_id)
        for row_id, row in good.items():
            self._check_subjects(row, subjects[row_id])

    # --- tries

    def _check_tries(self, rows: list[dict[str, Any]]) -> None:
        name = layout.tries_name(self.shard.index)
        read = self._table(name, lambda found: layout.TRIES_SCHEMA)
        if read is None:
            return
        columns = ["id", "try", "method", "seed", "verdict", "kept"]
        tries: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for made in read[1].select(columns).to_pylist():
            tries[made["id"]].append(made)
        tried = {row["id"]: row for row in rows if row["tries"] and row["id"]}
        for row_id in tries.keys() - tried.keys():
            self._broken(f"{name} has tries of it, and the metadata none.", row_id)
        for row_id, row in tried.items():
            made = tries[row_id]
            kept = [one for one in made if one["kept"]]
            if len(made) != row["tries"]:
                text = f"its tries are {row['tries']}, and {name} has {len(made)}."
                self._broken(text, row_id)
            elif [one["try"] for one in kept] != [n for n in [row["kept_try"]] if n is not None]:
                self._broken(f"its kept_try is {row['kept_try']}, and not so in {name}.", row_id)
            elif kept and VERDICTS.get(kept[0]["verdict"]) != row["accepted"]:
                self._broken(f"its accepted is {row['accepted']}, and not so in {name}.", row_id)
            elif kept and any(kept[0][column] != row[column] for column in ("method", "seed")):
                self._broken(f"its method or seed is not that of its kept try in {name}.", row_id)

    def _check_subjects(self, row: dict[str, Any], seen: list[dict[str, Any]]) -> None:
        if row["subjects"]:
            wanted, found = row["subjects"], [subject["subject"] for subject in seen]
        else:
            wanted = [tuple(indices) for indices in row["token_indices"] or ()]
            found = [tuple(subject["token_indices"] or ()) for subject in seen]
        if Counter(wanted) != Counter(found):
            text = f"its subjects are {wanted}, and the attention table has {found}."
            self._broken(text, row["id"])
        lengths = {subject[name] for subject in seen for name in _PER_STEP}
        # Some schedulers take more steps than requested, none takes fewer.
        if lengths and (len(lengths) > 1 or min(lengths) < (row["num_inference_steps"] or 1)):
            self._broken("its attention does not have an entry for every step.", row["id"])
        if any(s["map"] != s["map_height"] * s["map_width"] for s in seen):
            self._broken("an attention map has another size than it says.", row["id"])
        if self.shard.with_maps:
            self._check_maps(row, seen)

    def _check_maps(self, row: dict[str, Any], seen: list[dict[str, Any]]) -> None:
        config = GuidanceConfig(**self.record["settings"]["guidance"])
        for subject in seen:
            steps = config.map_steps(subject["max_attention"])
            if subject["map_steps"] != steps or subject["map_scales"] != len(steps):
                self._broken(f"its attention maps are not those of the steps {steps}.", row["id"])
            elif subject["maps"] != len(steps) * subject["map"]:
                self._broken("its maps over time have another size than they say.", row["id"])


def unlike_manifest(
    record: Mapping[str, Any], part: Part, table: pa.Table
) -> Iterator[tuple[str | None, str]]:
    """Yield in what a shard's metadata is not the manifest's, with the run's settings as defaults: the id of
    the first row that differs in a column, or None, and a clause.

    Args:
        record: the content of `run.json`.
        part: as many rows of the manifest as the table has.
    """
    config = GuidanceConfig(**record["settings"]["guidance"])
    ladder = ladder_of(record)
    kept = table["kept_try"].to_pylist() if ladder else [None] * table.num_rows
    expected = [
        as_used(row if ladder is None else ladder.row(row, number), config)
        for row, number in zip(part.rows(), kept, strict=True)
    ]
    ids = table["id"].to_pylist()
    for column in layout.MANIFEST_COLUMNS:
        said = pa.array([row[column.name] for row in expected], column.type).to_pylist()
        for row_id, one, other in zip(ids, table[column.name].to_pylist(), said, strict=True):
            from_model = other is None and column.name in ("height", "width")
            if one != other and not from_model:
                yield (
                    row_id,
                    f"its {column.name} is {shown(one)}, and in the manifest {shown(other)}",
                )
                break  # a missing row shifts all later ones
    for name in part.extras.column_names:
        if name not in table.column_names or not _same(table[name], part.extras[name]):
            yield None, f"its column {name} is not that of the manifest"


def ladder_of(record: Mapping[str, Any]) -> Ladder | None:
    """Return a run's ladder of tries; None if it makes one picture a row."""
    rule = record["settings"].get("acceptance")
    return None if rule is None else Ladder.of(rule["ladder"], rule["tries"])


def _what_is_wrong(row: Mapping[str, Any], picture: bytes) -> str | None:
    """Return what is wrong with a row's encoded image; None if it matches the row."""
    if hashlib.sha256(picture).hexdigest() != row["sha256"]:
        return "its image has another sha256."
    try:
        with Image.open(io.BytesIO(picture)) as image:
            image.load()
            width, height = image.size
    except Exception as error:  # Pillow's decoders raise errors of any class
        return f"its image cannot be decoded: {_first_line(error)}"
    if (width, height) != (row["width"], row["height"]):
        return f"its image is {width} x {height}, and should be {row['width']} x {row['height']}."
    return None


def _measured(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows of an attention table, with lengths instead of the lists and maps."""
    lengths = {name: pc.list_value_length(table[name]) for name in _PER_STEP}
    with_maps = "maps" in table.column_names
    for name in ("map", "maps") if with_maps else ("map",):
        lengths[name] = pc.binary_length(table[name])
    for name in ("map_height", "map_width"):
        lengths[name] = table[name]
    if with_maps:
        lengths["map_scales"] = pc.list_value_length(table["map_scales"])
    columns = {name: pc.fill_null(length, 0) for name, length in lengths.items()}
    as_is = ("id", "subject", "token_indices", "map_steps")
    columns |= {name: table[name] for name in as_is if name in table.column_names}
    return pa.table(columns).to_pylist()


def _same(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """Compare two columns; NaN equals NaN."""
    if one.equals(other):
        return True
    try:
        return repr(one.to_pylist()) == repr(other.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):  # values that Python cannot represent
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."
