"""What the page tells of rows that were tried several times."""

from __future__ import annotations

import base64
import io
from collections import Counter

import pytest
from PIL import Image

from aae_batch.dataset import layout
from aae_batch.dataset.reader import Dataset
from aae_batch.ladder import STRIDE
from aae_batch.report import build
from aae_batch.report.build import collect, render
from aae_batch.report.tries import HARDEST, SIDE, TryFigures
from aae_batch.report.write import write_report
from tests.report.page_data import (
    ACCEPTANCE,
    REJECTED,
    ROWS,
    TRIED_ROWS,
    drawn,
    tried,
    write_dataset,
)
from tests.report.page_data import SIDE as IMAGE_SIDE
from tests.report.test_page import CONTRAST, PHONE, colour_of, is_near, labelled, prompts


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
    assert [plain[name] for name in names] == [6, 3, 2, 3, 2, 6 * 8]
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


def test_rows_have_their_own_tries_and_one_that_repeats_an_id_has_none(storage):
    rows = collect(Dataset(storage)).rows
    assert rows.columns["id"][1:3] == ["never", "never"]
    assert rows.columns["tried"] == [3, 4, 0, 1, 1, 1, 4]
    assert rows.columns["first_try"] == [0, 3, 7, 7, 8, 9, 10]
    assert rows.tries["seed"][:7] == [
        "4",
        "4",
        str(4 + STRIDE),
        "10",
        "10",
        str(10 + STRIDE),
        str(10 + 2 * STRIDE),
    ]
    assert rows.tries["kept"][:7] == [False, False, True, False, True, False, False]
    assert rows.columns["accepted"] == [True, False, None, True, None, True, False]


def test_rows_whose_kept_seeds_meet_by_chance_are_not_one_card(storage):
    rows = collect(Dataset(storage)).rows
    seeds = dict(zip(rows.columns["id"], rows.columns["seed"], strict=True))
    assert seeds["climbs"] == seeds["at-once"]
    assert rows.columns["card"] == list(range(7))


def test_kept_pictures_of_other_tries_are_embedded_small(storage):
    page = collect(Dataset(storage))
    assert page.rows.tries["picture"][:7] == [0, 1, None, None, None, None, 2]
    assert page.rows.columns["picture"][0] == "images/00000/climbs.png"
    image = Image.open(io.BytesIO(base64.b64decode(page.pictures[0])))
    assert image.size == (SIDE, SIDE // 2)
    assert is_near(list(image.getpixel((5, 5))), REJECTED)
    assert len(collect(Dataset(storage), limit=1).pictures) == 2
    page = collect(Dataset(storage), side=32, embed=True)
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for data in page.pictures]
    assert sorted(sizes) == [(IMAGE_SIDE, IMAGE_SIDE)] * 5 + [(32, 16)] * 3


def test_a_page_with_pictures_of_tries_shows_fewer_rows_by_default(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "LIMIT_EMBEDDED", 2)
    assert len(collect(Dataset(storage)).rows) == 2
    without = {**ACCEPTANCE, "keep_rejected": False}
    others = write_dataset(tmp_path / "out", TRIED_ROWS, tried, **without)
    assert len(collect(Dataset(others)).rows) == 7


def test_a_run_without_tries_shows_nothing_of_them(tmp_path):
    rows = [{**row, "tries": 3, "accepted": False} for row in ROWS]  # columns of the user's own
    page = collect(Dataset(write_dataset(tmp_path / "out", rows, drawn)))
    assert page.figures.tries is None
    assert set(page.rows.columns["accepted"]) == {None}
    assert page.rows.tries["try"] == []
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
        ["stable-diffusion", "6", "2", "66.7 %", "3", "2", "8.0"],
        ["attend-and-excite", "8", "1", "25.0 %", "1", "3", "17.4"],
    ]
    page.get_by_text("Hard subjects: <b>owl is missed in 100.0 % of 2 tries").click()
    assert cells(page.get_by_role("region", name="Hard subjects")) == [
        ["<b>owl", "100.0 %", "0.0 %", "2"],
        ["frog", "50.0 %", "25.0 %", "4"],
        ["cat", "16.7 %", "0.0 %", "6"],
    ]


def test_details_list_the_tries_of_a_row_with_their_pictures(look, tried_page):
    page = look(tried_page, reduced_motion="reduce")
    page.locator(".card h2 button").first.click()
    table = page.get_by_role("region", name="Tries of climbs")
    assert table.get_by_role("columnheader").all_inner_texts() == [
        *("try", "picture", "verdict", "method", "seed"),
        "detector.subjects_found",
        "forwards, guided + denoised",
    ]
    assert cells(table) == [
        ["0", "", "rejected", "stable-diffusion", "4", "0.500", "0 + 8"],
        ["1", "", "rejected", "attend-and-excite", "4", "1", "5 + 8"],
        ["2", "", "accepted kept", "attend-and-excite", str(4 + STRIDE), "1", "10 + 8"],
    ]
    assert table.locator(".kept th").all_inner_texts() == ["2"]
    image = table.get_by_role("img", name="try 1, rejected")
    assert is_near(colour_of(page, image, 0.5, 0.5), REJECTED)
    kept = table.get_by_role("img", name="try 2, accepted")
    assert kept.get_attribute("src").endswith("images/00000/climbs.png")
    page.keyboard.press("ArrowRight")
    table = page.get_by_role("region", name="Tries of never")
    assert cells(table)[0][2].split() == ["given", "up", "its", "noise", "is", "<i>hopeless</i>"]
    assert table.get_by_role("row").nth(1).get_by_role("img").count() == 0
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("dialog", name="the same id").is_visible()
    assert page.locator("dialog .tries").count() == 0


def test_rows_are_filtered_by_whether_they_are_accepted(look, tried_page):
    page = look(tried_page)
    labelled(page, "Show").select_option("accepted")
    assert len(prompts(page)) == 3
    labelled(page, "Show").select_option("not accepted")
    assert [card.get_attribute("alt") for card in page.locator(".card img").all()] == [
        f"{TRIED_ROWS[1]['prompt']} (attend-and-excite)"
    ]
    assert prompts(page)[1:] == ["a frog"]
    assert "not accepted" in page.locator(".card .method").first.inner_text()
    assert "4 tries" in page.locator(".card .figures").first.inner_text()


def test_without_tries_there_is_no_such_filter(look, small_page):
    page = look(small_page)
    options = labelled(page, "Show").locator("option").all_inner_texts()
    assert not any("accepted" in option for option in options)
    page.locator(".card h2 button").first.click()
    assert page.locator("dialog .tries").count() == 0
    assert "tries" not in page.locator("body").inner_text()


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
    page.locator(".card h2 button").nth(1).click()
    assert page.evaluate(CONTRAST) == []
    assert page.locator("dialog").evaluate("(node) => node.scrollWidth <= node.clientWidth")
