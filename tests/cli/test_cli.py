from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
from importlib import import_module

import pytest
import typer
from typer.testing import CliRunner

import aae_batch
from aae_batch import cli
from aae_batch.cli.generate import _job
from aae_batch.generate.settings import JobSettings
from aae_batch.sampling.config import GuidanceConfig


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "manifest.jsonl"
    rows = [
        {"prompt": "a red circle and a blue square", "subjects": ["circle", "square"]},
        {"prompt": "a red circle", "subjects": ["dog"]},
        {"prompt": "a red circle", "subjects": ["circle"], "seed": "abc"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tokenizer_folder(tmp_path):
    """A model of which there is only the tokenizer."""
    from training.networks import tokenizer

    folder = tmp_path / "model"
    tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


def test_nothing_heavy_is_imported_before_a_command_runs():
    heavy = ("torch", "ray", "diffusers", "transformers", "pyarrow", "pydantic")
    program = f"import sys, aae_batch.cli; print([m for m in {heavy} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert output.stdout == "[]\n"


def test_version(run):
    assert run("--version").output == f"aae-batch {aae_batch.__version__}\n"


def test_every_setting_of_guidance_is_an_option_and_explained(run):
    parameters = inspect.signature(cli.generate).parameters
    assert set(GuidanceConfig.model_fields) - {"by_method"} <= set(parameters)
    text = run("generate", "--help").output
    for name in parameters:
        if name not in ("manifest", "output"):
            assert f"--{name.replace('_', '-')}" in text


def test_defaults_and_descriptions_of_options_are_those_of_the_settings(run):
    parameters = inspect.signature(cli.generate).parameters
    text = " ".join(run("generate", "--help").output.split())
    for name in ("slots", "grace", "row_timeout", "max_deaths", "device", "dtype", "model"):
        field = JobSettings.model_fields[name]
        assert parameters[name].default == field.default
        assert f"{field.description} [default: {field.default}]" in text
    for name in set(GuidanceConfig.model_fields) - {"by_method"}:
        assert parameters[name].default is None  # a model may bring its own


def test_a_dry_run_tells_what_would_be_done_and_writes_nothing(
    run, manifest, tokenizer_folder, tmp_path
):
    out = tmp_path / "out"
    result = run(
        "generate", manifest, out, "--model", tokenizer_folder, "--dry-run", "--shard-size", 2
    )
    assert result.exit_code == 1
    assert "3 rows in 2 shards of 2" in result.output
    assert "0 shards done, 2 left (3 rows)" in result.output
    assert "1 'a', 2 'red', 3 'circle', 4 'and'" in result.output
    assert "row 00000001: subject 'dog' is not in the prompt" in result.output
    assert "row 00000002: column seed: 'abc' is not a whole number" in result.output
    assert "1 row would fail with SubjectError" in result.output
    assert not out.exists()


def test_a_dry_run_tells_the_phrases_that_a_method_takes_a_prompt_apart_into(
    run, manifest, tokenizer_folder, tmp_path
):
    options = ["generate", manifest, tmp_path / "out", "--model", tokenizer_folder, "--dry-run"]
    composed = run(*options, "--method", "composable-diffusion")
    assert "  conjuncts: 'a red circle', 'a blue square'" in composed.output
    structured = run(*options, "--method", "structure-diffusion")
    assert "  noun phrases: 'a red circle', 'a blue square'" in structured.output


def test_a_dry_run_warns_once_of_a_negative_prompt_that_is_ignored(
    run, manifest, tokenizer_folder, tmp_path
):
    options = ["generate", manifest, tmp_path / "out", "--model", tokenizer_folder, "--dry-run"]
    options += ["--negative-prompt", "blue"]
    ignored = "warning: the negative_prompt of 1 row is ignored"
    assert ignored in run(*options, "--guidance-scale", "1").output
    assert "ignored" not in run(*options).output


def test_the_token_table_tells_what_can_be_guided(run, tokenizer_folder):
    result = run("tokens", "a red circle", "--model", tokenizer_folder)
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert lines[4] == ["3", "circle", "yes"]
    assert lines[5][0] == "4"
    assert "no: end token" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--thresholds", "0=1"], "--thresholds '0=1' is not a list of step:threshold"),
        (["--thresholds", "0:7"], "is not a step from 0 and a share"),
        (["--attn-res", "16"], "write e.g. '16x16'"),
        (["--scale-range", "1"], "write e.g. '1:0.5'"),
        (["--method", "magic"], "Invalid setting: method"),
        (["--slots", "0"], "Invalid setting: slots"),
        (["--slots", "2.7"], "give a number from 1, or auto"),
        (["--max-failures", "2.7"], "give a number of rows, or a share such as 5%"),
        (["--max-failures", "nan%"], "give a number of rows, or a share such as 5%"),
        (["--actors", "0"], "Invalid setting: actors"),
        (["--layout", "zip"], "Invalid setting: layout"),
        (["--image-quality", "90"], "The image format png has no quality"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_exit_code_2(
    run, manifest, tokenizer_folder, tmp_path, arguments, said
):
    result = run("generate", manifest, tmp_path / "out", "--model", tokenizer_folder, *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_manifest_or_model_is_one_sentence_and_exit_code_2(run, manifest, tmp_path):
    result = run("generate", tmp_path / "none.csv", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("aae-batch: Manifest ")
    result = run("tokens", "a cat", "--model", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


UNKNOWN = "has words that this model does not know: 'cat', 'frog'; it knows only a, and, red,"


def test_words_that_the_embedded_model_does_not_know_are_refused_in_one_sentence(run, tmp_path):
    manifest, out = tmp_path / "animals.csv", tmp_path / "out"
    manifest.write_text('prompt,subjects\n"a cat and a frog",cat;frog\na cat and a frog,frog\n')
    result = run("manifest", "validate", manifest)
    assert result.exit_code == 1
    assert UNKNOWN in " ".join(result.output.split())
    assert "2 rows: 0 good, 2 would fail" in result.output
    result = run("generate", manifest, out, "--dry-run")
    assert result.exit_code == 1
    assert result.output.splitlines()[0].startswith("model: shapes, a small one")
    assert f"would fail: row 00000000: the prompt {UNKNOWN}" in result.output

    result = run("generate", manifest, out)  # not one picture would come of it
    assert result.exit_code == 2
    assert result.output.startswith("model: shapes, a small one in this package")
    (sentence,) = result.stderr.splitlines()
    assert "No row of" in sentence
    assert UNKNOWN in sentence
    assert "--model" in sentence
    assert not out.exists()


def test_a_negative_prompt_of_unknown_words_is_refused_before_anything_is_made(run, tmp_path):
    manifest, out = tmp_path / "shapes.csv", tmp_path / "out"
    manifest.write_text("prompt,subjects\na red circle,circle\n")
    for more in ([], ["--dry-run"]):
        result = run("generate", manifest, out, "--negative-prompt", "blurry", *more)
        assert result.exit_code == 2
        assert "negative_prompt has words that this model does not know: 'blurry'" in result.stderr
    assert not out.exists()


def test_given_settings_replace_the_model_s_own(tokenizer_folder):
    (tokenizer_folder / "guidance.json").write_text(
        '{"scale_factor": 2.0, "num_inference_steps": 30}'
    )
    given = {
        **dict.fromkeys(GuidanceConfig.model_fields),
        "manifest": "manifest.csv",
        "output": "out",
        "model": str(tokenizer_folder),
        "revision": None,
        "s3_endpoint": None,
        "plugin": None,
        "num_inference_steps": 10,
        "thresholds": "0:0.1,5:0.4",
        "attn_res": "8x16",
    }
    config = _job(given).guidance
    assert (config.steering().scale_factor, config.num_inference_steps) == (2.0, 10)
    assert config.steering("conform").scale_factor == 20.0, "the model speaks of its one method"
    assert config.thresholds == {0: 0.1, 5: 0.4}
    assert config.attn_res == (8, 16)


def test_verify_proves_an_output_or_says_what_is_wrong_and_repairs_it(run, make_output):
    output = make_output()
    root = output.storage.root
    result = run("verify", root, "--manifest", output.manifest)
    assert result.exit_code == 0
    proved, failures = result.output.splitlines()
    assert proved == "3 of 3 shards, 5 rows: 4 images, 1 failed; proved"
    assert failures.startswith("Add --retry-failed to the same `aae-batch generate`")
    output.storage.delete("images/00001/c.png")
    broken = run("verify", root)
    assert broken.exit_code == 1
    assert f"`aae-batch verify {root} --repair`" in broken.output.splitlines()[-1]
    listed = [
        "  shard 1, row c: its image is missing.",
        "to delete: summary.json",
        "to delete: attention/00001.parquet",
        "to delete: metadata/00001.parquet",
    ]
    result = run("verify", root, "--repair")
    assert result.exit_code == 1
    unasked = "Nothing was deleted: look at the list, and add --yes."
    assert result.output.splitlines()[1:] == [*listed, unasked]
    assert output.storage.exists("summary.json")
    result = run("verify", root, "--repair", "--yes")
    assert result.exit_code == 1
    assert result.output.splitlines()[1:-1] == listed
    assert result.output.splitlines()[-1].startswith("Deleted 3. Run the same `aae-batch generate`")
    missing = run("verify", root).output.splitlines()
    assert "1 of 3 shards are not committed (1)" in missing[1]
    assert missing[2:] == ["Run the same `aae-batch generate` again to make what is missing."]


def test_verify_shows_the_first_problems_and_counts_the_rest(run, make_output, monkeypatch):
    monkeypatch.setattr(import_module("aae_batch.cli.verify"), "PROBLEMS_SHOWN", 1)
    storage = make_output().storage
    for name in storage.list("images/"):
        storage.delete(name)
    assert run("verify", storage.root).output.splitlines()[1:3] == [
        "  shard 0, row a: its image is missing.",
        "  and 3 more problems",
    ]


def test_a_repair_waits_for_no_one_and_makes_no_folder(run, make_output, tmp_path):
    result = run("verify", tmp_path / "typo", "--repair")
    assert result.exit_code == 1
    assert not (tmp_path / "typo").exists()


def test_status_tells_how_far_an_output_is(run, make_output, tmp_path):
    storage = make_output().storage
    result = run("status", storage.root)
    assert result.exit_code == 0
    assert result.output.splitlines()[0].startswith("5/5 rows done, 0 left; 3/3 shards committed")
    assert result.output.splitlines()[-1] == "complete"
    result = run("status", tmp_path / "typo")
    assert result.exit_code == 2
    assert "There is no run in" in result.stderr


def test_everything_may_lie_in_an_object_store(
    run, manifest, tokenizer_folder, bucket, s3_server, tmp_path, monkeypatch
):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AAE_BATCH_CACHE", str(tmp_path / "cache"))
    for path in (manifest, *tokenizer_folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(tmp_path).as_posix()
            bucket.client.upload_file(str(path), bucket.name, name)
    where = ["--model", f"{bucket.url}/model", "--s3-endpoint", s3_server]
    result = run(
        "generate", f"{bucket.url}/{manifest.name}", f"{bucket.url}/out", *where, "--dry-run"
    )
    assert result.exit_code == 1, result.output
    assert "3 rows in 1 shard of 256" in result.output
    assert "1 row would fail with SubjectError" in result.output
    result = run("tokens", "a red circle", *where)
    assert result.exit_code == 0
    assert "circle" in result.output


def test_a_bucket_that_does_not_exist_is_one_sentence_and_exit_code_2(
    run, manifest, tokenizer_folder, bucket
):
    result = run(
        "generate", manifest, f"s3://no-{bucket.name}/out", "--model", tokenizer_folder, "--dry-run"
    )
    assert result.exit_code == 2
    assert "there is no bucket no-" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize("kind", ["folder", "record", "link"])
def test_a_folder_of_someone_else_is_refused_and_stays_as_it_is(run, tmp_path, kind, more):
    photos, root = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"dear")
    root.mkdir()
    if kind == "link":
        (root / "images").symlink_to(photos)
    else:
        (root / "images").mkdir()
        (root / "images/a.png").write_bytes(b"dear")
    if kind == "record":
        (root / "run.json").write_text('{"experiment": 7, "settings": {"lr": 0.1}}')
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("prompt,subjects\na red circle and a blue square,circle;square\n")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    result = run("generate", manifest, root, *more)
    assert result.exit_code == 2
    said = {
        "folder": "no run made it",
        "record": "no run of aae-batch wrote it",
        "link": "is a link",
    }
    assert said[kind] in result.stderr
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


COMMANDS = [
    "make",
    "generate",
    "evaluate",
    "verify",
    "status",
    "report",
    "export",
    "tokens",
    "demo",
]
COMMANDS += ["manifest build", "manifest benchmark", "manifest validate"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_ends_with_examples_that_it_takes(run, command):
    help_text = run(*command.split(), "--help").output
    examples = help_text.partition("\nExamples:\n")[2].splitlines()
    assert examples
    for example in examples:
        program, *words = shlex.split(example)
        assert [program, *words[: len(command.split())]] == ["aae-batch", *command.split()]
        found = typer.main.get_command(cli.app)
        for _ in command.split():
            found, words = found.commands[words[0]], words[1:]
        found.make_context(command, words)  # raises a usage error


def test_many_options_are_listed_by_what_they_are_about(run):
    text = run("generate", "--help").output
    titles = [line for line in text.splitlines() if re.fullmatch(r"\w[\w ]*:", line)]
    expected = "Arguments Options Model Output Sampling Steering Actors Judges Tries Examples"
    assert [title.split()[0].rstrip(":") for title in titles] == expected.split()
    assert "Actors" not in run("verify", "--help").output
