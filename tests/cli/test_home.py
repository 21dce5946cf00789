"""A leading `~` is the home folder in every path, as no shell expands it after `=` or within a setting."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aae_batch import cli
from aae_batch.generate.settings import JobSettings
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.model.loading import load_pipeline, source_of
from aae_batch.store import fetch


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_commands_read_and_write_in_the_home_folder(home, make_output):
    make_output("files", home / "out")
    (home / "p.csv").write_text("prompt,subjects\na circle,circle\n")
    for command, made in {
        "manifest build ~/p.csv ~/m.parquet": "m.parquet",
        "manifest validate ~/m.parquet --output=~/problems.csv": "problems.csv",
        "report ~/out --html=~/page.html": "page.html",
        "report ~/out": "out/report.html",
        "export ~/out ~/exported --format=parquet": "exported/README.md",
    }.items():
        result = CliRunner().invoke(cli.app, command.split())
        assert result.exit_code == 0, result.output
        assert (home / made).is_file(), command
    assert not list(Path.cwd().iterdir())


def test_settings_name_the_home_folder_s_own_path(home, monkeypatch):
    settings = JobSettings(
        manifest="~/m.csv", output="~/out", model="~/sd", lora="~/l:0.5", guidance=GuidanceConfig()
    )
    assert (settings.manifest, settings.output, settings.model, settings.lora) == (
        *(f"{home}/{name}" for name in ("m.csv", "out", "sd")),
        (f"{home}/l:0.5",),
    )
    monkeypatch.setenv("AAE_BATCH_CACHE", "~/cache")
    assert fetch._cache() == home / "cache"


def test_a_model_in_the_home_folder_is_found(home):
    shutil.copytree(source_of("shapes"), home / "sd")
    result = CliRunner().invoke(cli.app, ["tokens", "a circle", "--model", "~/sd"])
    assert result.exit_code == 0, result.output
    assert load_pipeline("~/sd", device="cpu").unet.device.type == "cpu"
