"""What the page tells of rows that were tried several times."""

from __future__ import annotations

from collections import Counter

import pytest

from aae_batch.dataset import layout
from aae_batch.dataset.reader import Dataset
from aae_batch.report.build import collect, render
from aae_batch.report.tries import HARDEST, TryFigures
from aae_batch.report.write import write_report
from tests.report.page_data import (
    ACCEPTANCE,
    ROWS,
    TRIED_ROWS,
    drawn,
    tried,
    write_dataset,
)
from tests.report.test_page import CONTRAST, PHONE


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    root = tmp_path_factory.mktemp("tried") / "out"
    return write_dataset(root, TRIED_ROWS, tried, shard_size=3, **ACCEPTANCE)


@pytest.fixture(scope="module")
def tried_page(storage, tmp_path_factory):
    place = tmp_path_factory.mktemp("page") / "report.html"
    write_report(storage, place)
    return place


def test_rungs_count_their_tries_what_judges_say_of_them_and_what_they_cost(storage):
    figures = collect(Dataset(storage), limit=1).figures.tries
    assert figures.methods() == ["stable-diffusion", "attend-and-excite"]
    plain, guided = (figures.tally.rungs[method] for method in figures.methods())
    names = ("tries", "judged", "accepted", "settled", "given_up", "forwards")
    assert [plain[name] for name in names] == [6, 3, 2, 2, 2, 6 * 8]
    assert [guided[name] for name in names] == [8, 4, 1, 1, 3, 8 * 8 + 75]
    assert figures.outcomes() == [("accepted", 3), ("unaccepted", 1), ("unjudged", 1)]


def test_methods_are_in_the_order_of_the_ladder_then_those_that_rows_name():
    figures = TryFigures({"ladder": ["structured-diffusion:2", "stable-diffusion"]})
    for method in ("attend-and-excite", "stable-diffusion", "structured-diffusion"):
        figures.tally.rungs[method]["tries"] = 1
    assert figures.methods() == ["structured-diffusion", "stable-diffusion", "attend-and-excite"]


def test_a_subject_is_hard_by_the_share_of_judged_tries_that_miss_it(storage):
    hardest = collect(Dataset(storage)).figures.tries.hardest()
    assert hardest == [
        ("<b>owl", Counter(tries=2, missed=2)),
        ("frog", Counter(tries=4, missed=2, other_colour=1)),
        ("cat", Counter(tries=6, missed=1)),
    ]


def test_only_the_hardest_subjects_are_listed():
    figures = TryFigures({})
    for number in range(30):
        figures.subjects[f"subject {number}"] = Counter(tries=100, missed=number)
    hardest = [subject for subject, _ in figures.hardest()]
    assert hardest == [f"subject {29 - place}" for place in range(HARDEST)]


def test_a_run_without_tries_shows_nothing_of_them(tmp_path):
    rows = [{**row, "tries": 3, "accepted": False} for row in ROWS]  # columns of the user's own
    page = collect(Dataset(write_dataset(tmp_path / "out", rows, drawn)))
    assert page.figures.tries is None
    text = render(page, "out").decode().split("</style>")[1].split('<script type="module"')[0]
    assert "tries" not in text
    assert "accepted" not in text


# --- in a browser --------------------------------------------------------------------------------


def cells(table) -> list[list[str]]:
    return [line.locator("th, td").all_inner_texts() for line in table.locator("tbody tr").all()]


def test_the_rule_the_rungs_and_the_hard_subjects_stand_at_the_top(look, tried_page):
    page = look(tried_page)
    summary = page.get_by_role("region", name="Summary")
    assert (
        "Each row is tried up to 4 times, by stable-diffusion, then attend-and-excite up to 2 times, until "
        "detector.all_bound AND seed < 100. Rows: 3 accepted, 1 unaccepted, 1 unjudged."
    ) in summary.inner_text()
    assert "tries a row\n2.00" in summary.inner_text()
    table = page.get_by_role("region", name="Tries by method")
    assert cells(table) == [
        ["stable-diffusion", "6", "2", "66.7 %", "2", "2", "8.0"],
        ["attend-and-excite", "8", "1", "25.0 %", "1", "3", "17.4"],
    ]
    page.get_by_text("Hard subjects: <b>owl is missed in 100.0 % of 2 tries").click()
    assert cells(page.get_by_role("region", name="Hard subjects")) == [
        ["<b>owl", "100.0 %", "0.0 %", "2"],
        ["frog", "50.0 %", "25.0 %", "4"],
        ["cat", "16.7 %", "0.0 %", "6"],
    ]


def test_the_best_of_several_without_a_condition_has_no_rate_of_acceptance(look, tmp_path):
    best = {"best_of": 4, "by": "-final_loss", "ladder": ACCEPTANCE["ladder"], "model": "shapes"}
    write_report(write_dataset(tmp_path / "out", TRIED_ROWS, tried, **best))
    page = look(tmp_path / "out" / layout.REPORT)
    text = page.get_by_role("region", name="Summary").inner_text()
    assert (
        "Each row is tried 4 times, by stable-diffusion, then attend-and-excite up to 2 times; the best by "
        "-final_loss is kept."
    ) in text
    assert "accepted" not in text
    heads = page.get_by_role("region", name="Tries by method").get_by_role("columnheader")
    assert heads.all_inner_texts() == ["method", "tries", "rows settled", "forwards a try"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tries_stand_out_in_light_and_dark_and_fit_a_phone(look, tried_page, scheme):
    page = look(tried_page, color_scheme=scheme, **PHONE)
    page.get_by_text("Hard subjects").click()
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 375
