"""The entry point as a submitted job runs it: a script, started from anywhere."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aae_batch import cli

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "jobs" / "generate.py"


@pytest.fixture
def run(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments, script=SCRIPT):
        command = [sys.executable, str(script), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment
        )

    return run


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "manifest.jsonl"
    rows = [{"prompt": "a red circle", "subjects": [subject]} for subject in ("circle", "dog")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_it_has_the_options_of_the_command_line(run):
    text = run("--help").stdout
    for name in inspect.signature(cli.generate).parameters:
        assert f"--{name.replace('_', '-')} " in text
    address = " ".join(text[text.index("--ray-address") :].split())
    assert "[default: auto]" in address[:200]


def test_a_dry_run_says_what_would_be_done(run, manifest, tmp_path):
    done = run("--manifest", manifest, "--output", tmp_path / "out", "--dry-run")
    assert done.returncode == 1, done.stderr
    assert "2 rows in 1 shard of 256" in done.stdout
    assert "subject 'dog' is not in the prompt" in done.stdout
    assert not (tmp_path / "out").exists()


def test_exit_codes_are_those_of_the_command_line(run, manifest, tmp_path):
    missing = run("--manifest", tmp_path / "none.csv", "--output", tmp_path / "out", "--dry-run")
    assert missing.returncode == 2
    assert missing.stderr.startswith("aae-batch: Manifest ")
    incomplete = run("--manifest", manifest)
    assert incomplete.returncode == 2
    assert "--output" in incomplete.stderr


def test_the_package_beside_it_is_the_one_that_runs(run, tmp_path):
    shutil.copytree(ROOT / "jobs", tmp_path / "work" / "jobs")
    package = tmp_path / "work" / "aae_batch"
    ignored = shutil.ignore_patterns("weights", "__pycache__")
    shutil.copytree(ROOT / "aae_batch", package, ignore=ignored)
    settings = package / "sampling" / "config.py"
    settings.write_text(settings.read_text().replace("Denoising steps.", "Steps of this copy."))
    done = run("--help", script=tmp_path / "work" / "jobs" / "generate.py")
    assert "Steps of this copy." in done.stdout, done.stderr
