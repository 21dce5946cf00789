"""The settings of an export."""

from __future__ import annotations

from dataclasses import dataclass

from aae_batch.dataset.condition import Condition
from aae_batch.errors import SettingsError
from aae_batch.export.formats import FORMATS
from aae_batch.export.selection import Best, Ids

ROWS_PER_FILE = 1000
"""About 400 MB of 512 x 512 PNG: a file size that the hub recommends and that fits in memory."""


@dataclass(frozen=True)
class ExportSettings:
    """What is exported, and how.

    Attributes:
        format: `hf`, `parquet`, `webdataset` or `imagefolder`.
        where: export only rows that satisfy this condition.
        ids: export only rows with these ids.
        best: export only the best of these rows for each prompt and method.
        partial: export the committed part of an incomplete output.
        force: replace an earlier export in the destination.
        license: for the card, as the hub spells it; None leaves it to the user.
        rows_per_file: of a Parquet file or tar; memory holds up to 2.5 copies of that many images.

    Raises:
        SettingsError: a value is unknown or out of range, or needs a package that is missing.
    """

    format: str = "hf"
    where: Condition | None = None
    best: Best | None = None
    ids: Ids | None = None
    partial: bool = False
    force: bool = False
    license: str | None = None
    rows_per_file: int = ROWS_PER_FILE

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise SettingsError(f"--format {self.format}: choose one of {', '.join(FORMATS)}.")
        if self.rows_per_file < 1:
            raise SettingsError(f"--rows-per-file {self.rows_per_file}: give at least 1.")
        if self.format == "hf":
            _require_datasets()


def _require_datasets() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise SettingsError(
            "--format hf needs Hugging Face's datasets: pip install datasets, or choose "
            "--format parquet."
        ) from None
