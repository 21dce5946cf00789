"""The validation benchmark measures what it says, on a few rows."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from benchmarks.validate import SEEDS, all_different, half_wrong, many_seeds, measured
from training.networks import tokenizer


@pytest.mark.parametrize(
    ("make", "prompts", "least_failing"),
    [(all_different, 640, 0), (many_seeds, 640 // SEEDS, 0), (half_wrong, 640, 320)],
)
def test_it_judges_the_manifests_it_names(tmp_path, make, prompts, least_failing):
    table = make(0, 640)
    assert len(set(table["prompt"].to_pylist())) == prompts
    pq.write_table(table, tmp_path / "m.parquet")
    _, _, failing = measured(tmp_path / "m.parquet", tokenizer(), processes=1)
    assert least_failing <= failing < least_failing + 200
