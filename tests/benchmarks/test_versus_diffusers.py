"""The benchmark against diffusers compares like with like."""

from __future__ import annotations

from benchmarks import versus_diffusers


def test_both_make_the_same_latents(capsys):
    few = ["--prompts", "2", "--rounds", "1", "--steps", "4", "--slots", "2"]
    versus_diffusers.main([*few, "--dtype", "float64"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "this engine, 2 slots" in x]
    assert float(line.split("|")[4]) < 1e-6
