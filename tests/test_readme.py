"""The commands and Python blocks of the README, and the Python blocks of docs/python.md and
docs/evaluation.md, run as written, one after the other: from a checkout, and (slow) from a wheel."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import datasets
import pytest
from PIL import Image

from aae_batch.dataset.reader import Dataset
from docs.reference import PAGE, reference

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
EVALUATION = ROOT / "docs" / "evaluation.md"


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


@dataclass(frozen=True)
class Installed:
    """An environment that has the package. `bin` holds its commands."""

    bin: Path
    environment: dict[str, str]

    def run(self, *command: str, cwd: Path) -> str:
        """What a command printed."""
        environment = {**self.environment, "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([*pip, str(ROOT)], check=True, timeout=600)
    (built,) = folder.glob("*.whl")
    return built


def installed_from(wheel: Path, folder: Path) -> Installed:
    """The wheel in an environment of its own, which sees this one's libraries but not the checkout."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    libraries = Path(pytest.__file__).parents[1]
    (Path(site.strip()) / "libraries.pth").write_text(f"{libraries}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--ignore-installed", str(wheel)], check=True, timeout=600)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return Installed(folder / "bin", environment)


@pytest.fixture(scope="module", params=["checkout", pytest.param("wheel", marks=pytest.mark.slow)])
def installed(request, tmp_path_factory) -> Installed:
    if request.param == "checkout":
        return Installed(Path(sys.executable).parent, dict(os.environ))
    folder = tmp_path_factory.mktemp("environment")
    return installed_from(request.getfixturevalue("wheel"), folder)


def test_a_fresh_folder_takes_the_commands_then_the_python_blocks(installed, tmp_path):
    script = "".join(blocks(README, "sh"))
    assert script.count("aae-batch ") < 10
    said = installed.run("bash", "-e", "-c", script, cwd=tmp_path)
    assert "attend-and-excite minus stable-diffusion" in said
    assert Dataset(tmp_path / "output").metrics() == ["attention", "detector"]
    assert (tmp_path / "output" / "report.html").exists()
    exported = datasets.load_dataset(
        str(tmp_path / "exported"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(exported) == 2
    assert {"image", "prompt", "final_loss"} <= set(exported.column_names)

    example, notebook = blocks(README, "python")
    more = [*blocks(ROOT / "docs" / "python.md", "python"), *blocks(EVALUATION, "python")]
    assert len(more) == 5
    program = "\n".join([example, "print('---')", notebook, "print('---')", *more])
    printed = installed.run("python", "-c", program, cwd=tmp_path).split("---\n")
    assert [len(part.splitlines()) for part in printed[:2]] == [4, 0]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{i}.png" for i in range(4)]
    assert "green star" in printed[2]
    where = installed.run(
        "python", "-c", "import aae_batch; print(aae_batch.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(ROOT) == (
        installed.bin == Path(sys.executable).parent
    )


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(wheel):
    names = set(ZipFile(wheel).namelist())
    files = (path for path in (ROOT / "aae_batch").rglob("*") if path.is_file())
    package = {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"}
    assert {name for name in names if ".dist-info/" not in name} == package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_every_link_leads_somewhere():
    """To a file or folder of this repository, and to a heading that is there."""
    for document in documents():
        for target in re.findall(
            r"\]\((?!https?:)([^)\s]+)\)", document.read_text(encoding="utf-8")
        ):
            path, _, heading = target.partition("#")
            file = document.parent / path if path else document
            assert file.exists(), f"{document.name}: {target}"
            if heading:
                assert heading in headings(file), f"{document.name}: {target}"


def documents() -> list[Path]:
    rooms = ("docs/*.md", "benchmarks/*.md", "aae_batch/shapes/*.md")
    return [README, ROOT / "CHANGELOG.md", *(path for room in rooms for path in ROOT.glob(room))]


def headings(document: Path) -> set[str]:
    """As GitHub names them in an address."""
    lines = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_the_example_of_the_engine_draws_a_pair(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = ROOT / "examples" / "engine.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 40
    runpy.run_path(str(example))
    plain, guided = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "guided"))
    assert plain.size == guided.size == (128, 128)
    assert plain.tobytes() != guided.tobytes()
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == ["guided", "plain"]
    assert all("red circle: " in line and "blue square: " in line for line in lines)


def test_the_reference_says_what_the_code_says():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run `make reference`"
