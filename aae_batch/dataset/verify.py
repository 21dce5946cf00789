"""Is an output what its run promises? Everything in it is read, a few shards at a time."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from aae_batch.dataset import layout
from aae_batch.dataset.image_format import ImageFormat
from aae_batch.dataset.layout import Layout
from aae_batch.dataset.reader import Dataset, parquet_images
from aae_batch.dataset.settle import is_picture
from aae_batch.dataset.webdataset import tar_members
from aae_batch.dataset.writer import as_used, may_have_left_a_picture
from aae_batch.errors import OutputError, shown
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.store.base import Storage

if TYPE_CHECKING:
    from aae_batch.manifest.reader import Manifest, Part

THREADS = 8
"""Shards that are read at once. Each is in memory as far as its layout has it in one object."""

PROBLEMS_A_SHARD = 20
"""More of one shard are only counted."""

_PER_STEP = [
    column.name
    for column in layout.ATTENTION_SCHEMA
    if pa.types.is_list(column.type) and pa.types.is_floating(column.type.value_type)
]


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be.

    Attributes:
        kind: `missing`, a part that is still to be made; `broken`, a shard that must be made again;
            `stray`, pictures that the run wrote for rows that have none; `summary`, counts to be made
            again; `other`, for a person to mend.
        text: a sentence.
        row: the id of the row that is concerned.
        names: the pictures that are stray, or damaged.
    """

    kind: Literal["missing", "broken", "stray", "summary", "other"]
    text: str
    shard: int | None = None
    row: str | None = None
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = [] if self.shard is None else [f"shard {self.shard}"]
        where += [] if self.row is None else [f"row {self.row}"]
        return ": ".join([", ".join(where), self.text]) if where else self.text


@dataclass
class Verification:
    """What was found in an output.

    Attributes:
        rows, shards: how many there should be.
        committed: shards that are there.
        images: rows with a picture.
        failures: rows without, by `error_type`.
        layout: None where nothing says it.
    """

    layout: Layout | None = None
    rows: int = 0
    shards: int = 0
    committed: int = 0
    images: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    @property
    def proved(self) -> bool:
        return not self.problems

    @property
    def only_incomplete(self) -> bool:
        """Nothing is wrong with what is there; the rest is still to be made."""
        return bool(self.problems) and all(p.kind == "missing" for p in self.problems)

    def __str__(self) -> str:
        state = (
            "proved" if self.proved else "incomplete" if self.only_incomplete else "not as it was"
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
    """Hold an output against its `run.json`, and against the manifest if that is given.

    Memory holds a few shards and eight bytes a row. Of pictures in files, only the folders of
    committed shards are looked through for strays.

    Args:
        progress: is told how many of the committed shards are done.

    Raises:
        OutputError: the storage does not answer, so that nothing can be said.
        ManifestError: the manifest cannot be read.
    """
    dataset = Dataset(storage)
    try:
        run = _Run.of(dataset.run)
    except OutputError as error:
        return Verification(problems=[Problem("other", str(error))])
    found = Verification(layout=run.layout, rows=run.rows, shards=run.shards)
    if manifest is not None and manifest.digest != run.manifest:
        text = f"{manifest.path} is not the manifest of {layout.RUN}: its SHA-256 is another."
        found.problems.append(Problem("other", text))
        manifest = None
    committed = _committed(storage, run, found)
    found.committed = len(committed)
    hashes: list[tuple[int, np.ndarray]] = []
    checks = (_Shard(storage, run, shard, _part(run, shard, manifest)) for shard in committed)
    for done, shard in enumerate(_in_order(_Shard.check, checks), 1):
        found.problems += shard.shown()
        found.images += len(shard.images)
        found.failures += shard.failures
        hashes.append((shard.shard, _hashes(shard.images)))
        progress(done, len(committed))
    found.problems += _repeated_ids(dataset, hashes)
    found.problems += _others(storage, run)
    found.problems += _unfinished(storage)
    found.problems += _summary(dataset, found)
    return found


def to_delete(storage: Storage, found: Verification) -> list[str]:
    """What a repair deletes, in order: the summary, damaged and stray pictures, then of each broken shard
    what must be made again, its commit last. Where it is interrupted, the next one goes on.

    All of it has names that the run gives; what else lies in the output is a person's to move.
    """
    broken = sorted({p.shard for p in found.problems if p.kind == "broken" and p.shard is not None})
    names = [name for problem in found.problems for name in problem.names]
    for shard in broken:
        if found.layout == "webdataset":
            names.append(layout.tar_name(shard))
        names += [layout.attention_name(shard), layout.metadata_name(shard)]
    if names or any(problem.kind == "summary" for problem in found.problems):
        names.insert(0, layout.SUMMARY)
    return [name for name in dict.fromkeys(names) if storage.exists(name)]


# --- the run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """What `run.json` promises."""

    fingerprint: str
    rows: int
    shard_size: int
    layout: Layout
    image_format: ImageFormat
    manifest: str
    guidance: dict[str, Any]

    @classmethod
    def of(cls, run: dict[str, Any] | None) -> _Run:
        if run is None:
            raise OutputError(
                f"There is no {layout.RUN}, so there is no telling what should be here."
            )
        return cls(
            run["fingerprint"],
            run["rows"],
            run["shard_size"],
            run["layout"],
            ImageFormat(**run["image_format"]),
            run["settings"]["manifest"],
            run["settings"]["guidance"],
        )

    @property
    def suffix(self) -> str:
        return self.image_format.suffix

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_size)

    def rows_of(self, shard: int) -> range:
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.rows))


