"""Builds manifest rows from prompts, seeds and methods, and writes the file.

Rows are ordered by prompt, seed and method, so that rows of one prompt and seed are adjacent.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from aae_batch.columns import MANIFEST_COLUMNS
from aae_batch.errors import ManifestError, OutputError, SettingsError, shown
from aae_batch.manifest.build.prompt import Prompt, Prompts
from aae_batch.manifest.build.subjects import suits
from aae_batch.manifest.row import is_safe_id, seed_of
from aae_batch.methods import BASELINE, DEFAULT, METHODS
from aae_batch.store.open import open_storage
from aae_batch.store.scratch import scratch_folder

MOST_SEEDS = 1_000_000
_FIELDS = [pa.field(field.name, field.type) for field in MANIFEST_COLUMNS]
_SLUG_LENGTH = 60
_ROWS_AT_ONCE = 20_000


def parse_seeds(text: str) -> list[int]:
    """Parse a list of seeds: `64` and `0:64` are 0 to 63; `1,5,10:20` are 1, 5 and 10 to 19; `42,` is 42.

    Raises:
        SettingsError: the text is not such a list, repeats a seed, or has more than `MOST_SEEDS`.
    """
    seeds: list[int] = []
    listed = f"0:{text}" if text.strip().isdecimal() else text.strip().removesuffix(",")
    for part in listed.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?::\s*(\d{1,18})\s*)?", part, re.ASCII)
        first, end = (int(match[1]), int(match[2] or int(match[1]) + 1)) if match else (0, 0)
        if end <= first:
            raise SettingsError(
                f"--seeds {text!r} is not a list of seeds: write 4 for four of them, 0 to 3; 10:20 for 10 to "
                "19; 1,5,9; or '0,' for the seed 0 alone."
            )
        if end - first + len(seeds) > MOST_SEEDS:
            raise SettingsError(
                f"--seeds {text!r} are more than {MOST_SEEDS:,} seeds; make several manifests."
            )
        seeds += range(first, end)
    if len(set(seeds)) < len(seeds):
        raise SettingsError(f"--seeds {text!r} has a seed twice; name each once.")
    return seeds


def parse_methods(text: str) -> list[str]:
    """Parse a comma-separated list of methods; `both` is the default method and plain sampling, `all` is
    every method.

    Raises:
        SettingsError: a method is unknown.
    """
    named = {"both": [DEFAULT, BASELINE], "all": list(METHODS)}
    methods = named.get(text.strip()) or [part.strip() for part in text.split(",")]
    for method in methods:
        if method not in METHODS:
            raise SettingsError(
                f"--methods: {method!r} is not a method; use both, all, or a list of "
                f"{', '.join(METHODS)}."
            )
    return list(dict.fromkeys(methods))


class ManifestRows:
    """The rows of a manifest, with explicit ids and seeds.

    An id is `<number>-<words>-s<seed>-<method>`, or `<name>-s<seed>-<method>` for a prompt with a name.
    The seed and the method are part of it only if several are given. Numbers and seeds are zero-padded, so
    that sorting by id orders unnamed prompts by number, then by seed, then by method name.

    Args:
        seeds: seeds of every prompt; empty for the seed in its table, or else a hash of its id, the same
            for all methods.
        methods: methods of every prompt whose subjects suit them; empty for the method in its table, or
            else none, so that the run decides.

    Raises:
        ManifestError: `seeds` or `methods` are given and the prompts have such a column, an id cannot be a
            file name, there are no prompts, or none suits a method.
    """

    def __init__(
        self, prompts: Prompts, seeds: Sequence[int] = (), methods: Sequence[str] = ()
    ) -> None:
        if not len(prompts):
            raise ManifestError("No prompts were given; write at least one.")
        self._prompts, self._seeds, self._methods = prompts, list(seeds), list(methods)
        if not len(self):
            raise ManifestError(
                f"No prompt has the subjects that {' and '.join(self.left_out)} need: name more of them, "
                "with adjectives for syngen, or take other methods."
            )
        some = prompts.prompts
        own = {name for prompt in some for name in prompt.settings}
        for name, given in (("seed", seeds), ("method", methods)):
            if given and name in own:
                raise ManifestError(
                    f"The source has a column {name}; remove it, or leave --{name}s out."
                )
        self._digits = len(str(len(prompts) - 1))
        self._seed_digits = len(str(max(seeds, default=0)))
        used = own | {"id", "prompt", "seed"} | ({"method"} if methods else set())
        for name in ("subjects", "token_indices"):
            if any(getattr(prompt, name) is not None for prompt in some):
                used.add(name)
        self._own = pa.schema([field for field in _FIELDS if field.name in used])
        carried = [pa.field(name, column.type) for name, column in prompts.carried.items()]
        self.schema = pa.schema([*self._own, *carried])
        self._check_ids()

    def __len__(self) -> int:
        return sum(len(self._methods_of(p)) for p in self._prompts.prompts) * max(
            1, len(self._seeds)
        )

    @property
    def seeds_in_words(self) -> str:
        """What was understood by a list of seeds, since `42` are 42 of them; nothing without one."""
        if not self._seeds:
            return ""
        first, last = self._seeds[0], self._seeds[-1]
        which = f"{first} to {last}" if self._seeds == list(range(first, last + 1)) else "as listed"
        one = len(self._seeds) == 1
        return (
            f": {f'seed {first}' if one else f'{len(self._seeds)} seeds, {which},'} of each prompt"
        )

    @property
    def left_out(self) -> dict[str, int]:
        """The methods that do not suit all prompts -> the number of prompts left out."""
        prompts = self._prompts.prompts
        counts = {m: sum(not suits(m, prompt) for prompt in prompts) for m in self._methods}
        return {method: count for method, count in counts.items() if count}

    def _methods_of(self, prompt: Prompt) -> Sequence[str | None]:
        if not self._methods:
            return [prompt.settings.get("method")]
        return [method for method in self._methods if suits(method, prompt)]

    def tables(self) -> Iterator[pa.Table]:
        """Yield all rows, 20,000 at a time."""
        records = self._records()
        while some := list(islice(records, _ROWS_AT_ONCE)):
            own = pa.Table.from_pylist([record for _, record in some], self._own)
            place = pa.array([index for index, _ in some], pa.int64())
            carried = [column.take(place) for column in self._prompts.carried.values()]
            yield pa.table([*own.columns, *carried], schema=self.schema)

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the position of the prompt, and the row."""
        for index, prompt in enumerate(self._prompts.prompts):
            base = self._base(index, prompt)
            seeds: Sequence[int | None] = self._seeds or [prompt.settings.get("seed")]
            for seed, method in product(seeds, self._methods_of(prompt)):
                yield (
                    index,
                    {
                        **prompt.settings,
                        "id": base + self._ending(seed, method),
                        "prompt": prompt.text,
                        "subjects": prompt.subjects,
                        "token_indices": prompt.token_indices,
                        "seed": seed_of(base) if seed is None else seed,
                        "method": method,
                    },
                )

    def _base(self, index: int, prompt: Prompt) -> str:
        if prompt.name is not None:
            return prompt.name
        slug = re.sub("[^a-z0-9]+", "-", prompt.text.lower()).strip("-")
        return "-".join(filter(None, (f"{index:0{self._digits}d}", cut(slug))))

    def _ending(self, seed: int | None, method: str | None) -> str:
        ending = f"-s{seed:0{self._seed_digits}d}" if len(self._seeds) > 1 else ""
        return ending + (f"-{method}" if len(self._methods) > 1 else "")

    def _check_ids(self) -> None:
        last = self._seeds[-1] if self._seeds else None
        ending = self._ending(last, max(self._methods, key=len, default=None))
        for index, prompt in enumerate(self._prompts.prompts):
            if prompt.name is not None and not is_safe_id(prompt.name + ending):
                raise ManifestError(
                    f"Row {index + 1} of the source: id {shown(prompt.name)} is too long with "
                    f"{ending!r} appended; an id has at most 120 characters."
                )


