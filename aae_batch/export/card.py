"""Render the dataset card, a README.md with Hugging Face's metadata header, from `card.md.jinja`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from aae_batch.dataset import layout
from aae_batch.dataset.methods import attention_compares, shown_settings
from aae_batch.export.formats import SAMPLES, Format, Parquet, WebDataset
from aae_batch.export.selection import Selection
from aae_batch.export.settings import ExportSettings
from aae_batch.export.source import Source

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard, DatasetCardData

_SIZES = (
    *("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M"),
    *("1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"),
)
_OF_ATTENTION = ("final_loss", "neglected")
"""Columns that, like the metric `attention`'s, compare only if `attention_compares`."""

_DESCRIPTIONS = {
    column.name: (column.metadata or {}).get(b"description", b"").decode()
    for column in (*layout.MANIFEST_COLUMNS, *layout.OUTCOME_COLUMNS, *layout.TRIES_COLUMNS)
} | {
    "image": "The image.",
    "file_name": "The image's file, relative to the table; readers show it as the column image.",
}


@dataclass(frozen=True)
class Facts:
    """What a card says about an export.

    Attributes:
        schema: the exported columns that the format can hold.
        figures: the method of each row, and the columns that are averaged per method.
    """

    title: str
    source: Source
    selection: Selection
    schema: pa.Schema
    figures: pa.Table


def dataset_card(facts: Facts, settings: ExportSettings, written: Format) -> DatasetCard:
    """Return the card of what was written.

    Its header has no `configs`, so `datasets` finds the split by file names, and its cache tells two
    exports of the same name apart by their files. With a pattern in `configs` it compares only the
    pattern, and loads the rows of the earlier export.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    data = DatasetCardData(
        license=settings.license,
        pretty_name=facts.title,
        task_categories=["text-to-image"],
        size_categories=[_size_category(len(facts.selection))],
        tags=[
            *("synthetic", "attend-and-excite", "semantic-guidance"),
            *({"webdataset", "imagefolder"} & {settings.format}),
        ],
    )
    if settings.format == "hf":
        assert isinstance(written, Parquet)
        _add_info(data, written, len(facts.selection))
    if settings.format == "webdataset":
        assert isinstance(written, WebDataset)
        data["dataset_info"] = {"features": tar_features(facts.schema, written.suffix)}
    methods = sorted(facts.figures["method"].unique().to_pylist())
    heads, lines = _means(facts, methods)
    *others, last = map(_code, methods)
    return DatasetCard.from_template(
        data,
        template_str=(files("aae_batch.export") / "card.md.jinja").read_text(encoding="utf-8"),
        title=facts.title,
        source=facts.source,
        settings=settings,
        selection=facts.selection,
        samples=SAMPLES,
        listed=f"{', '.join(others)} and {last}" if others else last,
        methods=methods,
        means=_table(heads, lines),
        some_not_compared=any("-" in line for line in lines),
        by_conjunct=", ".join(method for method in methods if not attention_compares(method)),
        columns=_table(["column", "type", ""], _columns(facts, settings.format)),
        making=_table(["", ""], _making(facts.source.run)),
        guidance=json.dumps(_sampling(facts.source.run, methods), indent=2),
        code=_code,
        plain=_plain,
    )


def _sampling(run: Mapping[str, Any], methods: Sequence[str]) -> dict[str, Any]:
    settings = shown_settings(run, methods)
    return settings["guidance"] | {"steering": settings.get("steering", {})}


def _size_category(rows: int) -> str:
    """Return the hub's size category for a number of rows."""
    return _SIZES[min(max(0, len(str(rows)) - 3), len(_SIZES) - 1)]


def _add_info(data: DatasetCardData, written: Parquet, rows: int) -> None:
    from datasets import DatasetInfo, Features, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict

    splits = SplitDict()
    splits.add(SplitInfo("train", num_bytes=written.memory_bytes, num_examples=rows))
    info = DatasetInfo(
        features=Features.from_arrow_schema(written.schema),
        splits=splits,
        download_size=written.num_bytes,
        dataset_size=written.memory_bytes,
    )
    DatasetInfosDict(default=info).to_dataset_card_data(data)


