from __future__ import annotations

import csv
import io
import math
import time

import numpy as np
import pytest

from aae_batch.evaluate.bootstrap import estimate
from aae_batch.evaluate.pictures import MEASURES, Picture
from aae_batch.evaluate.render import as_csv, as_latex, as_text
from aae_batch.evaluate.table import make_table, paired_difference

CLIP = next(measure for measure in MEASURES if measure.name == "clip_full")
FOUND = next(measure for measure in MEASURES if measure.name == "all_found")
PLAIN, GUIDED = "stable-diffusion", "attend-and-excite"


def picture(method=PLAIN, prompt="p", seed=0, group="all", label=None, **figures) -> Picture:
    return Picture(method, label or method, group, prompt, seed, figures or {"clip_full": 0.25})


# --- the mean and its interval ---


def test_the_mean_is_over_pictures_not_over_prompts():
    found = estimate([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert (found.mean, found.pictures, found.prompts) == (0.75, 4, 2)


def test_the_interval_of_many_prompts_is_that_of_theory():
    random = np.random.default_rng(1)
    values = random.normal(3, 2, size=400)
    found = estimate(values, [str(i) for i in range(400)])
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_seeds_of_a_prompt_do_not_make_it_surer():
    values = np.random.default_rng(1).normal(size=50)
    prompts = [str(i) for i in range(50)]
    once = estimate(values, prompts)
    ten_times = estimate(np.tile(values, 10), prompts * 10)
    assert (ten_times.low, ten_times.high) == pytest.approx((once.low, once.high))


def test_the_same_values_give_the_same_interval():
    assert estimate([1.0, 2.0, 4.0], list("abc")) == estimate([1.0, 2.0, 4.0], list("abc"))


def test_a_single_prompt_has_no_interval_and_none_has_no_mean():
    found = estimate([0.5, 0.7], ["a", "a"])
    assert found.mean == pytest.approx(0.6)
    assert math.isnan(found.low)
    assert estimate([], []) is None


# --- rows, columns, differences ---


def test_differences_are_over_the_prompts_and_seeds_that_both_have():
    ours = [
        picture(GUIDED, p, s, clip_full=v) for p, s, v in [("a", 0, 5), ("a", 1, 7), ("b", 0, 9)]
    ]
    theirs = [
        picture(PLAIN, p, s, clip_full=v) for p, s, v in [("b", 0, 6), ("a", 0, 4), ("c", 0, 1)]
    ]
    found = paired_difference(ours, theirs, CLIP)
    assert (found.mean, found.pictures, found.prompts) == (2.0, 2, 2)
    assert paired_difference(ours, [], CLIP) is None


def test_a_table_has_the_papers_columns_and_the_baseline_first():
    groups = ["Object-Object", "other", "Animal-Object", "Animal-Animal"]
    table = make_table([picture(m, group=g) for g in groups for m in (GUIDED, PLAIN)])
    assert table.groups == ("Animal-Animal", "Animal-Object", "Object-Object", "other")
    assert [(line.label, line.minus) for line in table.lines] == [
        (PLAIN, None),
        (GUIDED, None),
        (GUIDED, PLAIN),
    ]


def test_measures_without_figures_are_left_out_and_pictures_without_one_do_not_count():
    table = make_table([picture(all_found=1.0), picture(seed=1, all_found=0.0), picture(seed=2)])
    assert {line.measure.name for line in table.lines} == {"all_found", "clip_full"}
    found = {line.measure.name: line.cells["all"] for line in table.lines}
    assert (found["all_found"].mean, found["all_found"].pictures) == (0.5, 2)
    assert found["clip_full"].pictures == 1


def test_ten_thousand_pictures_take_a_moment():
    random = np.random.default_rng(0)
    figures = {measure.name: 0.5 for measure in MEASURES}
    pictures = [
        picture(method, str(i // 4), i % 4, group, **{**figures, "clip_full": random.random()})
        for method in (PLAIN, GUIDED)
        for group in ("Animal-Animal", "Object-Object")
        for i in range(5000)
    ]
    start = time.perf_counter()
    make_table(pictures)
    assert time.perf_counter() - start < 60  # 2 s where nothing else runs


# --- as text ---


@pytest.fixture
def table():
    return make_table(
        [
            picture(method, prompt, group="Animal-Animal", clip_full=base + shift, all_found=found)
            for method, shift, found in ((PLAIN, 0.0, 0.0), (GUIDED, 0.125, 1.0))
            for prompt, base in (("a", 0.25), ("b", 0.5))
        ],
        stale=3,
    )


def test_the_text_has_means_intervals_and_signed_differences(table):
    lines = as_text(table).splitlines()
    assert lines[0] == "Full prompt similarity (clip)"
    assert lines[1].split() == ["Animal-Animal"]
    assert lines[2].split(maxsplit=1) == [PLAIN, "0.375 [0.250, 0.500]"]
    assert lines[4].endswith("+0.125 [+0.125, +0.125]")
    assert f"{GUIDED} minus {PLAIN}" in lines[4]
    assert "+100.0 % [+100.0, +100.0]" in as_text(table)
    assert "3 scores are left out" in as_text(table)


def test_the_csv_has_a_line_for_each_cell_in_full_precision(table):
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert len(rows) == 6
    first = rows[0]
    assert (first["metric"], first["measure"], first["method"]) == ("clip", "clip_full", PLAIN)
    assert (first["set"], float(first["mean"]), first["minus"]) == ("Animal-Animal", 0.375, "")
    assert (rows[2]["minus"], float(rows[2]["mean"])) == (PLAIN, 0.125)
    assert {row["prompts"] for row in rows} == {"2"}


def test_latex_has_a_column_for_each_set_and_no_bare_percent(table):
    text = as_latex(table)
    assert text.startswith("\\begin{tabular}{lc}\n\\toprule\n & Animal-Animal \\\\\n")
    assert text.endswith("\\bottomrule\n\\end{tabular}\n")
    assert "100.0 \\% [100.0, 100.0] \\\\" in text
    assert "%" not in text.replace("\\%", "")
