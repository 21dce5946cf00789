"""What is recorded of a map: where it is, how strong, and when."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.trace import AttentionTrace, describe
from aae_batch.sampling.words import Subject

CAT, DOG = (Subject(name, (at,), (name,), (at,), ()) for name, at in (("cat", 2), ("dog", 5)))


def test_the_figures_of_a_map_that_is_not_alike_in_any_direction():
    map = torch.zeros(3, 5, dtype=torch.float64)  # [height, width]
    map[0, 3], map[1, 4] = 0.6, 0.2
    figures = describe(map[None, None], torch.tensor([[0.7]], dtype=torch.float64))
    highest, mean, entropy, x, y = figures[0, 0].tolist()
    assert highest == 0.7
    assert mean == pytest.approx(0.8 / 15)
    assert entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert x == pytest.approx(0.75 * 3.5 / 5 + 0.25 * 4.5 / 5)  # from the left
    assert y == pytest.approx(0.75 * 0.5 / 3 + 0.25 * 1.5 / 3)  # from the top


def traced(excitations: list[tuple[float, float]], maps: str = "last") -> AttentionTrace:
    """A trace of two subjects with these excitations at each step."""
    steps = len(excitations)
    trace = AttentionTrace((CAT, DOG), steps, GuidanceConfig(attention_maps=maps).map_steps(steps))
    for step, both in enumerate(excitations):
        figures = np.zeros((2, 5), dtype=np.float32)
        figures[:, 0] = both
        maps = torch.arange(12.0).reshape(2, 2, 3) + 100 * step
        trace.observe(step, figures, loss=1 - min(both), maps=maps)
    return trace


@pytest.mark.parametrize(
    ("excitations", "neglected"),
    [
        ([(0.9, 0.2), (0.1, 0.9), (0.2, 0.3)], False),  # each reached it once
        ([(0.9, 0.2), (0.1, 0.7), (0.2, 0.7)], True),  # the dog never did
        ([(0.1, 0.1), (0.9, 0.9)], False),
    ],
)
def test_neglected_is_who_never_reached_the_threshold_at_any_step(excitations, neglected):
    record = traced(excitations).record(num_refinements=3, last_threshold=0.8)
    assert record.neglected is neglected
    assert record.num_refinements == 3
    assert record.final_loss == pytest.approx(1 - min(excitations[-1]))
    assert record.loss == pytest.approx([1 - min(both) for both in excitations])
    assert [list(s.max_attention) for s in record.subjects] == [
        pytest.approx([both[i] for both in excitations]) for i in range(2)
    ]


def test_the_map_kept_is_that_of_the_last_step_as_it_lies():
    record = traced([(0.5, 0.5), (0.5, 0.5)]).record(0, None)
    assert record.neglected is None
    dog = record.subjects[1]
    expected = 100 + torch.arange(6.0, 12.0).reshape(2, 3).numpy()
    assert dog.map_scale == expected.max()
    assert np.array_equal(dog.map, np.round(expected / expected.max() * 255))
    assert (dog.subject, dog.token_indices, dog.tokens) == ("dog", (5,), ("dog",))


@pytest.mark.parametrize(
    ("maps", "steps"),
    [
        ("last", [6]),
        ("every:1", [0, 1, 2, 3, 4, 5, 6]),
        ("every:3", [0, 3, 6]),
        ("every:4", [0, 4, 6]),
    ],
)
def test_the_maps_of_every_nth_step_and_the_last_are_kept_each_by_its_own_scale(maps, steps):
    dog = traced([(0.5, 0.5)] * 7, maps).record(0, None).subjects[1]
    expected = [100 * step + torch.arange(6.0, 12.0).reshape(2, 3).numpy() for step in steps]
    assert list(dog.map_steps) == steps
    assert list(dog.map_scales) == [map.max() for map in expected]
    for map, probabilities in zip(dog.maps, expected, strict=True):
        assert np.array_equal(map, np.round(255 * probabilities / probabilities.max()))
    assert np.array_equal(dog.map, dog.maps[-1])


def test_a_map_without_attention_is_zero():
    trace = AttentionTrace((CAT,), steps=1)
    trace.observe(0, np.zeros((1, 5), np.float32), 1.0, torch.zeros(1, 2, 2))
    (cat,) = trace.record(0, None).subjects
    assert (cat.map.max(), cat.map_scale) == (0, 0)
