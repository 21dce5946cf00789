"""A method of a person's own, from a module that only this test has, through the command line and Ray."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.dataset.reader import Dataset
from aae_batch.errors import SettingsError
from aae_batch.generate.worker import together
from aae_batch.methods import METHODS, Method, load_plugins, register_method

EXAMPLE = Path(__file__).parents[2] / "examples/objective.py"
MANIFEST = (
    "id,prompt,subjects,method\n"
    "own,a red circle and a blue square,circle;square,even-shares\n"
    "paper,a red circle and a blue square,circle;square,attend-and-excite\n"
    "one,a red circle,circle,even-shares\n"
)


def test_a_method_of_ones_own_runs_in_the_job(tmp_path, tiny_pipeline_folder):
    shutil.copy(EXAMPLE, tmp_path / "objective.py")
    (tmp_path / "manifest.csv").write_text(MANIFEST)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name("aae-batch"), *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            timeout=600,
        )

    generate = ["generate", "manifest.csv", "out", "--model", str(tiny_pipeline_folder)]
    generate += ["--actors", "1", "--image-format", "png"]
    unknown = run(*generate, "--dry-run")
    assert unknown.returncode == 1
    assert "column method: 'even-shares' is not a method" in unknown.stdout

    done = run(*generate, "--plugin", "objective")
    assert done.returncode == 1, done.stderr
    dataset = Dataset(str(tmp_path / "out"))
    rows = {row["id"]: row for row in dataset.metadata().to_pylist()}
    assert [rows[name]["status"] for name in ("own", "paper", "one")] == ["ok", "ok", "failed"]
    assert "method even-shares needs 2 subjects or more" in rows["one"]["error"]
    assert rows["own"]["sha256"] != rows["paper"]["sha256"]
    settings = dataset.run["settings"]
    assert settings["plugin"] == ["objective"]
    assert list(settings["plugin_versions"]) == ["even-shares"]
    assert settings["steering"]["even-shares"]["scale_factor"] == 10.0
    assert settings["steering"]["attend-and-excite"]["scale_factor"] == 1.0, "as the model has it"

    proved = run("verify", "out", "--manifest", "manifest.csv")
    assert proved.returncode == 0, proved.stdout + proved.stderr

    module = tmp_path / "objective.py"
    module.write_text(module.read_text().replace("1 - reached, reached", "2 - reached, reached"))
    other = run(*generate, "--plugin", "objective")
    assert other.returncode == 2
    assert "plugin_versions" in other.stderr
    missing = run(*generate, "--plugin", "no_such_module")
    assert missing.returncode == 2
    assert "--plugin no_such_module cannot be imported" in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.fixture
def methods():
    """The table, and whatever a test adds to it only for that test."""
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


def test_an_installed_package_brings_its_methods_by_an_entry_point(tmp_path, methods, monkeypatch):
    shutil.copy(EXAMPLE, tmp_path / "shares_of_an_installed_package.py")
    info = tmp_path / "shares-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shares\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[aae_batch.methods]\nany-name = shares_of_an_installed_package\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert list(load_plugins([])) == ["even-shares"]


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (lambda seen: (seen.excitations, seen.excitations), r"returned tensors of \(1, 2\) and"),
        (lambda seen: seen.no_such_thing, "failed with AttributeError: .*no_such_thing"),
        (lambda seen: None, "failed with TypeError"),
    ],
)
def test_an_objective_that_is_none_stops_with_a_sentence(methods, sd1_pipeline, objective, said):
    register_method("mine", Method("broken", objective=objective))
    engine = Engine.from_pipeline(sd1_pipeline, slots=1)
    request = Request("a star and a cross", ["star", "cross"], method="mine")
    with pytest.raises(SettingsError, match=f"The objective of method mine {said}"):
        list(engine.generate([request], GuidanceConfig(num_inference_steps=2)))


def test_what_a_plugin_cannot_call_its_method(methods):
    with pytest.raises(SettingsError, match="Method 'syngen' already exists"):
        register_method("syngen", Method("another"))
    with pytest.raises(SettingsError, match="cannot be called"):
        register_method("my method/2", Method("another"))
    register_method("syngen", METHODS["syngen"])  # a module that is imported twice
    with pytest.raises(SettingsError, match="must denoise under the whole prompt"):
        Method("two texts", texts="conjuncts", objective=len)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Method("", objective="no_such_module:name"), "mine cannot be found: No module"),
        (Method("", objective="math:no_such_name"), "mine cannot be found: .*no_such_name"),
        (Method("", objective=len), "The source of method mine cannot be read"),
    ],
)
def test_a_method_must_be_found_and_told_from_an_earlier_one(methods, method, said):
    register_method("mine", method)
    with pytest.raises(SettingsError, match=said):
        load_plugins([])
    methods["mine"] = replace(method, version="1", objective=len)
    assert load_plugins([]) == {"mine": "1"}


def test_rows_of_one_method_are_taken_next_to_each_other():
    methods = ["syngen", None, "stable-diffusion", "syngen", "attend-and-excite"]
    requests = [Request("a star", seed=i, method=method) for i, method in enumerate(methods)]
    taken = together(requests, GuidanceConfig())
    assert [request.seed for request in taken] == [2, 1, 4, 0, 3]
