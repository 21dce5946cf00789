from __future__ import annotations

import pyarrow.parquet as pq
from PIL import Image
from typer.testing import CliRunner

from aae_batch import cli
from aae_batch.cli.demo import PROMPTS, run_demo
from aae_batch.dataset.reader import Dataset


def test_the_demo_makes_pairs_from_the_same_noise_and_a_page_of_them(
    tiny_pipeline_folder, ray_here, tmp_path
):
    said: list[str] = []
    assert run_demo(tmp_path, str(tiny_pipeline_folder), said.append, num_inference_steps=2) == 0
    rows = Dataset(tmp_path).metadata().to_pylist()
    assert len(rows) == 2 * PROMPTS
    pairs: dict[str, set] = {}
    for row in rows:
        pairs.setdefault(row["prompt"], set()).add((row["seed"], row["method"]))
    for prompt, made in pairs.items():
        assert len({seed for seed, _ in made}) == 1, prompt
        assert {method for _, method in made} == {"attend-and-excite", "stable-diffusion"}
    with Image.open(tmp_path / "contact_sheet.png") as page:
        assert page.width > 1000
    text = "\n".join(said)
    assert str(tmp_path / "contact_sheet.png") in text
    assert f"page to look at: {(tmp_path / 'report.html').as_uri()}" in said
    assert "attend-and-excite" in (tmp_path / "report.html").read_text()
    tables = sorted((tmp_path / "metrics" / "detector").glob("*.parquet"))
    scores = [row for table in tables for row in pq.read_table(table).to_pylist()]
    assert {row["id"] for row in scores} == {row["id"] for row in rows}
    counted = {
        label: sum(bool(row["all_bound"]) for row in scores if row["id"].endswith(label))
        for label in ("plain", "guided")
    }
    assert said[-1] == (
        f"both things drawn: plain {counted['plain']} of 24, guided {counted['guided']} of 24"
    )


def test_the_demo_takes_a_model_of_its_world_only(tmp_path):
    result = CliRunner().invoke(cli.app, ["demo", str(tmp_path / "out"), "--model", "shape"])
    assert result.exit_code == 2
    assert "it takes shapes or shapes-flow" in result.stderr
    assert not (tmp_path / "out").exists()