def _committed(storage: Storage, run: _Run, found: Verification) -> list[int]:
    """The shards of the run that are committed; what else is among them is a problem."""
    committed = []
    for name in storage.list(layout.METADATA):
        shard = layout.shard_of(name)
        if shard is None or layout.metadata_name(shard) != name:
            text = f"{name} is no table of a shard: remove it, if you know what it is."
            found.problems.append(Problem("other", text))
        elif shard >= run.shards:
            text = f"{name} is of no shard: the run has {run.shards}, from 0. Move it away."
            found.problems.append(Problem("other", text))
        else:
            committed.append(shard)
    missing = sorted(set(range(run.shards)) - set(committed))
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        text = (
            f"{len(missing)} of {run.shards} shards are not committed ({shown}): run the same command "
            "again."
        )
        only = missing[0] if len(missing) == 1 else None
        found.problems.append(Problem("missing", text, only))
    return sorted(committed)


def _part(run: _Run, shard: int, manifest: Manifest | None) -> Part | None:
    if manifest is None:
        return None
    rows = run.rows_of(shard)
    return manifest.part(rows.start, rows.stop)


def _in_order(call: Callable[[_Shard], _Shard], items: Iterable[_Shard]) -> Iterator[_Shard]:
    """What `call` makes of each item, in threads, never more than a few ahead of the caller."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="verify") as pool:
        ahead: deque = deque()
        for item in items:
            ahead.append(pool.submit(call, item))
            if len(ahead) > THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _hashes(ids: list[str]) -> np.ndarray:
    """Eight bytes an id, since all the ids of a large run would fill the memory."""
    digests = (hashlib.blake2b(row_id.encode(), digest_size=8).digest() for row_id in ids)
    return np.frombuffer(b"".join(digests), np.uint64)


def _repeated_ids(dataset: Dataset, hashes: list[tuple[int, np.ndarray]]) -> Iterator[Problem]:
    """Rows whose picture has the id of an earlier one. (A row that failed may: that is why it failed.)"""
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


def _others(storage: Storage, run: _Run) -> Iterator[Problem]:
    """What lies outside the tars and tables that hold the pictures. (In files it is a shard's concern.)"""
    if run.layout == "files":
        return
    tars = {layout.tar_name(s) for s in range(run.shards)} if run.layout == "webdataset" else set()
    names = [name for name in storage.list(layout.IMAGES) if name not in tars]
    if names:
        yield Problem("other", _not_ours(names))


def _not_ours(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"no run wrote {names[0]}{more}: move it away, if you know what it is."


def _unfinished(storage: Storage) -> Iterator[Problem]:
    for name in storage.list(layout.REWRITING):
        text = f"{name} waits to be carried out: run the same command again."
        yield Problem("missing", text, layout.shard_of(name))


def _summary(dataset: Dataset, found: Verification) -> Iterator[Problem]:
    """Does the summary count what the tables have? Told only where the tables are all there."""
    failed = found.failures.total()
    if found.images + failed != found.rows:
        return
    counted = {
        "rows": found.rows,
        "images": found.images,
        "failed": failed,
        "failures": dict(found.failures),
    }
    summary = dataset.summary
    if summary is None and dataset.storage.exists(layout.SUMMARY):
        yield Problem("summary", f"{layout.SUMMARY} is damaged.")
    for name, count in counted.items():
        if summary is not None and summary.get(name) != count:
            text = f"{layout.SUMMARY} says {name} {summary.get(name)}, the tables have {count}."
            yield Problem("summary", text)


# --- a shard -------------------------------------------------------------------------------------


class _Shard:
    """The check of one committed shard.

    Attributes:
        images: the ids of its rows that have a picture.
        failed: those of other rows, of which an earlier attempt may have left one.
        failures: its rows without a picture, by `error_type`.
    """

    def __init__(self, storage: Storage, run: _Run, shard: int, expected: Part | None) -> None:
        self.storage = storage
        self.run = run
        self.shard = shard
        self.expected = expected
        self.images: list[str] = []
        self.failed: list[str] = []
        self.failures: Counter[str] = Counter()
        self.problems: list[Problem] = []

    def check(self) -> _Shard:
        data = self._read(layout.metadata_name(self.shard))
        rows = None if data is None else self._metadata(data)
        if data is not None and rows is not None:
            good = {row["id"]: row for row in rows if row["status"] == "ok" and row["id"]}
            self._check_pictures(good, data)
            self._check_attention(good)
        return self

    def shown(self) -> list[Problem]:
        """Its problems, or the first of too many. Strays, which may have to be deleted, all."""
        broken = [problem for problem in self.problems if problem.kind == "broken"]
        others = [problem for problem in self.problems if problem.kind != "broken"]
        more = len(broken) - PROBLEMS_A_SHARD
        if more > 0:
            broken[PROBLEMS_A_SHARD:] = [
                Problem(
                    "broken",
                    f"and {more} more problems.",
                    self.shard,
                    names=tuple(
                        name for problem in broken[PROBLEMS_A_SHARD:] for name in problem.names
                    ),
                )
            ]
        return broken + others

    def _broken(self, text: str, row: str | None = None, *names: str) -> None:
        self.problems.append(Problem("broken", text, self.shard, row, names))

    def _get(self, name: str) -> bytes | None:
        """An object; None where there is none. One that is there and cannot be read need not be broken,
        so that error is the caller's."""
        try:
            return self.storage.read_bytes(name)
        except OutputError:
            if self.storage.exists(name):
                raise
            return None

    def _read(self, name: str) -> bytes | None:
        """An object; None, and a problem, where there is none."""
        data = self._get(name)
        if data is None:
            self._broken(f"{name} is missing.")
        return data

    def _table(self, name: str, data: bytes) -> tuple[pa.Schema, pa.Table] | None:
        """Everything in a table but pictures; None, and a problem, where it cannot be read."""
        try:
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            columns = [n for n in file.schema_arrow.names if n != layout.IMAGE_COLUMN.name]
            return file.schema_arrow, file.read(columns)
        except (pa.ArrowException, OSError) as error:
            self._broken(f"{name} cannot be read: {_first_line(error)}")
            return None

    # --- metadata

    def _metadata(self, data: bytes) -> list[dict[str, Any]] | None:
        name = layout.metadata_name(self.shard)
        read = self._table(name, data)
        if read is None:
            return None
        schema, table = read
        own = layout.metadata_schema(pa.schema([]), self.run.layout).names
        extras = pa.schema([column for column in schema if column.name not in own])
        if not schema.equals(layout.metadata_schema(extras, self.run.layout)):
            self._broken(f"{name} has other columns, or columns of other types, than a run writes.")
            return None
        self._check_whole(table)
        rows = table.select([n for n in own if n in table.column_names]).to_pylist()
        for row in rows:
            self._check_row(row)
        return rows

    def _check_whole(self, table: pa.Table) -> None:
        wanted = len(self.run.rows_of(self.shard))
        if table.num_rows != wanted:
            self._broken(f"it has {table.num_rows} rows, and should have {wanted}.")
        for name, value in {"shard": self.shard, "fingerprint": self.run.fingerprint}.items():
            if table[name].unique().to_pylist() not in ([], [value]):
                self._broken(f"the column {name} is not {value} in every row.")
        if self.expected is not None and table.num_rows == wanted:
            self._check_against(self.expected, table)

    def _check_against(self, part: Part, table: pa.Table) -> None:
        """The rows are those of the manifest, with the run's settings where these have none."""
        config = GuidanceConfig(**self.run.guidance)
        expected = [as_used(row, config) for row in part.rows()]
        ids = table["id"].to_pylist()
        for column in layout.MANIFEST_COLUMNS:
            said = pa.array([row[column.name] for row in expected], column.type).to_pylist()
            for row_id, one, other in zip(ids, table[column.name].to_pylist(), said, strict=True):
                from_model = other is None and column.name in ("height", "width")
                if one != other and not from_model:
                    text = f"its {column.name} is {shown(one)}, and in the manifest {shown(other)}."
                    self._broken(text, row_id)
                    break  # one row too few shifts all that follow
        for name in part.extras.column_names:
            if name not in table.column_names or not _same(table[name], part.extras[name]):
                self._broken(f"its column {name} is not that of the manifest.")

    def _check_row(self, row: dict[str, Any]) -> None:
        row_id = row["id"]
        if row_id is None:
            self._broken("a row has no id.")
        elif row["status"] == "ok":
            self.images.append(row_id)
            name = layout.file_name(self.run.layout, self.shard, row_id, self.run.suffix)
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

    # --- pictures

    def _check_pictures(self, good: dict[str, dict[str, Any]], metadata: bytes) -> None:
        pictures = {
            "files": self._in_files,
            "webdataset": self._in_tar,
            "parquet": lambda good: parquet_images(metadata),
        }[self.run.layout]
        seen = set()
        try:
            for row_id, data in pictures(good):
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

    def _in_files(self, good: dict[str, dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
        names = set(self.storage.list(layout.images_of(self.shard)))
        for row_id in good:
            name = self._picture(row_id)
            if name in names:
                names.remove(name)
                yield row_id, self.storage.read_bytes(name)
        ours = sorted(
            name
            for name in names.intersection(map(self._picture, self.failed))
            if is_picture(self.storage.read_bytes(name), None, self.run.image_format)
        )
        if ours:
            more = f" and {len(ours) - 1} more" if len(ours) > 1 else ""
            text = f"{ours[0]}{more} belong to rows that failed."
            self.problems.append(Problem("stray", text, self.shard, None, tuple(ours)))
        if others := sorted(names.difference(ours)):
            self.problems.append(Problem("other", _not_ours(others), self.shard))

    def _picture(self, row_id: str) -> str:
        return layout.image_name(self.shard, row_id, self.run.suffix)

    def _in_tar(self, good: dict[str, dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
        tar = layout.tar_name(self.shard)
        data = self._get(tar)
        if data is None:
            raise tarfile.ReadError(f"{tar} is missing")
        images = {layout.member_name(row_id, self.run.suffix): row_id for row_id in good}
        texts = {layout.member_name(row_id, ".json"): row_id for row_id in good}
        for name, content in tar_members(data):
            if name in images:
                yield images[name], content
            elif name not in texts:
                self._broken(f"{tar} has {name}, which no row names.")
            elif not _is_json_of(row_id := texts.pop(name), content):
                self._broken(f"{name} is not what was said of it.", row_id)
        for name, row_id in texts.items():
            self._broken(f"{name} is missing in {tar}.", row_id)

    def _check_picture(self, row: dict[str, Any], data: bytes) -> None:
        names = [self._picture(row["id"])] if self.run.layout == "files" else []
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            self._broken("its image has another sha256.", row["id"], *names)
            return
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                size = image.size
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            text = f"its image cannot be decoded: {_first_line(error)}"
            self._broken(text, row["id"], *names)
            return
        if size != (row["width"], row["height"]):
            text = f"its image is {size[0]} x {size[1]}, and should be {row['width']} x {row['height']}."
            self._broken(text, row["id"], *names)

    # --- attention

    def _check_attention(self, good: dict[str, dict[str, Any]]) -> None:
        name = layout.attention_name(self.shard)
        data = self._read(name)
        read = None if data is None else self._table(name, data)
        if read is None:
            return
        schema, table = read
        if not schema.equals(layout.ATTENTION_SCHEMA):
            self._broken(f"{name} has other columns, or columns of other types, than a run writes.")
            return
        subjects = defaultdict(list)
        for subject in _measured(table):
            subjects[subject["id"]].append(subject)
        for row_id in subjects.keys() - good.keys():
            self._broken(f"{name} has rows of it, and it has no image.", row_id)
        for row_id, row in good.items():
            self._check_subjects(row, subjects[row_id])

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
        # Some schedulers take more steps than they are asked for, none takes fewer.
        if lengths and (len(lengths) > 1 or min(lengths) < (row["num_inference_steps"] or 1)):
            self._broken("its attention does not have an entry for every step.", row["id"])
        if any(s["map"] != s["map_height"] * s["map_width"] for s in seen):
            self._broken("an attention map has another size than it says.", row["id"])


def _measured(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of an attention table, with lengths instead of lists and maps."""
    lengths = {name: pc.list_value_length(table[name]) for name in _PER_STEP}
    lengths["map"] = pc.binary_length(table["map"])
    for name in ("map_height", "map_width"):
        lengths[name] = table[name]
    columns = {name: pc.fill_null(length, 0) for name, length in lengths.items()}
    columns |= {name: table[name] for name in ("id", "subject", "token_indices")}
    return pa.table(columns).to_pylist()


def _same(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """NaN is the same as NaN here."""
    if one.equals(other):
        return True
    try:
        return repr(one.to_pylist()) == repr(other.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):  # of what Python has no value
        return False


def _is_json_of(row_id: str, content: bytes) -> bool:
    try:
        return json.loads(content)["id"] == row_id
    except (ValueError, KeyError, TypeError):
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."
