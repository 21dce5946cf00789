"""What the page is told of a dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from aae_batch import cli
from aae_batch.dataset import layout
from aae_batch.dataset.reader import Dataset
from aae_batch.errors import OutputError
from aae_batch.report.build import collect, render
from aae_batch.report.rows import UNIT
from aae_batch.report.write import write_report
from tests.report.page_data import HOSTILE, ROWS, drawn, write_dataset, write_scores


@pytest.fixture
def storage(tmp_path):
    return write_dataset(tmp_path / "out", ROWS, drawn)


def cards(rows) -> list[list[str]]:
    found: dict[int, list[str]] = {}
    for row_id, card in zip(rows.columns["id"], rows.columns["card"], strict=True):
        found.setdefault(card, []).append(row_id)
    return list(found.values())


def test_methods_of_one_prompt_and_seed_are_one_card(storage):
    assert cards(collect(Dataset(storage)).rows) == [
        *([f"{i}-attend-and-excite", f"{i}-stable-diffusion"] for i in range(4)),
        ["bad"],
    ]


def test_a_second_row_of_the_same_method_is_another_card(tmp_path):
    twice = {"prompt": "a cat", "subjects": ["cat"], "seed": 1}
    storage = write_dataset(tmp_path / "out", [{"id": "a", **twice}, {"id": "b", **twice}], drawn)
    assert cards(collect(Dataset(storage)).rows) == [["a"], ["b"]]


def test_curves_and_maps_follow_each_other_as_the_attention_rows_do(storage):
    rows = collect(Dataset(storage)).rows
    assert rows.columns["first"][:3] == [0, 2, 4]
    assert rows.columns["attended"][-1] == 0
    assert rows.attention["subject"][:2] == ["cat", "frog"]
    curves = np.frombuffer(rows.curves, "<u2").reshape(-1, 4) / UNIT
    np.testing.assert_allclose(curves[1], np.linspace(0.1, 0.7, 4), atol=1e-4)
    maps = np.frombuffer(rows.maps, np.uint8).reshape(-1, 4, 4)
    assert (maps[0] == [255, 0, 0, 0]).all()
    assert (maps[1] == [0, 0, 0, 255]).all()


def test_figures_are_of_all_rows_and_cards_of_the_first(storage):
    report = collect(Dataset(storage), limit=5)
    assert report.rows.columns["id"] == [row["id"] for row in ROWS[:5]]
    figures = report.figures
    assert (figures.rows, figures.failed, figures.neglected) == (9, 1, 4)
    assert figures.methods() == ["stable-diffusion", "attend-and-excite"]
    assert figures.images == {"stable-diffusion": 4, "attend-and-excite": 4}
    assert figures.mean("attend-and-excite", "num_refinements") == 13
    assert figures.mean("stable-diffusion", "neglected") == 1
    (kind,) = figures.failures
    assert (kind, figures.failures[kind].row) == ("RequestError", "bad")


def test_scores_are_joined_by_the_picture_they_are_of(storage):
    shas = Dataset(storage).table(0, ["id", "sha256"]).to_pydict()
    write_scores(
        storage,
        "detector",
        0,
        {
            "id": shas["id"][:2],
            "sha256": [shas["sha256"][0], "of a picture that was made anew"],
            "subjects_found": [1, 2],
            "all_found": [False, True],
            "caption": ["a cat", "a cat and a frog"],
            "found": [[True, False], [True, True]],
        },
    )
    report = collect(Dataset(storage))
    values = {score.column: values for score, values in report.rows.scores.items()}
    assert values == {
        "subjects_found": [1] + [None] * 8,
        "all_found": [False] + [None] * 8,
        "caption": ["a cat"] + [None] * 8,
    }
    score, all_found, _ = report.rows.scores
    assert report.rows.attention["found"][:4] == [True, False, None, None]
    assert report.figures.mean("attend-and-excite", score) == 1
    assert report.figures.mean("attend-and-excite", all_found) == 0
    assert report.figures.mean("stable-diffusion", score) is None
    assert report.figures.stale == 1


def test_verdicts_are_joined_to_the_subjects_by_their_order(tmp_path):
    rows = [
        {"id": "twice", "prompt": "a cat and a cat", "subjects": ["cat", "cat"]},
        {"id": "indices", "prompt": "a cat and a dog", "token_indices": [2, 5]},
    ]
    storage = write_dataset(tmp_path / "out", rows, drawn)
    pictures = Dataset(storage).table(0, ["id", "sha256"]).to_pydict()
    write_scores(storage, "detector", 0, pictures | {"found": [[True, False], [False, True]]})
    attention = collect(Dataset(storage)).rows.attention
    assert attention["subject"] == ["cat", "cat", "word 0", "word 1"]
    assert attention["found"] == [True, False, False, True]


def test_the_table_leaves_out_what_says_nothing(storage):
    pictures = Dataset(storage).table(0, ["id", "sha256"]).to_pydict()
    attention = {
        "min_max_attention": [0.5] * 4,
        "neglected": [True] * 4,
        "thresholds_met": [0] * 4,
        "num_refinements": [3] * 4,
    }
    write_scores(storage, "attention", 0, pictures | attention)
    detector = {"all_found": [False] * 4, "subjects_found": [0, 0, 1, 0], "caption": ["a cat"] * 4}
    write_scores(storage, "detector", 0, pictures | detector)
    figures = collect(Dataset(storage)).figures
    assert [getattr(of, "name", of) for of in figures.telling()] == [
        *("final_loss", "neglected", "num_refinements", "seconds"),
        "attention/min_max_attention",
        "detector/all_found",
        "detector/subjects_found",
    ]


def test_a_loss_that_methods_define_differently_and_attention_of_conjuncts_do_not_compare(tmp_path):
    row = {"prompt": "a cat and a frog", "subjects": ["cat", "frog"], "seed": 1}

    def figures(*methods):
        rows = [{"id": method, **row, "method": method} for method in methods]
        root = tmp_path / "-".join(methods)
        return collect(Dataset(write_dataset(root, rows, drawn))).figures

    pair = figures("stable-diffusion", "attend-and-excite")
    assert "final_loss" in pair.telling()
    assert "final_loss" not in figures("stable-diffusion", "syngen").telling()
    apart = figures("stable-diffusion", "composable-diffusion")
    assert "final_loss" not in apart.telling()
    assert (apart.neglected, apart.judged) == (1, 1)
    assert apart.mean("composable-diffusion", "neglected") is None
    assert apart.mean("composable-diffusion", "seconds") == 2
    alone = figures("composable-diffusion")
    assert alone.mean("composable-diffusion", "neglected") == 1
    assert "final_loss" in alone.telling()


def test_a_failed_row_has_none_of_the_attention_of_the_row_with_its_id(tmp_path):
    row = {"id": "a", "prompt": "a cat", "subjects": ["cat"]}
    rows = collect(Dataset(write_dataset(tmp_path / "out", [row, row], drawn))).rows
    assert rows.columns["error_type"] == [None, "RequestError"]
    assert rows.columns["attended"] == [1, 0]


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_layouts_without_files_put_small_pictures_into_the_page(tmp_path, form):
    storage = write_dataset(tmp_path / "out", ROWS, drawn, form)
    report = collect(Dataset(storage))
    assert report.rows.columns["picture"] == [*range(8), None]
    assert len(report.pictures) == 8


def test_a_picture_that_is_lost_costs_its_place_alone(storage):
    storage.delete(Dataset(storage).table(0)["file_name"][1].as_py())
    report = collect(Dataset(storage), embed=True)
    assert report.rows.columns["picture"][:3] == [0, None, 1]
    assert report.unreadable == 1


def test_a_page_elsewhere_finds_the_pictures(storage, tmp_path):
    place = write_report(storage, tmp_path / "pages" / "a page.html")
    assert place == (tmp_path / "pages" / "a page.html").as_uri()
    rows = collect(Dataset(storage), prefix="../out/").rows
    picture = tmp_path / "pages" / rows.columns["picture"][0]
    assert picture.resolve().is_file()


def test_a_job_that_runs_has_a_page_of_what_is_committed(storage):
    storage.delete(layout.metadata_name(2))
    storage.delete(layout.metadata_name(0))
    report = collect(Dataset(storage))
    assert report.rows.columns["id"] == [row["id"] for row in ROWS[4:8]]
    assert b"4 rows of 9: the job is not complete" in b" ".join(render(report, "out").split())


def test_a_prompt_is_nowhere_html(storage):
    page = render(collect(Dataset(storage), embed=True), HOSTILE).decode()
    assert "<img" not in page
    assert "</script><script>document" not in page


def test_an_output_in_a_bucket_has_its_page_there_and_one_here_holds_its_pictures(
    storage, bucket, tmp_path
):
    for path in Path(storage.root).rglob("*"):
        if path.is_file():
            key = "out/" + path.relative_to(storage.root).as_posix()
            bucket.client.upload_file(str(path), bucket.name, key)
    result = CliRunner().invoke(cli.app, ["report", f"{bucket.url}/out"])
    assert (result.exit_code, result.output) == (0, f"{bucket.url}/out/report.html\n")
    page = bucket.client.get_object(Bucket=bucket.name, Key="out/report.html")
    assert page["ContentType"] == "text/html"
    result = CliRunner().invoke(cli.app, ["report", f"{bucket.url}/out", "--open"])
    assert result.exit_code == 2
    assert "add --html report.html" in result.stderr
    here = tmp_path / "page.html"
    result = CliRunner().invoke(cli.app, ["report", f"{bucket.url}/out", "--html", str(here)])
    assert result.exit_code == 0
    assert 'data-pictures>["UklGR' in here.read_text()


def test_a_page_elsewhere_in_a_bucket_is_refused(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(cli.app, ["report", storage.root, "--html", "s3://bucket/p.html"])
    assert result.exit_code == 2
    assert "--html takes a file of this machine, not a URL" in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_the_page_of_nothing_is_one_sentence(tmp_path):
    with pytest.raises(OutputError, match="There is no run in"):
        collect(Dataset(tmp_path / "typo"))
    result = CliRunner().invoke(cli.app, ["report", str(tmp_path / "typo")])
    assert result.exit_code == 2
    assert not (tmp_path / "typo").exists()
