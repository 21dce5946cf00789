"""The embedded model end to end. Single pictures may fail either way; the aggregate may not."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from aae_batch import Engine, Request
from aae_batch.sampling.model.loading import EMBEDDED, SHAPES_FLOW_MODEL, load_streams
from aae_batch.sampling.words import KNOWN_WORDS
from aae_batch.shapes.splits import SPLITS
from aae_batch.shapes.world import SIZE
from training import networks
from training.examples import check_whole
from training.score import compare, requests_of


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("shapes", slots=12, device="cpu")


@pytest.mark.parametrize("folder", EMBEDDED.values())
def test_it_fits_in_a_package(folder):
    folder = files("aae_batch.shapes") / folder
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size <= 12e6


def test_its_tokenizer_is_the_worlds_and_says_which_words_it_knows():
    shipped, ours = load_streams("shapes")[0].tokenizer, networks.tokenizer()
    assert shipped.init_kwargs[KNOWN_WORDS] == [*networks.WORDS]
    assert shipped.get_vocab() == ours.get_vocab()
    check_whole(shipped)


def test_it_draws_a_picture_of_its_own_size(engine):
    (result,) = engine.generate(
        [Request("a red circle and a blue square", subjects=["red circle", "blue square"])]
    )
    assert result.error is None
    assert result.image.size == (SIZE, SIZE)
    assert np.asarray(result.image).std() > 5, "not an empty picture"


def test_guidance_draws_more_of_what_is_asked_for(engine):
    scores = compare(engine, engine.defaults, SPLITS["test"], ["plain", "guided"])
    both = {way: np.mean([score.bound for score in some]) for way, some in scores.items()}
    assert both["guided"] >= 0.8, both
    assert both["guided"] >= both["plain"] + 0.3, both
    assert np.mean([score.met for score in scores["guided"]]) >= 0.9


def test_guidance_draws_more_with_flow_matching_and_joint_attention_too():
    engine = Engine.from_pretrained(SHAPES_FLOW_MODEL, slots=12, device="cpu")
    split = replace(SPLITS["test"], pairs=SPLITS["test"].pairs[:6])
    scores = compare(engine, engine.defaults, split, ["plain", "guided"])
    both = {way: np.mean([score.bound for score in some]) for way, some in scores.items()}
    assert both["guided"] >= both["plain"] + 0.15, both
    assert np.mean([score.met for score in scores["guided"]]) >= 0.9


def test_no_split_shares_a_prompt_or_a_noise_with_another():
    pairs = [pair for split in SPLITS.values() for pair in split.pairs]
    seeds = [request.seed for split in SPLITS.values() for request in requests_of(split)]
    assert len(set(pairs)) == len(pairs)
    assert len(set(seeds)) == len(seeds)
