"""The dataset card: a README.md with the header that Hugging Face's hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from aae_batch.dataset import layout
from aae_batch.errors import SettingsError
from aae_batch.export.formats import SAMPLES, Format, Parquet
from aae_batch.export.selection import Selection

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard, DatasetCardData

    from aae_batch.export.export import ExportSettings

_SIZES = (
    *("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M"),
    *("1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"),
)
_TAGS = ("synthetic", "attend-and-excite", "semantic-guidance")
_PAPER = "https://arxiv.org/abs/2301.13826"
_BY_CONJUNCT = "composable-diffusion"
_OF_ATTENTION = ("final_loss", "neglected")
"""Besides those of the metric `attention`. With `_BY_CONJUNCT` they are of another kind: see
`layout.ATTENTION_SCHEMA`."""

_DESCRIPTIONS = {
    column.name: (column.metadata or {}).get(b"description", b"").decode()
    for column in (*layout.MANIFEST_COLUMNS, *layout.OUTCOME_COLUMNS, layout.IMAGE_COLUMN)
}
_DESCRIPTIONS |= {
    "image": "The picture.",
    "file_name": "The picture, beside the table; readers show it as the column image.",
}


@dataclass(frozen=True)
class Facts:
    """What a card tells of an export.

    Attributes:
        run: what the output's `run.json` says.
        shards: how many of the output's there are, and how many there will be.
        schema: of the exported rows, as far as the format has their columns.
        scored: names of columns that metrics have added, by metric.
        figures: the rows' method and the columns that are averaged for each.
    """

    title: str
    run: dict[str, Any]
    shards: tuple[int, int]
    selection: Selection
    schema: pa.Schema
    scored: dict[str, list[str]]
    figures: pa.Table


def dataset_card(facts: Facts, settings: ExportSettings, written: Format) -> DatasetCard:
    """The card of what was written.

    Its header has no `configs`: `datasets` finds the split by the files' names, and then its cache
    tells this export from another one of the same name by the files that it finds. With a pattern in
    `configs` it goes by the pattern, and loads the rows of the earlier one.

    Raises:
        SettingsError: the format `hf` is asked for without `datasets`.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    data = DatasetCardData(
        license=settings.license,
        pretty_name=facts.title,
        task_categories=["text-to-image"],
        size_categories=[size_category(len(facts.selection))],
        tags=[*_TAGS, *({"webdataset", "imagefolder"} & {settings.format})],
    )
    if settings.format == "hf":
        assert isinstance(written, Parquet)
        _add_info(data, written, len(facts.selection))
    text = "\n\n".join(
        [
            f"# {_plain(facts.title)}",
            f"![Pictures evenly spaced over the dataset, not picked]({SAMPLES})",
            _summary(facts),
            "## Pictures",
            _counts(facts),
            _choice(facts, settings),
            "## Columns",
            _columns(facts, settings),
            "## How it was made",
            _making(facts.run),
            "## Loading",
            _loading(settings.format),
            "## Licence",
            _licence(settings.license),
        ]
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def size_category(rows: int) -> str:
    """The hub's name for so many rows."""
    digits = len(str(rows))
    return _SIZES[min(max(0, digits - 3), len(_SIZES) - 1)]


def require_datasets() -> None:
    """Raises:
    SettingsError: the library `datasets` is not installed.
    """
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise SettingsError(
            "--format hf needs Hugging Face's datasets: pip install 'aae-batch[hf]', or choose "
            "--format parquet."
        ) from None


def check_features(schema: pa.Schema) -> None:
    """Raises:
    SettingsError: `datasets` has no features for a column of this schema.
    """
    for column in schema:
        if not _has_features(column):
            raise SettingsError(
                f"Column {column.name} is of the type {column.type}, which Hugging Face's datasets "
                "cannot describe: choose --format parquet."
            )


def _has_features(column: pa.Field) -> bool:
    from datasets import Features

    try:
        Features.from_arrow_schema(pa.schema([column]))
    except ValueError:
        return False
    return True


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


def _summary(facts: Facts) -> str:
    methods = facts.figures["method"].unique().to_pylist()
    guided = "attend-and-excite" in methods
    return (
        f"{len(facts.selection):,} pictures that a text-to-image diffusion model made of prompts, by "
        f"{_listed(methods)}. "
        + (
            f"Attend-and-Excite ([Chefer et al., 2023]({_PAPER})) guides the latents until every "
            "subject of the prompt is attended to. "
            if guided
            else ""
        )
        + "`final_loss` is 1 minus the attention of the worst subject at the last step, and "
        "`neglected` says that it did not reach the last threshold."
    )


def _counts(facts: Facts) -> str:
    """A table of each method's pictures, and the means of its figures that can be compared."""
    figures = facts.figures
    names = [
        name
        for name in figures.column_names
        if name != "method" and figures[name].null_count < figures.num_rows
    ]
    of_attention = {*_OF_ATTENTION, *facts.scored.get("attention", ())}
    lines = []
    for method in sorted(figures["method"].unique().to_pylist()):
        of_method = figures.filter(pc.equal(figures["method"], method))
        means = (
            "-" if method == _BY_CONJUNCT and name in of_attention else _mean(of_method[name])
            for name in names
        )
        lines.append([method, f"{of_method.num_rows:,}", *means])
    table = _table(["method", "pictures", *(f"mean {name}" for name in names)], lines)
    if not any("-" in line for line in lines):
        return table
    return (
        f"{table}\n\n-: with `{_BY_CONJUNCT}` a subject competes with the words of its own part of the "
        "prompt alone, so that figures of attention are not to be compared with those of other methods."
    )


def _mean(values: pa.ChunkedArray) -> str:
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    mean = pc.mean(values).as_py()
    return "" if mean is None else f"{mean:.3f}"


def _choice(facts: Facts, settings: ExportSettings) -> str:
    selection = facts.selection
    done, planned = facts.shards
    sentences = [f"The output has {selection.rows:,} rows."]
    if done < planned:
        sentences.append(f"It was not complete: {done} of its {planned} shards were there.")
    if settings.where is not None:
        sentences.append(
            f"{selection.refused:,} were left out by the condition {_code(settings.where.text)}."
        )
    if selection.failed:
        sentences.append(f"{selection.failed:,} have no picture, since their generation failed.")
    if settings.best is not None:
        among = "all" if settings.best.of is None else f"the first {settings.best.of}"
        sentences.append(
            f"Of each prompt and method, the picture with the lowest final loss among {among} of its "
            f"rows was kept, which left out {selection.beaten:,}."
        )
    return " ".join([*sentences, *map(_plain, selection.notes)])


def _columns(facts: Facts, settings: ExportSettings) -> str:
    described = dict(_DESCRIPTIONS)
    for metric, names in facts.scored.items():
        described |= dict.fromkeys(names, f"Score of the metric {metric}.")
    first = {
        "imagefolder": [("file_name", "string")],
        "webdataset": [],
    }.get(settings.format, [("image", "image")])
    columns = [*first, *((column.name, str(column.type)) for column in facts.schema)]
    lines = [
        [_code(name), _code(kind), described.get(name, "Of the manifest.")]
        for name, kind in columns
    ]
    return _table(["column", "type", ""], lines)


def _making(run: dict[str, Any]) -> str:
    settings = run["settings"]
    model = settings["model"]
    if Path(model).expanduser().is_absolute() or "://" in model:
        model = f"{Path(model).name}, a folder"  # a path is of a machine, and nobody else's concern
    facts = [
        ["model", model],
        ["revision", settings["revision"]],
        ["SHA-256 of the weights", settings["weights"]],
        ["precision", settings["dtype"]],
        ["device", settings["device"]],
        ["fingerprint of the run", run["fingerprint"]],
        *([f"version of {name}", version] for name, version in run.get("versions", {}).items()),
    ]
    table = _table(["", ""], [[name, _plain(value)] for name, value in facts if value])
    guidance = json.dumps(settings["guidance"], indent=2)
    return (
        f"{table}\n\nSettings of sampling and guidance, which a row's own columns override:\n\n"
        f"```json\n{guidance}\n```"
    )


def _loading(name: str) -> str:
    return (
        "```python\nfrom datasets import load_dataset\n\n"
        'rows = load_dataset("...", split="train")  # this folder, or the repository\'s name\n```'
        + (
            "\n\nWith `webdataset`: `WebDataset(glob('.../train-*.tar'), shardshuffle=False)`."
            if name == "webdataset"
            else ""
        )
    )


def _licence(name: str | None) -> str:
    if name is None:
        return (
            "None has been chosen: whoever publishes this chooses one, in the field `license` of this "
            "file's header. The licence of the model may bind what it has drawn."
        )
    return f"{_code(name)}. The licence of the model may bind what it has drawn."


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [list(heads), ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(_cell(text) for text in row)} |" for row in rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _listed(names: Sequence[str]) -> str:
    names = [_code(name) for name in sorted(names)]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _code(text: str) -> str:
    """Text as code of one line; it may hold backticks itself."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _plain(text: str) -> str:
    """Text in which Markdown and HTML mean nothing."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", " ".join(str(text).split()))
