from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from aae_batch import cli, open_dataset


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(cli.app, ["make", *map(str, arguments)])


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,subjects\na red circle and a blue square,red circle;blue square\n")
    return path


FEW = ["--num-inference-steps", 2, "--actors", 1, "--max-iter-to-alter", 1]


def test_options_go_to_the_commands_that_have_them(run, prompts):
    given = ["--seeds", 2, "--methods", "both", "--model", "some/model", "--lora", "a/b", "--lora"]
    given += ["c/d", "--retry-failed", "--s3-endpoint", "http://host", "--dtype", "float16"]
    result = run("prompts.csv", "out", *given, "--dry-run")
    assert result.exit_code == 0, result.output
    build, validate, generate, evaluate, report = result.output.splitlines()
    store = "--s3-endpoint http://host"
    assert build == (
        "$ aae-batch manifest build prompts.csv out/manifest.parquet --seeds 2 --methods both "
        + store
    )
    assert (
        validate == f"$ aae-batch manifest validate out/manifest.parquet --model some/model {store}"
    )
    assert set(generate.split()[4:]) == set(
        f"out --model some/model --lora a/b --lora c/d --retry-failed {store} --dtype float16".split()
    )
    assert set(evaluate.split()[3:]) == set(
        f"out --metric attention --retry-failed {store}".split()
    )
    assert report == f"$ aae-batch report out {store}"
    assert not (prompts.parent / "out").exists()


def test_one_command_makes_a_dataset_with_figures_and_a_page_and_goes_on_with_it(
    run, prompts, ray_here
):
    result = run(prompts, "out", *FEW)
    assert result.exit_code == 0, result.output
    assert "1 image, 0 failed rows" in result.output
    assert "Worst subject's attention" in result.output
    page = (prompts.parent / "out" / "report.html").resolve()
    assert result.output.splitlines()[-1] == page.as_uri()
    assert len(open_dataset("out")) == 1
    assert pq.read_table("out/manifest.parquet")["subjects"].to_pylist() == [
        ["red circle", "blue square"]
    ]

    again = run(prompts, "out", *FEW)
    assert again.exit_code == 0, again.output
    assert "built before from the same prompts" in again.output

    prompts.write_text("prompt,subjects\na red circle,red circle\n")
    refused = run(prompts, "out", *FEW)
    assert refused.exit_code == 2
    assert "is not what" in refused.output
    assert "prompts.csv, --seeds and --methods make now" in refused.output


def test_a_folder_with_other_things_is_left_alone(run, prompts, tmp_path):
    other = tmp_path / "out" / "holiday.jpg"
    other.parent.mkdir()
    other.write_bytes(b"sea")
    result = run(prompts, "out")
    assert result.exit_code == 2
    assert "it has holiday.jpg" in result.output
    assert [path.name for path in other.parent.iterdir()] == ["holiday.jpg"]


def test_rows_that_would_fail_need_a_yes(run, prompts, tmp_path):
    cut_off = f"a red circle {'and ' * 80}a blue square"
    prompts.write_text(f"prompt,subjects\na red circle,red circle\n{cut_off},blue square\n")
    result = run(prompts, "out")
    assert result.exit_code == 1
    assert "2 rows: 1 good, 1 would fail" in result.output
    assert "add --yes to make the others" in result.output
    assert list((tmp_path / "out").iterdir()) == []

    prompts.write_text("prompt,subjects\na red circle,circle;red dog\n")
    assert "red dog" in run("prompts.csv", "out").output  # the prompts as they are now


def test_the_same_command_goes_on_with_values_that_are_no_numbers(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = {"prompt": "a red circle", "subjects": ["red circle"], "rating": math.nan}
    (tmp_path / "p.jsonl").write_text(json.dumps(prompt))
    built = CliRunner().invoke(cli.app, ["manifest", "build", "p.jsonl", "out/manifest.parquet"])
    assert built.exit_code == 0
    result = run("p.jsonl", "out", "--max-sequence-length", 0)  # refused by the step after
    assert "built before from the same prompts" in result.output
    assert result.exit_code == 2


@pytest.mark.parametrize("output", ["", "/"])
def test_an_output_is_a_folder_of_its_own(run, prompts, output):
    result = run(prompts, output)
    assert result.exit_code == 2
    assert "OUTPUT is not a folder" in result.output
