from __future__ import annotations

import csv
import io
import math
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from aae_batch.evaluate.bootstrap import estimate
from aae_batch.evaluate.pictures import MEASURES, Pictures, Variant, numbered
from aae_batch.evaluate.render import as_csv, as_latex, as_text
from aae_batch.evaluate.table import Line, Table, make_table

PLAIN, GUIDED = "stable-diffusion", "attend-and-excite"


def picture(method=PLAIN, prompt="p", seed=0, group="all", output="out", steps=50, **figures):
    return {
        "variant": Variant(method if output == "out" else f"{method} ({output})", method, output),
        "group": group,
        "prompt": prompt,
        "seed": seed,
        "form": steps,
        "figures": figures or {"clip_full": 0.25},
    }


def of(*pictures) -> Pictures:
    names = {
        key: list(dict.fromkeys(p[key] for p in pictures)) for key in ("variant", "group", "prompt")
    }
    numbers = {key: [names[key].index(p[key]) for p in pictures] for key in names}
    numbers |= {key: [p[key] for p in pictures] for key in ("seed", "form")}
    figures = {
        m.name: np.array([p["figures"].get(m.name, math.nan) for p in pictures], float)
        for m in MEASURES
    }
    columns = {key: np.array(values) for key, values in numbers.items()}
    return Pictures((*names["variant"],), (*names["group"],), **columns, figures=figures)


def line(table: Table, label: str, minus: str | None = None, measure: str = "clip_full") -> Line:
    (found,) = (
        one
        for one in table.lines
        if (one.label, one.minus, one.measure.name) == (label, minus, measure)
    )
    return found


# --- the mean and its interval ---


def test_the_mean_is_over_pictures_not_over_prompts():
    found = estimate(np.array([1.0, 1.0, 1.0, 0.0]), np.array([7, 7, 7, 2]))
    assert (found.mean, found.pictures, found.prompts) == (0.75, 4, 2)


def test_the_interval_of_many_prompts_is_that_of_theory():
    random = np.random.default_rng(1)
    values = random.normal(3, 2, size=400)
    found = estimate(values, np.arange(400))
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_seeds_of_a_prompt_do_not_make_it_surer():
    values = np.random.default_rng(1).normal(size=50)
    once = estimate(values, np.arange(50))
    ten_times = estimate(np.tile(values, 10), np.tile(np.arange(50), 10))
    assert (ten_times.low, ten_times.high) == pytest.approx((once.low, once.high))


def test_the_same_values_give_the_same_interval():
    values, prompts = np.arange(10.0), np.arange(10)
    assert estimate(values, prompts) == estimate(values, prompts)


@pytest.mark.parametrize(
    "values",
    [[0.5, 0.7], [*range(9)], [0.6] * 50],
    ids=["two prompts", "nine prompts", "one value"],
)
def test_few_prompts_and_prompts_that_are_all_the_same_have_no_interval(values):
    found = estimate(np.array(values, float), np.arange(len(values)))
    assert found.mean == pytest.approx(np.mean(values))
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_without_values_there_is_no_mean():
    assert estimate(np.empty(0), np.empty(0, int)) is None


def test_of_many_prompts_the_interval_is_as_wide_and_memory_is_bounded():
    random = np.random.default_rng(2)
    prompts = np.repeat(np.arange(100_000), 2)
    of_prompt = random.normal(3, 2, size=100_000)
    tracemalloc.start()
    found = estimate(np.repeat(of_prompt, 2), prompts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    half = 1.96 * of_prompt.std() / math.sqrt(100_000)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert peak < 40e6  # a draw of every prompt at a time would be 80 MB


# --- numbers for pairs ---


def test_numbers_are_the_same_where_all_columns_are():
    numbers = numbered(np.array([1, 1, 2, 1]), np.array([0.5, 7.5, 0.5, 0.5]))
    assert [numbers[0] == number for number in numbers] == [True, False, False, True]


# --- rows, columns, differences ---


def test_differences_are_over_the_prompts_and_seeds_that_both_have():
    ours = [("a", 0, 5), ("a", 1, 7), ("b", 0, 9)]
    theirs = [("b", 0, 6), ("a", 0, 4), ("c", 0, 1)]
    table = make_table(
        of(
            *(picture(GUIDED, p, s, clip_full=v) for p, s, v in ours),
            *(picture(PLAIN, p, s, clip_full=v) for p, s, v in theirs),
        )
    )
    found = line(table, GUIDED, PLAIN).cells["all"]
    assert (found.mean, found.pictures, found.prompts) == (2.0, 2, 2)
    assert table.notes == ()


def test_pictures_of_other_steps_are_no_pair():
    table = make_table(
        of(
            picture(PLAIN, "a", clip_full=1),
            picture(PLAIN, "b", clip_full=1, steps=20),
            picture(GUIDED, "a", clip_full=3),
            picture(GUIDED, "b", clip_full=9),
        )
    )
    found = line(table, GUIDED, PLAIN).cells["all"]
    assert (found.mean, found.pictures) == (2.0, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"seed": 1}, "column seed"), ({"steps": 20}, "steps or guidance_scale")],
)
def test_a_note_says_why_there_are_no_pairs(changes, reason):
    table = make_table(of(picture(PLAIN), picture(GUIDED, **changes)))
    assert line(table, GUIDED, PLAIN).cells["all"] is None
    (note,) = table.notes
    assert note.startswith(f"{GUIDED} and {PLAIN} have no pairs")
    assert reason in note
    assert as_text(table).endswith(note)


