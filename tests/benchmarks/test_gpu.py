"""The benchmark of a GPU runs dry."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu


def test_every_line_is_measured(tmp_path, capsys):
    written = tmp_path / "lines.json"
    slots = ["--slots", "2", "--compiled", "", "--whole", "2"]
    gpu.main(["--dry", "--models", "sd15,sdxl", *slots, "--json", str(written)])

    found = json.loads(written.read_text())["lines"]
    measured = {(line["model"], line["what"], line["slots"]): line for line in found}
    for model in ("sd15", "sdxl"):
        plain = measured[model, "stable-diffusion", 2]
        guided = measured[model, "attend-and-excite", 2]
        for line in (plain, guided):
            busy = line["host_ms"]
            assert 0 < busy <= line["step_ms"]
        assert plain["later_ms"] is None
        each = (25 * guided["step_ms"] + 25 * guided["later_ms"]) / 2 + guided["decode_ms"]
        assert guided["images_per_s"] == pytest.approx(1e3 / each)
        assert measured[model, "diffusers", 8]["images_per_s"] > 0
    assert measured["sd15", "diffusers' attend-and-excite", 1]["images_per_s"] > 0
    table = capsys.readouterr().out
    assert table.count("\n| sd15 |") == sum(line["model"] == "sd15" for line in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no GPU" in capsys.readouterr().err
