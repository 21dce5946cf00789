"""The objective's parts against direct computation, and the plan of a step."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
    pipeline_stable_diffusion_attend_and_excite as upstream,
)

from aae_batch.methods import Steering
from aae_batch.sampling.objectives.attend_and_excite import attend_and_excite
from aae_batch.sampling.objectives.maps import (
    excitation,
    membership,
    normalize_over_words,
    pool,
    smooth,
)
from aae_batch.sampling.objectives.seen import Seen
from aae_batch.sampling.steering import GuidanceSchedule, Progress
from aae_batch.sampling.words import Subject


def some_maps(batch: int = 2, tokens: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(batch, 5, 7, tokens, generator=generator) * 2).softmax(dim=-1)


def words_until(ends: list[int], tokens: int) -> torch.Tensor:
    places = torch.arange(tokens)
    return (places > 0) & (places < torch.tensor(ends)[:, None])


def test_words_compete_for_each_place_without_start_and_end():
    words = normalize_over_words(some_maps(), words_until([9, 4], tokens=10))
    assert torch.allclose(words.sum(dim=-1), torch.ones(2, 5, 7))
    assert (words[:, :, :, 0] == 0).all()
    assert (words[0, :, :, 9:] == 0).all()
    assert (words[1, :, :, 4:] == 0).all()


def test_excitation_is_upstreams_on_maps_that_are_not_square():
    maps = some_maps(batch=1)
    theirs = upstream.StableDiffusionAttendAndExcitePipeline._compute_max_attention_per_index(
        maps[0].clone(), [2, 5]
    )
    words = normalize_over_words(maps, words_until([9], tokens=10))
    ours = excitation(smooth(pool(words, membership([[(2,), (5,)]], 2, 10, words), "sum")))
    assert torch.allclose(ours[0], torch.stack(theirs), atol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("sum", lambda maps: maps[..., 2] + maps[..., 3]),
        ("max", lambda maps: torch.maximum(maps[..., 2], maps[..., 3])),
    ],
)
def test_a_subject_of_several_tokens_is_pooled(pooling, expected):
    maps = some_maps()
    pooled = pool(maps, membership([[(2, 3), (5,)], [(4,)]], 2, 10, maps), pooling)
    assert pooled.shape == (2, 2, 5, 7)
    assert torch.allclose(pooled[0, 0], expected(maps)[0])
    assert torch.allclose(pooled[0, 1], maps[0, :, :, 5])
    assert (pooled[1, 1] == 0).all(), "the second sample has one subject only"


def of_excitations(excitations: torch.Tensor, counts: list[int]) -> Seen:
    """Samples of so many subjects, whose excitations are known."""
    subjects = [[Subject("", (1,), ("",), (1,), ())] * count for count in counts]
    rows, maps = len(counts), torch.zeros(len(counts), 4, 4, 3)
    seen = Seen(maps, maps, [2] * rows, subjects, "sum", [0] * rows, [{} for _ in counts])
    vars(seen)["excitations"] = excitations
    return seen


def test_the_loss_is_the_worst_subjects_shortfall():
    excitations = torch.tensor([[0.9, 0.3], [0.8, 0.0]])
    loss, reached = attend_and_excite(of_excitations(excitations, [2, 1]))
    assert torch.allclose(loss, torch.tensor([0.7, 0.2]))
    assert torch.allclose(reached, torch.tensor([0.3, 0.8]))


def test_only_the_worst_subject_gets_a_gradient():
    excitations = torch.tensor([[0.9, 0.3]], requires_grad=True)
    attend_and_excite(of_excitations(excitations, [2]))[0].sum().backward()
    assert excitations.grad.tolist() == [[0.0, -1.0]]


def refinements_of(reached: list[float], target: float | None) -> int:
    progress = Progress()
    for value in reached:
        assert not progress.done
        progress.advance(value, target, most=20)
    assert progress.done
    return progress.refinements


def test_a_step_without_threshold_takes_one_forward():
    assert refinements_of([0.1], target=None) == 0


def test_what_is_on_target_needs_no_refinement():
    assert refinements_of([0.6], target=0.5) == 0


def test_refinement_makes_one_update_more_after_reaching_the_target():
    assert refinements_of([0.1, 0.3, 0.6, 0.7], target=0.5) == 3


def test_refinement_ends_after_the_most():
    assert refinements_of([0.1] * 21, target=0.5) == 20


def test_the_update_shortens_over_the_steps():
    schedule = GuidanceSchedule(Steering(), steps=50)
    assert schedule.step_size(0) == 20
    assert schedule.step_size(49) == pytest.approx(20 * 0.5**0.5)
    assert schedule.guides(24)
    assert not schedule.guides(25)


def test_a_threshold_after_the_last_altered_step_still_refines():
    schedule = GuidanceSchedule(Steering(max_iter_to_alter=3, thresholds={7: 0.8}), steps=10)
    assert schedule.guides(7)
    assert not schedule.updates(7)
    assert schedule.target(7) == 0.8
