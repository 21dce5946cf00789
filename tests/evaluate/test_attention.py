from __future__ import annotations

from aae_batch.evaluate.attention import AttentionMetric
from tests.evaluate.conftest import row


def read(thresholds, *subjects, **values) -> dict:
    attention = {"a": [{"subject": str(i), "max_attention": s} for i, s in enumerate(subjects)]}
    values = {"method": "attend-and-excite", "neglected": False, "num_refinements": 7} | values
    (score,) = AttentionMetric(thresholds).score([row("a cat", **values)], [], attention)
    return score


def test_the_worst_subject_counts_at_each_step():
    score = read({0: 0.1, 1: 0.5, 2: 0.8}, [0.2, 0.4, 0.9], [0.6, 0.6, 0.85])
    assert score["min_max_attention"] == 0.85
    assert (score["thresholds_met"], score["num_thresholds"]) == (2, 3)
    assert (score["neglected"], score["num_refinements"]) == (False, 7)


def test_a_threshold_is_met_when_it_is_just_reached():
    assert read({1: 0.5}, [0.0, 0.5])["thresholds_met"] == 1


def test_thresholds_at_steps_that_a_row_does_not_have_do_not_count():
    score = read({0: 0.1, 20: 0.8}, [0.2, 0.3])
    assert (score["thresholds_met"], score["num_thresholds"]) == (1, 1)


def test_a_row_without_subjects_has_nulls():
    assert set(read({0: 0.1}, neglected=None).values()) == {None}


def test_attention_within_a_conjunct_is_not_held_against_that_in_a_whole_prompt():
    score = read({0: 0.1}, [0.9, 0.9], method="composable-diffusion")
    assert {name for name, value in score.items() if value is None} == {
        *("min_max_attention", "neglected", "thresholds_met", "num_thresholds"),
    }
    assert score["num_refinements"] == 7
