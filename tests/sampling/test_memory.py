"""What fits in memory, and text encoders that are on the device only while they encode."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.sampling import engine, memory
from aae_batch.sampling.families import FLUX, STABLE_DIFFUSION
from aae_batch.sampling.memory import ON_CPU, measured_slots, slots_for
from aae_batch.sampling.model import family
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
        few, more = (slots_for(model, mib * KIB**2, bytes_kept, 2) for mib in (8, 16))
        least, most = (slots_for(model, free, bytes_kept, 2) for free in (1, 2**50))
    assert 1 < few < more
    assert more == pytest.approx(2 * few, abs=2)
    assert (least, most) == (1, 64)


@pytest.mark.parametrize("fitting", [0, 1])
def test_one_slot_is_left_where_two_samples_do_not_fit(model, fitting):
    tried = []

    def peak_of(run) -> int:
        tried.append(run)
        if len(tried) > fitting:
            raise torch.OutOfMemoryError
        return KIB

    assert slots_for(model, 2**50, peak_of, 2) == 1


@pytest.mark.parametrize(
    ("family", "settings", "rows"),
    [
        (STABLE_DIFFUSION, {}, 2),
        (STABLE_DIFFUSION, {"guidance_scale": 1.0}, 1),
        (FLUX, {"guidance_scale": 3.5}, 1),
        (FLUX, {"true_cfg_scale": 2.0}, 2),
    ],
)
def test_a_sample_is_measured_with_the_rows_that_it_takes(model, family, settings, rows):
    batches = []

    def peak_of(run) -> int:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("_guided", "_denoised"):
                patch.setattr(memory, name, lambda _, count: batches.append(count))
            run()
        return len(batches)

    slots_for(model, 2**30, peak_of, family.rows(GuidanceConfig(**settings)))
    assert batches == [1, 2, rows, 2 * rows]


def test_text_encoders_leave_before_free_memory_is_measured(monkeypatch):
    done = []
    model = SimpleNamespace(
        device=torch.device("cuda"),
        make_room=lambda: done.append("room"),
        release_memory=lambda: done.append("release"),
    )
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (done.append("free"), 2**30)[::-1]
    )
    monkeypatch.setattr(memory, "slots_for", lambda *_: 7)
    assert measured_slots(model, 2) == 7
    assert done == ["room", "free", "release"]


def test_slots_are_measured_once_for_the_same_settings(monkeypatch):
    measured = []
    monkeypatch.setattr(engine, "measured_slots", lambda *_: measured.append(1) or 5)
    one = Engine.from_pipeline(small_pipeline(), slots="auto")
    plain = GuidanceConfig(guidance_scale=1.0)
    for config in (None, None, plain, plain):
        with one.open(config) as batch:
            assert batch.slots == 5
    assert len(measured) == 2


def test_a_denoising_forward_has_no_more_rows_than_the_run_needs(monkeypatch):
    """A row has guidance that the run has not."""
    engine = Engine.from_pipeline(small_pipeline(), slots=2)
    sizes = []
    denoise = engine.model.denoise
    monkeypatch.setattr(
        engine.model,
        "denoise",
        lambda *given, **named: (sizes.append(len(given[0])), denoise(*given, **named))[1],
    )
    config = GuidanceConfig(
        method="stable-diffusion", num_inference_steps=1, guidance_scale=1.0, height=64, width=64
    )
    rows = [Request("a star", guidance_scale=scale, id=str(scale)) for scale in (3.0, 4.0)]
    assert all(result.image for result in engine.generate(rows, config))
    assert sizes == [2, 2]


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
    assert moves == ["cpu"] * 8, "both encoders came for the first step, and for all others"


def test_no_more_than_a_window_of_announced_texts_is_encoded_at_a_time(monkeypatch):
    """Rows of two methods come back to the same prompts."""
    for module in (engine, family):
        monkeypatch.setattr(module, "WINDOW", 3)
    model = network_of(flux())
    model.evicts_text_encoders = True
    came: list[list[str]] = []
    embed, here = model._embed, model._text_encoders_here
    monkeypatch.setattr(
        model, "_embed", lambda texts: (came[-1].extend([*texts, "|"]), embed(texts))[1]
    )
    monkeypatch.setattr(model, "_text_encoders_here", lambda: (came.append([]), here())[1])
    monkeypatch.setattr(family, "KEPT_TEXTS", 1)
    config = GuidanceConfig(method="stable-diffusion", num_inference_steps=1, height=64, width=64)
    words = ["circle", "square", "star", "cross", "circle", "square", "star", "cross"]
    requests = [Request(word, id=str(number)) for number, word in enumerate(words)]
    with Engine(model, slots=1).open(config) as batch:
        batch.step()  # the first waits for no more than fill the slots
        while requests:
            expected = batch.expect(requests)
            for request in requests[:expected]:
                batch.add(request)
                assert len(model._encoded) <= 3
            requests = requests[expected:]
    alone = [["circle", "|", "square", "|", "star", "|"], ["cross", "|"], ["star", "|"]]
    assert came == alone, "with one slot no texts share a forward"


def test_the_first_step_waits_for_no_more_requests_than_fill_the_slots():
    asked = 0

    def endless():
        nonlocal asked
        while True:
            asked += 1
            yield Request("a star", id=str(asked), method="stable-diffusion")

    one = Engine.from_pipeline(flux(), slots=2)
    one.model.evicts_text_encoders = True
    config = GuidanceConfig(num_inference_steps=1, height=64, width=64)
    assert next(one.generate(endless(), config)).image
    assert asked == 2


@pytest.mark.parametrize("mark", ["hf_quantizer", "hf_device_map"])
def test_text_encoders_that_cannot_be_moved_stay(monkeypatch, mark):
    pipe = flux()
    moves: list[str] = []
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, name)
        monkeypatch.setattr(encoder, "to", lambda where, name=name: moves.append(name))
    setattr(pipe.text_encoder_2, mark, {})
    model = network_of(pipe)
    model.evicts_text_encoders = True
    with model.recording_maps():
        model.encode("a star", GuidanceConfig())
    assert moves == ["text_encoder"] * 2
