"""A dataset in a notebook: rows as tables, images by id, methods side by side."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from aae_batch.dataset.heatmap import heatmap
from aae_batch.dataset.methods import method_order
from aae_batch.dataset.reader import Dataset, attention_map, attention_maps
from aae_batch.dataset.run_record import Shards, tries_again
from aae_batch.dataset.scores import KEYS, Scores
from aae_batch.display import as_text, clipped, figure, picture, png, scale
from aae_batch.errors import AaeBatchError, OutputError, shown
from aae_batch.evaluate.attention import AttentionMetric
from aae_batch.evaluate.settings import METRICS, JudgeSettings
from aae_batch.store.open import open_storage

if TYPE_CHECKING:
    import numpy as np
    import pandas

ATTENDED = "attention of the worst subject"
"""What `OpenDataset.worst` ranks by if nothing else is asked for."""

_PLACE = ["id", "shard", "file_name", "status", "error"]
_INDEX = ["id", "prompt", "seed", "method", "status", "shard"]
_THUMBNAILS = 6
_THUMBNAIL_SIDE = 128
_NAMED = 10
"""Number of seeds or subjects that an error lists."""


def open_dataset(root: str | os.PathLike[str], s3_endpoint: str | None = None) -> OpenDataset:
    """Open a run's output, complete or not: a folder, `s3://bucket/prefix`, or another URL.

    Args:
        s3_endpoint: URL of an S3-compatible store. Default: `AWS_ENDPOINT_URL`, else AWS.

    Raises:
        OutputError: `root` contains no run, or cannot be read.
    """
    return OpenDataset(Dataset(open_storage(root, s3_endpoint)))


class OpenDataset:
    """The rows that were committed when the dataset was opened. Images are read on demand; the tables of
    the last shard used stay in memory.

    Args:
        dataset: also available as an attribute, for access by shard.

    Raises:
        OutputError: the dataset contains no run.
    """

    def __init__(self, dataset: Dataset) -> None:
        run = dataset.run
        if run is None:
            raise OutputError(f"There is no run in {dataset.storage.root}: check the path.")
        self.dataset = dataset
        self._planned = Shards.of(run)
        self._tries = tries_again(run)
        self._model = run["settings"].get("model", "")
        self._shards = dataset.shards()
        self._held: dict[str, tuple[int, pa.Table]] = {}

    def __len__(self) -> int:
        """Return the number of committed rows, computed from the shards without reading tables."""
        return sum(len(self._planned[shard]) for shard in self._shards)

    def rows(self, columns: list[str] | None = None) -> pa.Table:
        """Return the metadata of all rows in the manifest's order. Default: all columns except images."""
        return self.dataset.metadata(columns, self._shards)

    def to_pandas(self, columns: list[str] | None = None) -> pandas.DataFrame:
        """Return `rows` as a pandas DataFrame.

        Raises:
            AaeBatchError: pandas is not installed.
        """
        try:
            return self.rows(columns).to_pandas()
        except ModuleNotFoundError:
            raise AaeBatchError(
                "to_pandas needs pandas: pip install pandas, or use rows, which returns an Arrow table."
            ) from None

    def image(self, id: str) -> Image.Image:
        """Return the image of a row.

        Raises:
            OutputError: the row does not exist, has no image, or its image cannot be read.
        """
        row = self._row(id)
        if row["status"] == "failed":
            raise OutputError(f"Row {id} has no image: {row['error']}")
        return self.dataset.image(row)

    def attention(self, id: str) -> pa.Table:
        """Return the attention table of a row, with one row per subject.

        Raises:
            OutputError: the row does not exist.
        """
        table = self._of_shard("attention", self._shard_of(id))
        return table.filter(pc.equal(table["id"], id))

    def maps(self, id: str, subject: str | int) -> tuple[list[int], np.ndarray]:
        """Return the attention to a subject over time: the steps, counted from 0, and its map at each as
        probabilities, float32 [steps, height, width]. A run without `--attention-maps every:N` kept the
        last step's alone.

        Args:
            subject: its words (the first match if they repeat), or its index among the subjects, from 0.

        Raises:
            OutputError: the row or subject does not exist.
        """
        return attention_maps(self._seen(id, subject))

    def heatmap(self, id: str, subject: str | int, step: int | None = None) -> Image.Image:
        """Return the image overlaid with the attention to a subject, the largest in the lightest colour.

        Args:
            subject: as for `maps`.
            step: one of the steps of `maps`. Default: the last.

        Raises:
            OutputError: the row, subject or map does not exist, or the row has no image.
        """
        steps, maps = self.maps(id, subject)
        if step is None:
            step = steps[-1]
        if step not in steps:
            raise OutputError(
                f"Row {id} has no map of step {step}, only of {', '.join(map(str, steps))}: a run keeps "
                "more with --attention-maps every:N."
            )
        return heatmap(self.image(id), maps[steps.index(step)])

    def _seen(self, id: str, subject: str | int) -> dict[str, Any]:
        """Return a row of the attention table."""
        seen = self.attention(id).to_pylist()
        for place, row in enumerate(seen):
            if subject in (place, row["subject"]):
                return row
        subjects = [row["subject"] for row in seen[:_NAMED]]
        names = f"its subjects are {', '.join(map(repr, subjects))}" if seen else "it has none"
        raise OutputError(f"Row {id} has no subject {shown(subject)}: {names}.")

    def compare(self, which: str, seed: int | None = None) -> Comparison:
        """Return the images of a prompt from the same noise, one per method, the plain one first, with the
        attention to its subjects. Rows that were tried several times go by their first seed.

        Args:
            which: a prompt, or the id of one of its rows.
            seed: not needed with an id, or if the prompt has only one.

        Raises:
            OutputError: no row has this prompt and seed, or several seeds do.
        """
        index = self._index
        place = pc.index(index["id"], which).as_py()
        if place >= 0:
            which, own = index["prompt"][place].as_py(), index["noise"][place].as_py()
            seed = own if seed is None else seed
        of_prompt = index.filter(pc.equal(index["prompt"], which))
        of_prompt = of_prompt.filter(of_prompt["noise"].is_valid())  # a seed that could not be read
        seeds = of_prompt["noise"].unique().to_pylist()
        if not seeds:
            raise OutputError(
                f"No row has the prompt or the id {shown(which)}: it must be the same to the letter."
            )
        more = ", ..." if len(seeds) > _NAMED else ""
        named = f"its seeds are {', '.join(map(str, seeds[:_NAMED]))}{more}"
        if seed is None:
            if len(seeds) > 1:
                raise OutputError(f"The prompt {shown(which)} needs a seed: {named}.")
            (seed,) = seeds
        found = of_prompt.filter(pc.equal(of_prompt["noise"], seed)).to_pylist()
        if not found:
            raise OutputError(f"No row has the prompt {shown(which)} and the seed {seed}: {named}.")
        times = Counter(row["method"] for row in found)
        comparison = Comparison(which, seed)
        for row in sorted(found, key=lambda row: (*method_order(row["method"]), row["id"])):
            label = row["method"] or "unknown method"
            if times[row["method"]] > 1:
                label = f"{label}, {row['id']}"
            if row["seed"] != seed:
                label = f"{label}, seed {row['seed']}"
            if row["status"] == "failed":
                comparison.errors[label] = self._row(row["id"])["error"]
            else:
                comparison.images[label] = self.image(row["id"])
                seen = self.attention(row["id"]).to_pylist()
                comparison.maps[label] = [(one["subject"], attention_map(one)) for one in seen]
        return comparison

    def worst(self, n: int = 10, by: str | None = None) -> Ranking:
        """Return the `n` rows with the lowest value, lowest first. Rows without a value are left out.

        Args:
            by: a score of `aae-batch evaluate` as `metric.column`, e.g. `clip.min_subject`, or a column of
                numbers of the rows; with a minus before it the highest come first, as in `-final_loss`.
                Default: the largest attention of the worst subject at the last step.

        Raises:
            OutputError: there are no such scores, or no such column.
        """
        name = (by or ATTENDED).removeprefix("-")
        values = self._attended() if by is None else self._values(name)
        index = self._index.select(["id", "prompt", "seed", "method"])
        ranked = index.append_column("value", pc.cast(values, pa.float64()))
        ranked = ranked.filter(pc.is_finite(ranked["value"]))
        order = "descending" if by is not None and by.startswith("-") else "ascending"
        return Ranking(self, name, ranked.sort_by([("value", order)]).slice(0, n))

    def _attended(self) -> pa.ChunkedArray:
        """Return the attention of each row's worst subject."""
        metric = AttentionMetric({})
        values = []
        for shard in self._shards:
            of_row = defaultdict(list)
            for one in self.dataset.attention_of(shard, ["id", "max_attention"]).to_pylist():
                of_row[one["id"]].append(one)
            columns = ["id", "method", "neglected", "num_refinements"]
            scored = metric.score(self.dataset.table(shard, columns).to_pylist(), (), of_row)
            values.append(pa.array([one[metric.best_by] for one in scored], pa.float64()))
        return pa.chunked_array(values, pa.float64())

    def _values(self, name: str) -> pa.ChunkedArray:
        """Return a score, `metric.column`, or a column of numbers, of every row."""
        metric, dot, column = name.partition(".")
        if not dot:
            rows = self.rows([name])
            if name in rows.column_names and _has_order(rows[name]):
                return rows[name]
            raise OutputError(f"There is no column of numbers {shown(name)} in the rows.")
        if metric in METRICS:
            short = JudgeSettings().metric_for(metric, self._model, {}).short
            column = short.get(column, column)
        scores, values, is_there = Scores(self.dataset), [], False
        for shard in self._shards:
            rows = self.dataset.table(shard, KEYS)
            of_shard = scores.of(metric, shard, rows, [column]).columns
            if of_shard is None or column not in of_shard.column_names:
                values.append(pa.nulls(len(rows), pa.float64()))
            elif not _has_order(of_shard[column]):
                raise OutputError(f"The scores {shown(name)} are not numbers; name others.")
            else:
                values.append(pc.cast(of_shard[column], pa.float64()).combine_chunks())
                is_there = True
        if not is_there:
            raise OutputError(
                f"There are no scores {shown(name)}: `aae-batch evaluate {self.dataset.storage.root} "
                f"--metric {metric}` computes those of a metric, or correct the name."
            )
        return pa.chunked_array(values, pa.float64())

    def __repr__(self) -> str:
        return f"<{self.dataset.storage.root}: {len(self)} of {self._planned.rows} rows>"

    def _repr_html_(self) -> str:
        counts = self._index.group_by(["method", "status"]).aggregate([([], "count_all")])
        lines = sorted(
            (row["method"] or "", row["status"], row["count_all"]) for row in counts.to_pylist()
        )
        cells = "".join(
            f"<tr><td>{escape(method)}</td><td>{escape(status)}</td><td>{count}</td></tr>"
            for method, status, count in lines
        )
        return (
            f"<div><b>{escape(self.dataset.storage.root)}</b>, {len(self)} of {self._planned.rows} rows"
            f"<table><tr><th>method</th><th>status</th><th>rows</th></tr>{cells}</table>"
            f"<div>{''.join(self._thumbnails())}</div></div>"
        )

    def _thumbnails(self) -> list[str]:
        """Return figures of the first images. All come from the first shard with images, so
        that only one shard is read; missing and damaged images are skipped."""
        ok = self._index.filter(pc.equal(self._index["status"], "ok"))
        rows = ok.slice(0, _THUMBNAILS).to_pylist()
        pictures = []
        for row in (row for row in rows if row["shard"] == rows[0]["shard"]):
            with suppress(OutputError):
                caption = f"{clipped(row['prompt'])}: {row['method']}, seed {row['seed']}"
                image = self.image(row["id"])
                pictures.append(figure(image, caption, row["prompt"], _THUMBNAIL_SIDE))
        return pictures

    @cached_property
    def _index(self) -> pa.Table:
        """Id, prompt, seed, method, status and shard of all rows, and as `noise` the seed of their first
        try; reads every shard once."""
        if not self._tries:
            index = self.dataset.metadata(_INDEX, self._shards)
            return index.append_column("noise", index["seed"])
        index = self.dataset.metadata([*_INDEX, "first_seed"], self._shards)
        first = pc.coalesce(index["first_seed"], index["seed"])
        return index.drop_columns("first_seed").append_column("noise", first)

    def _shard_of(self, id: str) -> int:
        place = pc.index(self._index["id"], id).as_py()
        if place < 0:
            raise OutputError(
                f"There is no row {shown(id)} among the {len(self)} that are committed; "
                "rows(['id']) has their ids."
            )
        return self._index["shard"][place].as_py()

    def _row(self, id: str) -> dict[str, Any]:
        """Return the columns that locate a row's image, or say why it failed."""
        table = self._of_shard("metadata", self._shard_of(id))
        return table.slice(pc.index(table["id"], id).as_py(), 1).to_pylist()[0]

    def _of_shard(self, kind: str, shard: int) -> pa.Table:
        if kind not in self._held or self._held[kind][0] != shard:
            of = self.dataset
            read = of.attention_of(shard) if kind == "attention" else of.table(shard, _PLACE)
            self._held[kind] = (shard, read)
        return self._held[kind][1]


