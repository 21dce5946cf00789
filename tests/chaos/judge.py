"""Is a dataset what its manifest asks for? An answer that owes nothing to the package.

Only the standard library, pyarrow and Pillow are imported, and what is known here of an output is what
docs and tables say of it: `run.json`, `metadata/`, `attention/`, `images/`, and the columns' names.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Pixels = Callable[[str, int], "tuple[bytes, int]"]
"""Of a prompt and a seed: the RGB bytes that the picture must have, and how many of its first pixels
may be others."""

_PER_STEP = ("max_attention", "mean_attention", "entropy", "center_x", "center_y", "loss")
_TABLE = re.compile(r"(metadata|attention)/(\d{5,})\.parquet")
_BESIDE = {"run.json", "progress.json", "summary.json", "report.html"}


# --- where a dataset lies ------------------------------------------------------------------------


class Reader(Protocol):
    def names(self) -> list[str]:
        """Every object, hidden ones too."""

    def read(self, name: str) -> bytes: ...


@dataclass(frozen=True)
class FolderReader:
    root: Path

    def names(self) -> list[str]:
        files = (path for path in Path(self.root).rglob("*") if not path.is_dir())
        return sorted(path.relative_to(self.root).as_posix() for path in files)

    def read(self, name: str) -> bytes:
        return Path(self.root, name).read_bytes()


@dataclass(frozen=True)
class BucketReader:
    client: Any
    bucket: str
    prefix: str

    def names(self) -> list[str]:
        start = f"{self.prefix}/"
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=start
        )
        return [item["Key"][len(start) :] for page in pages for item in page.get("Contents", ())]

    def read(self, name: str) -> bytes:
        found = self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}")
        return found["Body"].read()


# --- what is found -------------------------------------------------------------------------------


@dataclass
class Verdict:
    """Counts of what is wrong; `failed` rows have a reason and are for the caller to allow.

    Attributes:
        lost: rows of the manifest that no table has.
        doubled: rows that are there more than once, as rows or as pictures.
        checksums: pictures that are missing, or are not those that their row has the SHA-256 of.
        undecodable, sizes: pictures that are none, or not of the size that is said.
        pixels: pictures that are not what prompt and seed give.
        attention: rows whose attention table does not fit.
        content: rows that are not the manifest's: prompt, seed, subjects, extra columns.
        strays: objects that no row names.
        parts: hidden files that a process left when it was killed in the midst of writing.
        records: `run.json` and `summary.json` that do not agree with the tables.
    """

    rows: int = 0
    failed: int = 0
    lost: int = 0
    doubled: int = 0
    checksums: int = 0
    undecodable: int = 0
    sizes: int = 0
    pixels: int = 0
    attention: int = 0
    content: int = 0
    strays: int = 0
    parts: int = 0
    records: int = 0
    problems: list[str] = field(default_factory=list)

    def blame(self, kind: str, text: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        self.problems.append(f"{kind}: {text}")

    @property
    def sound(self) -> bool:
        return not self.problems

    @property
    def counts(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}


def judge(reader: Reader, manifest: Path, pixels: Pixels | None = None) -> Verdict:
    """Hold all that lies in an output against the manifest of its run."""
    return _Judge(reader, _manifest(manifest), pixels).verdict()


def _manifest(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


class _Judge:
    def __init__(self, reader: Reader, wanted: list[dict[str, Any]], pixels: Pixels | None) -> None:
        self.reader = reader
        self.wanted = wanted
        self.pixels = pixels
        self.names = set(reader.names())
        self.found = Verdict(rows=len(wanted))
        self.seen: Counter[str] = Counter()
        self.ok: dict[str, dict[str, Any]] = {}
        self.named: set[str] = set()

    def verdict(self) -> Verdict:
        run = self._json("run.json")
        if run is None:
            self.found.lost = len(self.wanted)
            self.found.blame("records", "run.json is missing or no JSON")
            return self.found
        if run.get("rows") != len(self.wanted):
            self.found.blame("records", f"run.json has rows {run.get('rows')}")
        size, layout = run["shard_size"], run["layout"]
        for shard in range(-(-len(self.wanted) // size)):
            self._shard(shard, self.wanted[shard * size : (shard + 1) * size], layout)
        for row in self.wanted:
            if not self.seen[row["id"]]:
                self.found.blame("lost", row["id"])
            elif self.seen[row["id"]] > 1:
                self.found.blame("doubled", row["id"])
        self._summary()
        self._strays()
        return self.found

    def _shard(self, shard: int, wanted: list[dict[str, Any]], layout: str) -> None:
        name = f"metadata/{shard:05d}.parquet"
        table = self._table(name)
        if table is None:
            return
        self.named.add(name)
        rows = table.drop_columns([n for n in ("image",) if n in table.column_names]).to_pylist()
        self.seen.update(row["id"] for row in rows)
        if [row["id"] for row in rows] != [row["id"] for row in wanted]:
            self.found.blame("content", f"{name} does not have the manifest's rows in its order")
        by_id = {row["id"]: row for row in wanted}
        for row in rows:
            self._row(row, by_id.get(row["id"]), shard)
        good = [row for row in rows if row["status"] == "ok"]
        pictures = {
            "files": self._in_files,
            "webdataset": lambda good: self._in_tar(shard, good),
            "parquet": lambda good: self._in_table(name, good),
        }[layout](good)
        for row in good:
            self._picture(row, pictures.get(row["id"]))
        self._attention(shard, good)

    def _row(self, row: dict[str, Any], wanted: Mapping[str, Any] | None, shard: int) -> None:
        if wanted is None:
            self.found.blame("content", f"{row['id']} is no row of the manifest")
            return
        for name, value in wanted.items():
            if value is not None and row.get(name) != value:
                self.found.blame("content", f"{row['id']}: {name} is {row.get(name)!r}")
        if row["shard"] != shard:
            self.found.blame("content", f"{row['id']}: shard is {row['shard']}")
        if row["status"] == "ok":
            self.ok[row["id"]] = row
        elif row["status"] == "failed" and row["error"] and row["error_type"]:
            self.found.failed += 1
        else:
            self.found.blame("content", f"{row['id']}: neither ok nor failed with a reason")

    # --- pictures

    def _in_files(self, good: list[dict[str, Any]]) -> dict[str, bytes]:
        self.named.update(row["file_name"] for row in good)
        for name, times in Counter(row["file_name"] for row in good).items():
            if times > 1:
                self.found.blame("doubled", f"{name} is of {times} rows")
        there = [row for row in good if row["file_name"] in self.names]
        return {row["id"]: self.reader.read(row["file_name"]) for row in there}

    def _in_tar(self, shard: int, good: list[dict[str, Any]]) -> dict[str, bytes]:
        places = {row["id"]: row["file_name"].partition("#")[::2] for row in good}
        members: dict[tuple[str, str], bytes] = {}
        for tar in {tar for tar, _ in places.values()} | {f"images/{shard:05d}.tar"}:
            if tar not in self.names:
                continue
            self.named.add(tar)
            try:
                with tarfile.open(fileobj=io.BytesIO(self.reader.read(tar))) as opened:
                    for member in opened:
                        if (tar, member.name) in members:
                            self.found.blame("doubled", f"{tar}#{member.name}")
                        file = opened.extractfile(member)
                        members[tar, member.name] = file.read() if file else b""
            except (tarfile.TarError, EOFError) as error:
                self.found.blame("undecodable", f"{tar}: {error}")
        wanted = set(places.values()) | {
            (tar, str(Path(name).with_suffix(".json"))) for tar, name in places.values()
        }
        for tar, name in sorted(members.keys() - wanted):
            self.found.blame("strays", f"{tar}#{name}")
        for row_id, (tar, name) in places.items():
            text = members.get((tar, str(Path(name).with_suffix(".json"))), b"{}")
            if json.loads(text).get("id") != row_id:
                self.found.blame("content", f"{tar}#{name}: its JSON is missing or another's")
        return {row_id: members[place] for row_id, place in places.items() if place in members}

    def _in_table(self, name: str, good: list[dict[str, Any]]) -> dict[str, bytes]:
        cells = self._table(name, ["id", "image"])
        assert cells is not None
        found = {}
        good_ids = {row["id"] for row in good}
        for row in cells.to_pylist():
            if row["image"] is not None:
                found[row["id"]] = row["image"]["bytes"]
                if row["id"] not in good_ids:
                    self.found.blame("strays", f"{name} has a picture of {row['id']}, not ok")
        return found

    def _picture(self, row: dict[str, Any], data: bytes | None) -> None:
        if data is None:
            self.found.blame("checksums", f"{row['id']}: its picture is missing")
            return
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            self.found.blame("checksums", f"{row['id']}: its picture has another sha256")
        try:
            with Image.open(io.BytesIO(data)) as image:
                drawn = image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            self.found.blame("undecodable", f"{row['id']}: {error}")
            return
        if drawn.size != (row["width"], row["height"]):
            self.found.blame("sizes", f"{row['id']}: {drawn.size}")
        if self.pixels is not None:
            expected, free = self.pixels(row["prompt"], row["seed"])
            if drawn.tobytes()[3 * free :] != expected[3 * free :]:
                self.found.blame("pixels", f"{row['id']}: not the picture of its prompt and seed")

    # --- the rest

    def _attention(self, shard: int, good: list[dict[str, Any]]) -> None:
        name = f"attention/{shard:05d}.parquet"
        table = self._table(name)
        if table is None:
            return
        self.named.add(name)
        seen: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for entry in table.to_pylist():
            seen[entry["id"]].append(entry)
        for row_id in sorted(seen.keys() - {row["id"] for row in good}):
            self.found.blame("attention", f"{row_id}: {name} has it, and it is not ok")
        for row in good:
            if (why := _unfit(row, seen[row["id"]])) is not None:
                self.found.blame("attention", f"{row['id']}: {why}")

    def _summary(self) -> None:
        said = self._json("summary.json")
        if said is None:
            self.found.blame("records", "summary.json is missing or no JSON")
            return
        counted = {"images": len(self.ok), "failed": self.found.failed}
        for name, count in counted.items():
            if said.get(name) != count:
                text = f"summary.json says {name} {said.get(name)}, the tables have {count}"
                self.found.blame("records", text)

    def _strays(self) -> None:
        for name in sorted(self.names - self.named - _BESIDE):
            last = name.rpartition("/")[2]
            if last.startswith(".") and last.endswith(".part"):
                self.found.parts += 1  # no reader sees it
            elif name.startswith("metrics/") or name in (".lock", ".lock-holder"):
                continue
            else:
                self.found.blame("strays", name)

    def _json(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads(self.reader.read(name)) if name in self.names else None
        except ValueError:
            return None

    def _table(self, name: str, columns: list[str] | None = None) -> pa.Table | None:
        if name not in self.names:
            if name.startswith("attention"):
                self.found.blame("attention", f"{name} is missing")
            return None
        try:
            file = pq.ParquetFile(
                pa.BufferReader(self.reader.read(name)), page_checksum_verification=True
            )
            return file.read(columns)
        except (pa.ArrowException, OSError) as error:
            self.found.blame("undecodable", f"{name}: {error}")
            return None


def _unfit(row: dict[str, Any], seen: list[dict[str, Any]]) -> str | None:
    if Counter(row["subjects"] or ()) != Counter(entry["subject"] for entry in seen):
        return f"the attention table has {[entry['subject'] for entry in seen]}"
    lengths = {len(entry[name] or ()) for entry in seen for name in _PER_STEP}
    if lengths and (len(lengths) > 1 or min(lengths) < (row["num_inference_steps"] or 1)):
        return f"its attention has {sorted(lengths)} steps"
    if any(len(entry["map"] or b"") != entry["map_height"] * entry["map_width"] for entry in seen):
        return "a map is not of its size"
    return None


# --- beside the dataset --------------------------------------------------------------------------


def judge_scores(reader: Reader, manifest: Path, metric: str) -> Verdict:
    """Has every picture one row of scores, of that very picture?"""
    found = Verdict(rows=len(_manifest(manifest)))
    run = json.loads(reader.read("run.json"))
    names = set(reader.names())
    for shard in range(-(-run["rows"] // run["shard_size"])):
        name = f"metrics/{metric}/{shard:05d}.parquet"
        rows = pq.read_table(pa.BufferReader(reader.read(f"metadata/{shard:05d}.parquet")))
        good = [(r["id"], r["sha256"]) for r in rows.to_pylist() if r["status"] == "ok"]
        if name not in names:
            found.blame("lost", name)
            continue
        scores = pq.read_table(pa.BufferReader(reader.read(name))).to_pylist()
        _compare(found, name, [(row["id"], row["sha256"]) for row in scores], good)
        for row in scores:
            if all(value is None for key, value in row.items() if key not in ("id", "sha256")):
                found.failed += 1
    return found


def judge_export(reader: Reader, dataset: Reader, form: str) -> Verdict:
    """Has an export every picture of a dataset once, with its row?"""
    tables = [name for name in dataset.names() if _TABLE.fullmatch(name)]
    wanted: list[tuple[str, str]] = []
    for name in tables:
        if name.startswith("metadata/"):
            rows = pq.read_table(pa.BufferReader(dataset.read(name))).to_pylist()
            wanted += [(row["id"], row["sha256"]) for row in rows if row["status"] == "ok"]
    found = Verdict(rows=len(wanted))
    names = [name for name in reader.names() if not name.rpartition("/")[2].startswith(".")]
    if "README.md" not in names:
        found.blame("records", "the export has no card")
    files = [name for name in names if name not in ("README.md", "samples.png")]
    _compare(found, form, list(_exported(reader, files, form, found)), wanted)
    return found


def _exported(
    reader: Reader, files: list[str], form: str, found: Verdict
) -> Iterable[tuple[str, str]]:
    """The id of every exported row, and the SHA-256 of its picture."""
    if form == "imagefolder":
        table = pq.read_table(pa.BufferReader(reader.read("train/metadata.parquet"))).to_pylist()
        named = {f"train/{row['file_name']}" for row in table}
        for name in sorted(set(files) - named - {"train/metadata.parquet"}):
            found.blame("strays", name)
        for row in table:
            yield row["id"], hashlib.sha256(reader.read(f"train/{row['file_name']}")).hexdigest()
        return
    for name in files:
        data = reader.read(name)
        if form == "webdataset":
            with tarfile.open(fileobj=io.BytesIO(data)) as opened:
                members = {m.name: opened.extractfile(m).read() for m in opened}  # type: ignore[union-attr]
            for member, text in members.items():
                if member.endswith(".json"):
                    picture = members[str(Path(member).with_suffix(".png"))]
                    yield json.loads(text)["id"], hashlib.sha256(picture).hexdigest()
        else:
            for row in pq.read_table(pa.BufferReader(data)).to_pylist():
                yield row["id"], hashlib.sha256(row["image"]["bytes"]).hexdigest()


def _compare(
    found: Verdict, where: str, rows: list[tuple[str, str]], wanted: list[tuple[str, str]]
) -> None:
    times = Counter(row_id for row_id, _ in rows)
    shas = dict(rows)
    for row_id, sha in wanted:
        if not times[row_id]:
            found.blame("lost", f"{where}: {row_id}")
        elif times[row_id] > 1:
            found.blame("doubled", f"{where}: {row_id}")
        elif shas[row_id] != sha:
            found.blame("checksums", f"{where}: {row_id}")
    for row_id in times.keys() - {row_id for row_id, _ in wanted}:
        found.blame("strays", f"{where}: {row_id}")