def tar_features(schema: pa.Schema, suffix: str) -> list[dict[str, Any]]:
    """Return what `datasets` finds in a sample of a tar, as the header writes it. Without it, `datasets`
    takes a column for one of nulls if the first five rows have no value."""
    columns = [{"name": column.name, **_feature(column.type)} for column in schema]
    return [
        {"name": suffix.removeprefix("."), "dtype": "image"},
        {"name": "json", "struct": columns},
        {"name": "__key__", "dtype": "string"},
        {"name": "__url__", "dtype": "string"},
    ]


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_dictionary(kind):
        return _feature(kind.value_type)
    if pa.types.is_struct(kind):
        return {"struct": [{"name": field.name, **_feature(field.type)} for field in kind]}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        entry = _feature(kind.value_type)
        return {"list": entry.get("struct") or entry.get("dtype") or entry}
    floats = {pa.float32(): "float32", pa.float64(): "float64"}
    return {"dtype": floats.get(kind, str(kind))}


def _means(facts: Facts, methods: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of a table: number of images and mean figures per method. "-" marks a
    mean that does not compare with other methods'."""
    figures = facts.figures
    names = [
        name
        for name in figures.column_names
        if name != "method" and figures[name].null_count < figures.num_rows
    ]
    of_attention = {*_OF_ATTENTION, *facts.source.scores.of_metrics.get("attention", ())}
    lines = []
    for method in methods:
        of_method = figures.filter(pc.equal(figures["method"], method))
        means = (
            "-"
            if name in of_attention and not attention_compares(method)
            else _mean(of_method[name])
            for name in names
        )
        lines.append([method, f"{of_method.num_rows:,}", *means])
    own = {"final_loss": "own final_loss"}
    heads = (f"mean {own.get(name, name)}" for name in names)
    return ["method", "images", *heads], lines


def _mean(values: pa.ChunkedArray) -> str:
    mean = pc.mean(values.cast(pa.float64())).as_py()
    return "" if mean is None else f"{mean:.3f}"


def _columns(facts: Facts, export_format: str) -> list[list[str]]:
    described = dict(_DESCRIPTIONS)
    for metric, names in facts.source.scores.of_metrics.items():
        described |= dict.fromkeys(names, f"Score of the metric {metric}.")
    columns = [(column.name, str(column.type)) for column in facts.schema]
    if export_format != "webdataset":
        is_folder = export_format == "imagefolder"
        columns.insert(0, ("file_name", "string") if is_folder else ("image", "image"))
    return [
        [_code(name), _code(kind), described.get(name, "From the manifest.")]
        for name, kind in columns
    ]


def _making(run: dict[str, Any]) -> list[list[str]]:
    settings = run["settings"]
    facts = {
        "model": _elsewhere(settings["model"]),
        "revision": settings["revision"],
        "variant": settings.get("variant"),
        "LoRA": ", ".join(map(_elsewhere, settings.get("lora", []))),
        "SHA-256 of the weights": settings["weights"],
        "precision": settings["dtype"],
        "device": settings["device"],
        "fingerprint of the run": run["fingerprint"],
    }
    facts |= {f"version of {name}": version for name, version in run.get("versions", {}).items()}
    return [[name, _plain(value)] for name, value in facts.items() if value]


def _elsewhere(model: str) -> str:
    """Return a model's or LoRA's name for others, to whom a local path means nothing."""
    if Path(model).expanduser().is_absolute() or "://" in model:
        return f"{Path(model).name}, a folder or file"
    return model


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    cells = ([text.replace("|", "\\|").replace("\n", " ") for text in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _code(text: str) -> str:
    """Return text, which may contain backticks, as a one-line code span."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _plain(text: str) -> str:
    """Escape Markdown and HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", " ".join(str(text).split()))
