"""What fits in memory, and text encoders that are on the device only while they encode."""

from __future__ import annotations

import pytest
import torch

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.sampling.memory import ON_CPU, slots_for
from aae_batch.sampling.model.family import network_of
from tests.conftest import small_pipeline
from tests.pipelines import T5_LENGTH, flux

KIB = 1024


def bytes_kept(run) -> int:
    """What a function keeps for the backward: on a processor, a peak that can be counted."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(kept.values())


@pytest.fixture(scope="module")
def model():
    return network_of(small_pipeline())


def test_slots_are_what_free_memory_holds_of_a_measured_row(model):
    with model.recording_maps():
        few, more = (slots_for(model, mib * KIB**2, bytes_kept) for mib in (8, 16))
        least, most = (slots_for(model, free, bytes_kept) for free in (1, 2**50))
    assert 1 < few < more
    assert more == pytest.approx(2 * few, abs=2)
    assert (least, most) == (1, 64)


def test_an_engine_takes_the_slots_that_were_measured():
    with Engine.from_pipeline(small_pipeline(), slots="auto").open() as batch:
        assert batch.slots == ON_CPU


def test_text_encoders_come_once_for_a_window_of_prompts(monkeypatch):
    pipe = flux()
    config = GuidanceConfig(
        num_inference_steps=1,
        method="stable-diffusion",
        true_cfg_scale=2.0,
        max_sequence_length=T5_LENGTH,
        height=64,
        width=64,
    )
    words = ("circle", "square", "star", "cross")
    requests = [Request(f"a red {word}", id=word) for word in words]
    together = {
        one.request.id: one.latents
        for one in Engine.from_pipeline(pipe, slots=1).generate(requests, config)
    }

    moves: list[str] = []
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        monkeypatch.setattr(encoder, "to", lambda where: moves.append(str(where)))
    engine = Engine.from_pipeline(pipe, slots=1)
    engine.model.evicts_text_encoders = True
    for result in engine.generate(requests, config):
        assert torch.equal(result.latents, together[result.request.id])
    assert moves == ["cpu"] * 4, "both encoders came once, and went"
