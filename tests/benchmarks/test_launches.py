from __future__ import annotations

import pytest
import torch

from aae_batch import Engine, Request
from aae_batch.sampling.model.loading import load_pipeline
from benchmarks.counting_device import NAME, counting


@pytest.mark.parametrize(
    ("work", "kernels", "syncs"),
    [
        (lambda x: x.relu().view(4), 1, 0),
        (lambda x: (x * x).sum().item(), 2, 1),
        (lambda x: x.tolist(), 0, 1),
        (lambda x: x.cpu().numpy(), 0, 1),
        (lambda x: torch.tensor([1.0, 2.0], device=x.device), 0, 1),
        (lambda x: torch.tensor([1.0, 2.0]).to(x.device, non_blocking=True), 0, 0),
        (lambda x: x * torch.tensor(2.0), 1, 0),
    ],
    ids=["view", "item", "list", "host", "blocking copy", "copy", "number"],
)
def test_the_device_counts_what_a_gpu_would_be_asked(work, kernels, syncs):
    with counting() as counts:
        x = torch.ones(2, 2).to(NAME)
        before = counts.syncs
        work(x)
        assert (counts.kernels, counts.syncs - before) == (kernels, syncs)


def test_the_device_computes_what_the_cpu_does():
    def latents(pipe):
        engine = Engine.from_pipeline(pipe, slots=2)
        requests = [Request("a red circle", ["red circle"], seed=seed) for seed in range(2)]
        config = engine.defaults.updated(num_inference_steps=3, max_iter_to_alter=1, thresholds={})
        with engine.open(config) as batch:
            for request in requests:
                batch.add(request)
            for _ in range(2):
                batch.step()
            return torch.stack([sample.latents.cpu() for sample in batch.samples])

    expected = latents(load_pipeline("shapes", device="cpu", dtype="float64"))
    with counting() as counts:
        pipe = load_pipeline("shapes", device="cpu", dtype="float64").to(NAME)
        torch.testing.assert_close(latents(pipe), expected)
        assert counts.kernels > 1000