def test_rows_of_an_output_are_compared_with_its_own_plain_sampling():
    table = make_table(
        of(
            picture(PLAIN, output="a", clip_full=1),
            picture(PLAIN, output="b", clip_full=2),
            picture(GUIDED, output="b", clip_full=5),
            picture(GUIDED, output="c", clip_full=9),
        )
    )
    compared = {one.label: (one.minus, one.cells["all"].mean) for one in table.lines if one.minus}
    assert compared == {
        f"{PLAIN} (b)": (f"{PLAIN} (a)", 1),
        f"{GUIDED} (b)": (f"{PLAIN} (b)", 3),
        f"{GUIDED} (c)": (f"{PLAIN} (a)", 8),
    }


def test_a_table_has_the_papers_columns_and_the_baseline_first():
    groups = ["Object-Object", "other", "Animal-Object", "Animal-Animal"]
    table = make_table(of(*(picture(m, group=g) for g in groups for m in (GUIDED, PLAIN))))
    assert table.groups == ("Animal-Animal", "Animal-Object", "Object-Object", "other")
    assert [(line.label, line.minus) for line in table.lines] == [
        (PLAIN, None),
        (GUIDED, None),
        (GUIDED, PLAIN),
    ]


def test_measures_without_figures_are_left_out_and_pictures_without_one_do_not_count():
    table = make_table(of(picture(all_found=1.0), picture(seed=1, all_found=0.0), picture(seed=2)))
    assert {line.measure.name for line in table.lines} == {"all_found", "clip_full"}
    found = {line.measure.name: line.cells["all"] for line in table.lines}
    assert (found["all_found"].mean, found["all_found"].pictures) == (0.5, 2)
    assert found["clip_full"].pictures == 1


# --- as text ---


@pytest.fixture
def table():
    pictures = of(
        *(
            picture(method, prompt, group="Animal-Animal", clip_full=base + shift, all_found=found)
            for method, shift, found in ((PLAIN, 0.0, 0.0), (GUIDED, 0.125, 1.0))
            for prompt, base in zip("abcdefghij", (0.25, 0.5) * 5, strict=True)
        )
    )
    return make_table(replace(pictures, stale=3))


def test_the_text_has_means_intervals_and_signed_differences(table):
    lines = as_text(table).splitlines()
    assert lines[0] == "Full prompt similarity (clip)"
    assert lines[1].split() == ["Animal-Animal"]
    assert re.fullmatch(rf"{PLAIN} +0\.375 \[0\.[23]\d\d, 0\.4\d\d\]", lines[2])
    assert re.fullmatch(rf"{GUIDED} minus {PLAIN}  \+0\.125", lines[4])  # the same for all prompts
    assert "+100.0 %\n" in as_text(table)
    assert "3 scores are left out" in as_text(table)


def test_a_measure_that_is_the_same_everywhere_is_only_a_note():
    table = make_table(of(picture(PLAIN, all_found=1.0), picture(GUIDED, all_found=1.0)))
    text = as_text(table)
    assert "All subjects found (detector): 100.0 % in every image." in text
    assert text.count("All subjects found") == 1
    assert "all_found" in as_csv(table)


def test_the_only_column_has_a_title_if_it_is_a_set_of_prompts(table):
    assert "\n  " not in as_text(
        make_table(of(picture(clip_full=0.1), picture(seed=1, clip_full=0.2)))
    )
    assert as_text(table).splitlines()[1].strip() == "Animal-Animal"


def test_the_csv_has_a_line_for_each_cell_in_full_precision(table):
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert len(rows) == 6
    first = rows[0]
    assert (first["metric"], first["measure"], first["method"]) == ("clip", "clip_full", PLAIN)
    assert (first["set"], float(first["mean"]), first["minus"]) == ("Animal-Animal", 0.375, "")
    assert (rows[2]["minus"], float(rows[2]["mean"])) == (PLAIN, 0.125)
    assert {row["prompts"] for row in rows} == {"10"}


@pytest.mark.parametrize("group", ["=1+1", "+cats", "-cats", "@cats", "\tcats"])
def test_a_spreadsheet_takes_no_name_for_a_formula(table, group):
    lines = [replace(line, cells={group: line.cells["Animal-Animal"]}) for line in table.lines]
    rows = list(csv.DictReader(io.StringIO(as_csv(replace(table, groups=(group,), lines=lines)))))
    assert {row["set"] for row in rows} == {f"'{group}"}
    assert {float(row["mean"]) for row in rows} >= {0.375, 0.125}


@pytest.mark.parametrize(("label", "said"), [("[a]", "{[}a]"), ("*a", "{*}a"), ("=a", "=a")])
def test_a_label_is_no_argument_of_the_line_s_end_before_it_in_latex(table, label, said):
    lines = [replace(line, label=label, minus=None) for line in table.lines]
    text = as_latex(replace(table, lines=lines))
    assert f"\n{said} & " in text
    assert f"\n{label} & " not in text or said == label


def test_latex_has_a_column_for_each_set_and_no_bare_percent(table):
    text = as_latex(table)
    assert text.startswith("\\begin{tabular}{lc}\n\\toprule\n & Animal-Animal \\\\\n")
    assert text.endswith("\\bottomrule\n\\end{tabular}\n")
    assert "100.0 \\% \\\\" in text
    assert "%" not in text.replace("\\%", "")


@pytest.mark.parametrize(
    ("other", "said"),
    [({"neglected": 0.0}, "in every image."), ({"clip_full": 0.2}, "in every image with one.")],
)
def test_a_value_that_all_images_share_is_a_note_though_the_first_method_has_none(other, said):
    first = [picture(seed=seed, clip_full=0.1 * seed) for seed in range(2)]
    rest = [picture(GUIDED, seed=seed, neglected=0.0) for seed in range(2)]
    text = as_text(make_table(of(*first, *rest, picture(seed=2, **other))))
    assert said in text
