"""What the README shows runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import datasets

from aae_batch.dataset.reader import Dataset

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_example_draws_its_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{i}.png" for i in range(4)]
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_list_of_prompts_becomes_a_scored_browsable_dataset_in_under_ten_commands(tmp_path):
    (tmp_path / "prompts.csv").write_text(blocks("csv")[0])
    script = blocks("sh")[0]
    assert script.count("aae-batch ") < 10
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attend-and-excite minus stable-diffusion" in done.stdout
    assert Dataset(tmp_path / "output").metrics() == ["attention", "detector"]
    assert (tmp_path / "output" / "report.html").exists()
    exported = datasets.load_dataset(
        str(tmp_path / "exported"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(exported) == 2
    assert {"image", "prompt", "final_loss"} <= set(exported.column_names)