def _has_order(values: pa.ChunkedArray) -> bool:
    """Return whether values are numbers, by which rows can be ranked."""
    kind = values.type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


@dataclass(frozen=True)
class Comparison:
    """Images of one prompt from the same noise.

    Attributes:
        images: by method, the plain one first, or by "method, id" if a method has several rows.
        maps: with the same keys, each subject and its map at the last step as probabilities, float32
            [height, width].
        errors: the errors of failed rows, with the same keys.
    """

    prompt: str
    seed: int
    images: dict[str, Image.Image] = field(default_factory=dict)
    maps: dict[str, list[tuple[str, np.ndarray]]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        rows = ", ".join([*self.images, *(f"{label} (failed)" for label in self.errors)])
        return f"<Comparison of {clipped(self.prompt)!r}, seed {self.seed}: {rows}>"

    def _repr_html_(self) -> str:
        """Return a column per method: its image, and its attention on the scale of all columns."""
        most = max((float(map.max()) for seen in self.maps.values() for _, map in seen), default=0)
        columns = "".join(
            '<div style="display: inline-block; vertical-align: top; margin-right: 8px">'
            f"<b>{escape(label)}</b><div>{figure(image, f'seed {self.seed}', label)}</div>"
            + "".join(
                f"<div>{figure(heatmap(image, map, most), clipped(name), f'{label}: {name}')}</div>"
                for name, map in self.maps.get(label, ())
            )
            + "</div>"
            for label, image in self.images.items()
        )
        errors = self.errors.items()
        failed = "".join(f"<p>{escape(label)} failed: {escape(why)}</p>" for label, why in errors)
        prompt = f'<b title="{escape(self.prompt)}">{escape(clipped(self.prompt))}</b>'
        bar = scale(most) if most else ""
        return f"<div>{prompt}, seed {self.seed}<div>{columns}</div>{bar}{failed}</div>"

    def _repr_png_(self) -> bytes | None:
        """Return the images side by side, in the order of `images`, as a PNG; None without images."""
        images = list(self.images.values())
        if not images:
            return None
        size = (sum(image.width for image in images), max(image.height for image in images))
        row = Image.new("RGB", size, "white")
        left = 0
        for image in images:
            row.paste(image, (left, 0))
            left += image.width
        return png(row)


@dataclass(frozen=True)
class Ranking:
    """Rows in the order of a value. A notebook shows them with their images, read when shown.

    Attributes:
        by: the name of the value.
        rows: id, prompt, seed, method and value of each row.
    """

    dataset: OpenDataset
    by: str
    rows: pa.Table

    def __repr__(self) -> str:
        lines = [
            f"{row['value']:.4g}  {row['id']}  {row['method']}, seed {row['seed']}  "
            f"{clipped(as_text(row['prompt']))}"
            for row in self.rows.to_pylist()
        ]
        return "\n".join([f"{len(lines)} rows by {self.by}", *lines])

    def _repr_html_(self) -> str:
        heads = ("", self.by, "id", "method", "seed", "prompt")
        head = "".join(f"<th>{escape(name)}</th>" for name in heads)
        lines = []
        for row in self.rows.to_pylist():
            image, prompt = "", as_text(row["prompt"])
            with suppress(OutputError):
                image = picture(self.dataset.image(row["id"]), prompt, _THUMBNAIL_SIDE)
            texts = (f"{row['value']:.4g}", row["id"], row["method"], row["seed"])
            cells = "".join(f"<td>{escape(as_text(text))}</td>" for text in texts)
            cells += f'<td title="{escape(prompt)}">{escape(clipped(prompt))}</td>'
            lines.append(f"<tr><td>{image}</td>{cells}</tr>")
        return f"<table><tr>{head}</tr>{''.join(lines)}</table>"
