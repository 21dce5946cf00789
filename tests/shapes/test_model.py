"""The embedded model end to end. Single pictures may fail either way; the aggregate may not."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest

from aae_batch import Engine, Request
from aae_batch.shapes.score import SEEDS, compare, prompts
from aae_batch.shapes.world import SIZE


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("shapes", slots=12, device="cpu")


def test_it_fits_in_a_package():
    folder = files("aae_batch.shapes") / "weights"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size <= 16 * 2**20


def test_it_draws_a_picture_of_its_own_size(engine):
    (result,) = engine.generate(
        [Request("a red circle and a blue square", subjects=["red circle", "blue square"])]
    )
    assert result.error is None
    assert result.image.size == (SIZE, SIZE)
    assert np.asarray(result.image).std() > 5, "not an empty picture"


def test_guidance_draws_more_of_what_is_asked_for(engine):
    pairs, seeds = prompts("report")[:10], list(SEEDS["report"])
    scores = compare(engine, engine.defaults, pairs, seeds, ["plain", "guided"])
    both = {way: np.mean([score.drawn for score in some]) for way, some in scores.items()}
    assert both["guided"] >= both["plain"] + 0.1, both
