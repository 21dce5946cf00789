"""What is counted is what sampling computes; the rest is multiplication."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.errors import ModelError, SettingsError
from aae_batch.manifest.price import (
    costs_of,
    in_thousands,
    in_time,
    quote,
    quote_for,
)
from aae_batch.manifest.validate import Work
from aae_batch.sampling.model.loading import default_guidance, source_of
from aae_batch.sampling.model.skeleton import load_skeleton

PROMPT = "a red circle and a blue square"
SUBJECTS = ["red circle", "blue square"]
LARGE = {"height": 256, "width": 256}


def work(method: str = "attend-and-excite", count: int = 1, **changed) -> Counter[Work]:
    kind = Work(method, 3, True, None, None, 2)._replace(**changed)
    return Counter({kind: count})


@pytest.fixture(scope="module")
def config() -> GuidanceConfig:
    """Without thresholds: how often a picture refines is assumed and not known."""
    own = default_guidance("shapes")
    return own.updated(num_inference_steps=3, max_iter_to_alter=2, thresholds={})


@pytest.fixture(scope="module")
def costs(config):
    return costs_of(load_skeleton("shapes"), work() + work(**LARGE), config)


@pytest.fixture  # one for each test, since it keeps the texts that it has encoded
def engine() -> Engine:
    return Engine.from_pretrained("shapes", slots=1, device="cpu")


@pytest.mark.parametrize(
    ("method", "conjuncts"),
    [("attend-and-excite", 1), ("stable-diffusion", 1), ("composable-diffusion", 2)],
)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_flops_are_those_of_a_real_picture(engine, config, costs, method, conjuncts, scale):
    own = config.updated(method=method, guidance_scale=scale)
    request = Request(PROMPT, subjects=SUBJECTS, seed=1)
    # the CPU's fused attention is not in torch's counter
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (result,) = engine.generate([request], own)
    assert result.error is None
    kind = work(method, classifier_free=scale > 1, conjuncts=conjuncts)
    said = quote(kind, costs, own)
    assert said.flops == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_every_step_that_the_scheduler_adds_has_its_price(engine, config):
    own = config.updated(scheduler="pndm", max_iter_to_alter=25)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (result,) = engine.generate([Request(PROMPT, subjects=SUBJECTS, seed=1)], own)
    assert result.error is None
    costs = costs_of(load_skeleton("shapes"), work(), own)
    assert costs.steps == {3: 4}
    said = quote(work(), costs, own)
    assert said.flops == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_the_model_s_own_scheduler_counts_where_the_run_names_none(tmp_path):
    for source in Path(source_of("shapes")).rglob("*.json"):
        target = tmp_path / source.relative_to(source_of("shapes"))
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    file = tmp_path / "scheduler" / "scheduler_config.json"
    own = json.loads(file.read_text()) | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    file.write_text(json.dumps(own))
    costs = costs_of(load_skeleton(str(tmp_path)), work(), GuidanceConfig())
    assert costs.steps == {3: 4}
    file.write_text(json.dumps(own | {"_class_name": "Magic"}))
    with pytest.raises(ModelError, match="has a scheduler Magic, which diffusers lacks"):
        load_skeleton(str(tmp_path))


def test_refinements_cost_guided_passes_and_only_where_there_are_thresholds(config, costs):
    with_thresholds = config.updated(thresholds={0: 0.5})

    def flops(method: str, own: GuidanceConfig, refinements: int) -> float:
        return quote(work(method), costs, own, refinements).flops

    passes = costs.pictures[None, None].sampling
    guided = [flops("attend-and-excite", with_thresholds, n) for n in (0, 20)]
    assert guided[1] - guided[0] == pytest.approx(20 * (passes.attend + passes.attend_backward))
    plain = [flops("stable-diffusion", with_thresholds, n) for n in (0, 20)]
    assert plain[0] == plain[1] < guided[0]
    assert flops("attend-and-excite", config, 20) == flops("attend-and-excite", config, 0)


def test_maps_over_time_are_bytes_of_the_tables(config, costs):
    def table_bytes(maps: str) -> float:
        return quote(work(), costs, config.updated(attention_maps=maps)).table_bytes

    two_subjects, places = 2, 8 * 8
    assert table_bytes("every:2") - table_bytes("last") == two_subjects * places * 2  # 0 and 2 of 3
    assert table_bytes("every:1") - table_bytes("last") == two_subjects * places * 3


def test_hours_and_bytes_follow_from_what_is_assumed(config, costs):
    one = quote(work(), costs, config, tflops=50)
    many = quote(work(count=1000), costs, config, tflops=25)
    assert many.images == 1000
    assert many.flops == pytest.approx(1000 * one.flops)
    assert many.gpu_hours == pytest.approx(2000 * one.gpu_hours)
    assert one.gpu_hours == pytest.approx(one.flops / (50e12 * 3600))
    assert one.image_bytes == pytest.approx(128 * 128 * 1.7)
    text = str(many)
    assert "an estimate" in text
    assert f"GPU time at a sustained 25 TFLOP/s: {in_time(many.gpu_hours)}\n" in text


def test_no_hours_are_made_up_where_no_throughput_was_measured(config, costs):
    said = quote(work(), costs, config)
    assert (said.gpu_hours, said.tflops) == (None, None)
    assert "GPU" not in str(said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0 B"),
        (446_000, "446 kB"),
        (999_700, "1 MB"),
        (1.234e9, "1.23 GB"),
        (5.5e15, "5.5 PB"),
        (4e21, "4,000 EB"),
    ],
)
def test_amounts_are_said_in_the_unit_that_suits_them(value, said):
    assert in_thousands(value, "B") == said


@pytest.mark.parametrize(
    ("hours", "said"),
    [(4.9e-6, "0.018 s"), (0.03, "108 s"), (0.5, "30 min"), (2.5, "2.5 h"), (12345.6, "12,346 h")],
)
def test_time_is_said_in_seconds_minutes_or_hours(hours, said):
    assert in_time(hours) == said


def test_more_steps_than_the_scheduler_has_are_refused_in_a_sentence(config):
    with pytest.raises(SettingsError, match=r"num_inference_steps is 2000, .* use fewer"):
        costs_of(load_skeleton("shapes"), work(num_inference_steps=2000), config)


def test_a_larger_picture_costs_more(config, costs):
    small = quote(work(), costs, config)
    large = quote(work(**LARGE), costs, config)
    assert large.flops > 4 * small.flops
    assert large.image_bytes == 4 * small.image_bytes


def test_a_model_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(ModelError, match="not a complete diffusers model"):
        quote_for(work(), str(tmp_path), GuidanceConfig())