def cut(slug: str) -> str:
    """Return as many leading words of a slug as fit into an id."""
    if len(slug) <= _SLUG_LENGTH:
        return slug
    return slug[: _SLUG_LENGTH + 1].rpartition("-")[0] or slug[:_SLUG_LENGTH]


# --- the file ------------------------------------------------------------------------------------


def check_target(path: str, force: bool, s3_endpoint: str | None = None) -> None:
    """Check that a manifest can be written to a path or URL.

    Raises:
        ManifestError: the suffix is not that of a manifest, or the file exists and `force` is False.
    """
    if PurePosixPath(path).suffix.lower() not in _WRITERS:
        raise ManifestError(f"{path} must end in one of {', '.join(_WRITERS)}; change its suffix.")
    folder, name = os.path.split(path.rstrip("/"))
    if not force and open_storage(folder or ".", s3_endpoint).exists(name):
        raise ManifestError(f"{path} exists; give another name, or --force to replace it.")


def write_manifest(path: str, rows: ManifestRows, s3_endpoint: str | None = None) -> None:
    """Write the rows to a path or a URL, atomically, in the format of its suffix.

    CSV joins lists with `;`, or uses JSON if an entry contains one.

    Raises:
        OutputError: the file cannot be written.
    """
    folder, name = os.path.split(path.rstrip("/"))
    with scratch_folder() as made:
        local = made / "manifest"
        try:
            _WRITERS[PurePosixPath(path).suffix.lower()](local, rows)
        except OSError as error:
            raise OutputError(f"Cannot write {path}: {error.strerror}.") from error
        open_storage(folder or ".", s3_endpoint).write_bytes(name, local.read_bytes())


def _write_parquet(path: Path, rows: ManifestRows) -> None:
    with pq.ParquetWriter(path, rows.schema, compression="zstd") as writer:
        for table in rows.tables():
            writer.write_table(table)


def _write_csv(path: Path, rows: ManifestRows) -> None:
    nested = [i for i, field in enumerate(rows.schema) if pa.types.is_nested(field.type)]
    flat = rows.schema
    for i in nested:
        flat = flat.set(i, pa.field(flat.names[i], pa.string()))
    with pa.csv.CSVWriter(path, flat) as writer:
        for table in rows.tables():
            for i in nested:
                texts = pa.array(map(_flat, table[i].to_pylist()), pa.string())
                table = table.set_column(i, flat.field(i), texts)
            writer.write_table(table)


def _flat(value: Any) -> str | None:
    if value is None:
        return None
    simple = isinstance(value, list) and all(
        isinstance(entry, str) and entry and ";" not in entry and entry[0] != "[" for entry in value
    )
    return ";".join(value) if simple and value else json.dumps(value, default=str)


def _write_jsonl(path: Path, rows: ManifestRows) -> None:
    with path.open("w", encoding="utf-8") as file:
        for table in rows.tables():
            for record in table.to_pylist():
                given = {name: value for name, value in record.items() if value is not None}
                file.write(json.dumps(given, ensure_ascii=False, default=str) + "\n")


_WRITERS: dict[str, Callable[[Path, ManifestRows], None]] = {
    ".parquet": _write_parquet,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
}
