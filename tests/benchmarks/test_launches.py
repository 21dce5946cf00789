"""In processes of their own: torch learns of a device only before its first backward."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

COUNTS = """
import json, sys, torch
from benchmarks.counting_device import NAME, counting
with counting() as counts:
    x = torch.ones(2, 2).to(NAME)
    found = []
    for work in (
        lambda: x.relu().view(4),
        lambda: (x * x).sum().item(),
        lambda: x.tolist(),
        lambda: x.cpu().numpy(),
        lambda: torch.tensor([1.0, 2.0], device=x.device),
        lambda: torch.tensor([1.0, 2.0]).to(x.device, non_blocking=True),
        lambda: x * torch.tensor(2.0),
    ):
        before = counts.kernels, counts.syncs
        work()
        found.append((counts.kernels - before[0], counts.syncs - before[1]))
print(json.dumps(found))
"""

RESULTS = """
import torch
from aae_batch import Engine, Request
from aae_batch.sampling.model.loading import load_pipeline
from benchmarks.counting_device import NAME, counting

def latents(pipe):
    engine = Engine.from_pipeline(pipe, slots=2)
    config = engine.defaults.updated(num_inference_steps=3, max_iter_to_alter=1, thresholds={})
    with engine.open(config) as batch:
        for seed in range(2):
            batch.add(Request("a red circle", ["red circle"], seed=seed))
        for _ in range(2):
            batch.step()
        return torch.stack([sample.latents.cpu() for sample in batch.samples])

with counting():
    counted = latents(load_pipeline("shapes", device="cpu", dtype="float64").to(NAME))
torch.testing.assert_close(counted, latents(load_pipeline("shapes", device="cpu", dtype="float64")))
"""


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_device_counts_what_a_gpu_would_be_asked():
    view, item, numbers, host, blocking, sent, factor = json.loads(run("-c", COUNTS))
    assert (view, item, numbers, host) == ([1, 0], [2, 1], [0, 1], [0, 1])
    assert (blocking, sent, factor) == ([0, 1], [0, 0], [1, 0])


def test_the_device_computes_what_the_cpu_does():
    run("-c", RESULTS)


@pytest.mark.parametrize(
    "options",
    [(), ("--scheduler", "euler"), ("--scheduler", "dpmsolver++"), ("--model", "shapes-flow")],
    ids=str,
)
def test_a_step_waits_for_the_device_thrice_at_most_whatever_the_slots(options):
    table = run("-m", "benchmarks.launches", "--slots", "2,9", *options)
    rows = [[int(cell) for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == [2, 9]
    for _, _, statistics, waits, _, waits_unguided, _, waits_at_the_end in rows:
        assert statistics <= 40
        assert waits <= 3
        assert waits_unguided <= 2
        assert waits_at_the_end <= 3
