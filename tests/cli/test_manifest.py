"""`aae-batch manifest` from the outside."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from aae_batch import cli


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli.app, ["manifest", *map(str, arguments)])


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.txt").write_text("a cat and a teddy bear\na frog\nrunning fast\n")
    return "p.txt"


def test_subjects_that_were_found_are_shown_and_need_a_yes(run, prompts, tmp_path):
    result = run("build", prompts, "m.parquet")
    assert result.exit_code == 2
    assert "a cat and a teddy bear  cat; teddy bear" in result.output
    assert "of 3 prompts, 2 with fewer than two subjects, 1 with none" in result.output
    assert "no subject in 1 prompt" in result.stderr
    assert "add --yes" in result.stderr
    assert not (tmp_path / "m.parquet").exists()
    result = run("build", prompts, "m.parquet", "--yes", "--seeds", "2", "--methods", "both")
    assert result.exit_code == 0, result.output
    assert "12 rows in m.parquet" in result.output
    table = pq.read_table("m.parquet")
    assert table["subjects"].to_pylist()[::4] == [["cat", "teddy bear"], ["frog"], None]


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 1)])
def test_on_a_terminal_the_answer_decides(prompts, tmp_path, answer, code):
    ours, theirs = pty.openpty()
    program = "from aae_batch.cli import main; main()"
    command = [sys.executable, "-c", program, "manifest", "build", "p.txt", "m.csv"]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    os.write(ours, answer.encode())
    ended = subprocess.run(
        command, stdin=theirs, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    os.close(ours)
    os.close(theirs)
    assert ended.returncode == code, ended.stderr
    assert "Write 3 rows with these subjects?" in ended.stdout
    assert (tmp_path / "m.csv").exists() == (code == 0)


def test_rows_that_no_method_guides_need_no_subjects_unless_asked_for(run, prompts, tmp_path):
    plain = ["--methods", "stable-diffusion"]
    result = run("build", prompts, "m.parquet", *plain)
    assert result.exit_code == 0, result.output
    assert "subject, and" not in result.stderr
    assert "subjects" not in pq.read_table("m.parquet").column_names
    (tmp_path / "p.csv").write_text("prompt,method\na cat,\na dog,stable-diffusion\n")
    assert run("build", "p.csv", "n.parquet", "--yes").exit_code == 0
    assert pq.read_table("n.parquet")["subjects"].to_pylist() == [["cat"], None]
    assert run("build", prompts, "o.parquet", *plain, "--find-subjects", "--yes").exit_code == 0
    assert pq.read_table("o.parquet")["subjects"].to_pylist()[1] == ["frog"]


def test_prompts_that_cannot_be_guided_are_told_of_however_that_came_about(run, prompts, tmp_path):
    result = run("build", prompts, "m.parquet", "--no-find-subjects")
    assert result.exit_code == 0
    assert "no subject in 3 prompts" in result.stderr
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "subjects": []}\n')
    result = run("build", "p.jsonl", "n.parquet")
    assert result.exit_code == 0
    assert "no subject in 1 prompt, which no method can guide" in result.stderr


def test_without_finding_or_with_subjects_nobody_is_asked(run, prompts, tmp_path):
    assert run("build", prompts, "m.jsonl", "--no-find-subjects").exit_code == 0
    (tmp_path / "p.yaml").write_text("animal: [cat, dog]\nobject: [car]\n")
    template = ["--template", "a {animal} and a {object}", "--subjects", "{animal};{object}"]
    result = run("build", "p.yaml", "t.jsonl", *template, "--seeds", "7:8")
    assert result.exit_code == 0, result.output
    first = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])
    assert first == {
        "id": "0-a-cat-and-a-car",
        "prompt": "a cat and a car",
        "subjects": ["cat", "car"],
        "seed": 7,
        "animal": "cat",
        "object": "car",
    }


def test_a_model_adds_the_positions_of_the_tokens(run, tmp_path):
    result = run("benchmark", "m.parquet", "--set", "shapes", "--seeds", "1", "--model", "shapes")
    assert result.exit_code == 0, result.output
    first = pq.read_table("m.parquet").to_pylist()[0]
    assert (first["prompt"], first["token_indices"]) == ("a circle and a square", [[2], [5]])
    (tmp_path / "p.csv").write_text("prompt,subjects\na circle,dog\n")
    result = run("build", "p.csv", "n.parquet", "--model", "shapes")
    assert result.exit_code == 2
    assert "Prompt 'a circle': subject 'dog' is not in the prompt" in result.stderr


@pytest.mark.parametrize(
    ("subjects", "said"),
    [
        ("red cirlce", "subject 'red cirlce' is not in the prompt; did you mean 'red circle'?\n"),
        ("frog", "subject 'frog' is not in the prompt; use the prompt's own words.\n"),
        (
            "circle;circle",
            "subject 'circle' is in the prompt only once; name it as often as it occurs.\n",
        ),
    ],
)
def test_a_subject_that_is_not_in_its_prompt_is_refused_without_a_model(
    run, tmp_path, subjects, said
):
    (tmp_path / "p.csv").write_text(f"prompt,subjects\na red circle,{subjects}\n")
    result = run("build", "p.csv", "n.parquet")
    assert (result.exit_code, result.stderr) == (
        2,
        f"aae-batch: Prompt 'a red circle': {said}",
    )


def test_the_benchmark_is_the_paper_s_for_both_methods(run, tmp_path):
    result = run("benchmark", "m.parquet")
    assert result.exit_code == 0, result.output
    assert (
        "35,328 rows in m.parquet: 64 seeds, 0 to 63, of each prompt" in result.output
    )  # 276 prompts, 64 seeds, 2 methods
    table = pq.read_table("m.parquet")
    assert len(set(table["id"].to_pylist())) == 35328
    pair = table.slice(0, 2).to_pylist()
    assert [row["method"] for row in pair] == ["attend-and-excite", "stable-diffusion"]
    assert pair[0]["seed"] == pair[1]["seed"]
    assert run("benchmark", "m.parquet").exit_code == 2
    (tmp_path / "own.txt").write_text("a cat and a dog\n")
    result = run("benchmark", "m.parquet", "--prompts", "own.txt", "--seeds", "1", "--force")
    assert result.exit_code == 0
    assert "has 1 of the 66 prompts of animals" in result.stderr
    assert "2 rows in m.parquet" in result.output


def test_a_valid_manifest_is_clean(run):
    run("benchmark", "m.parquet", "--set", "shapes", "--seeds", "1")
    result = run("validate", "m.parquet", "--price")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("20 rows: 20 good, 0 would fail\n")
    assert "judged as the model shapes would; --model names another\n" in result.output
    assert "\nwith the model shapes: 20 images" in result.output
    assert "GPU time" not in result.output
    more = ("--tflops", "0.5", "--attention-maps", "every:1")
    priced = run("validate", "m.parquet", "--price", *more).output
    assert "GPU time at a sustained 0.5 TFLOP/s: " in priced
    assert re.search("tables .*", priced)[0] != re.search("tables .*", result.output)[0]
    assert "names another" not in run("validate", "m.parquet", "--model", "shapes").output


@pytest.fixture
def wrong(tmp_path):
    rows = [
        {"prompt": "a circle", "subjects": ["circle"], "seed": 1},
        {"prompt": "a circle", "subjects": ["dog"], "id": "bad"},
        {"prompt": "a circle", "subjects": ["circle"], "seed": 1},
        {"prompt": "", "id": "empty"},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "m.jsonl"


def test_problems_are_shown_with_their_rows_and_counted(run, wrong):
    result = run("validate", wrong, "--limit", "1")
    assert result.exit_code == 1
    assert result.output.splitlines()[1].split()[:3] == ["2", "bad", "subjects"]
    assert "and 2 more (--limit shows more" in result.output
    assert "4 rows: 2 good, 2 would fail" in result.output
    assert "1 x RepeatedRow" in result.output


def test_all_problems_can_be_had_as_json_or_csv(run, wrong, tmp_path):
    result = run("validate", wrong, "--json", "--output", "problems.csv")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert (said["model"], said["rows"], said["failing"]) == ("shapes", 4, 2)
    assert said["totals"] == {"SubjectError": 1, "PromptError": 1, "RepeatedRow": 1}
    with (tmp_path / "problems.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert [int(record["row"]) for record in records] == [2, 4, 3]
    assert [problem["problem"] for problem in said["problems"]] == [r["problem"] for r in records]


@pytest.mark.parametrize("name", ["none.csv", "m.txt", "broken.parquet"])
def test_what_cannot_be_read_is_one_sentence_and_exit_code_2(run, tmp_path, name):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "m.txt").write_text("a")
    result = run("validate", name)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_a_row_can_not_write_to_the_terminal(run, tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"prompt": "a", "id": "\u001b[2Jx"}) + "\n")
    assert "\u001b" not in run("validate", "m.jsonl").output


@pytest.mark.parametrize(
    ("command", "default"), [("build", "(the run's method)"), ("benchmark", "both")]
)
def test_help_says_which_methods_rows_are_made_for(run, command, default):
    output = " ".join(run(command, "--help").output.split())
    assert f"from the same noise; or all. [default: {default}]" in output
