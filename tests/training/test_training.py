"""What the embedded model is trained on: whole words, grounded where they stand."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from aae_batch.shapes.world import COLOURS, PAIRS, SHAPES, THINGS, caption
from training import networks
from training.examples import (
    MAP_SIZE,
    CaptionMix,
    Example,
    Examples,
    check_whole,
    outlines,
    pixels,
    scenes,
)
from training.fitting import Place
from training.pictures import coverage
from training.train import Settings, _normalise

TOKENIZER = networks.tokenizer()


def test_every_word_of_the_world_is_one_token():
    assert set(networks.WORDS) == {"a", "and", *COLOURS, *SHAPES}
    for word in networks.WORDS:
        assert TOKENIZER.tokenize(word) == [f"{word}</w>"]
    check_whole(TOKENIZER)


def test_every_caption_has_a_token_for_each_word():
    for things in (*PAIRS, *((thing,) for thing in THINGS)):
        for coloured in (True, False):
            text = caption(things, coloured)
            assert TOKENIZER.tokenize(text) == [f"{word}</w>" for word in text.split()]


def test_the_order_of_the_merges_plays_no_part():
    """Where merges of one word could break another, it did: "green" once was four tokens."""
    backend = TOKENIZER.backend_tokenizer.to_str()
    model = json.loads(backend)["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    for seed in range(3):
        Random(seed).shuffle(merges)
        shuffled = CLIPTokenizer(vocab=model["vocab"], merges=list(merges))
        check_whole(shuffled)


def breaking_tokenizer() -> CLIPTokenizer:
    """Letters alone."""
    alphabet = networks.byte_alphabet()
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def test_training_refuses_a_tokenizer_that_breaks_a_word():
    some = scenes(4, seed=0)
    with pytest.raises(ValueError, match="breaks 'and' into 3 tokens"):
        Examples(some, torch.zeros(4, 8, 16, 16), breaking_tokenizer())


def test_words_are_grounded_where_the_tokenizer_says_they_stand():
    some = scenes(8, seed=0)
    examples = Examples(some, torch.zeros(8, 8, 16, 16), TOKENIZER)
    index = examples.pairs[0]
    named = tuple(reversed(examples.things[index]))
    target = examples.grounding(Example(index, named, coloured=True))
    assert np.allclose(target.sum(axis=1), 1)
    ids = TOKENIZER(caption(named)).input_ids
    for thing, placed in zip(named, reversed(some[index].objects), strict=True):
        for word in (thing.colour, thing.shape):
            position = ids.index(TOKENIZER.convert_tokens_to_ids(f"{word}</w>"))
            expected = coverage(placed, MAP_SIZE).reshape(-1) / 2
            assert np.allclose(target[:, position], expected)


def test_a_thing_that_the_picture_lacks_is_grounded_nowhere():
    some = scenes(8, seed=0)
    examples = Examples(some, torch.zeros(8, 8, 16, 16), TOKENIZER)
    mix = CaptionMix(one=0, both=0, left_out=1, none=0, plain=0)
    batch = examples.batch(6, mix, Random(3))
    for text, target in zip(batch.captions, batch.grounding, strict=True):
        looked_at = {text.split()[i - 1] for i in range(1, 8) if target[:, i].sum() > 0}
        assert len(looked_at) == 2, "the colour and the shape of the one thing shown"


def test_normalising_the_latents_changes_no_picture(tmp_path: Path):
    torch.manual_seed(0)
    vae = networks.vae().eval()
    with torch.no_grad():
        vae.quant_conv.weight *= 3
        vae.quant_conv.bias += 0.7
    images = torch.from_numpy(np.stack([pixels(scene) for scene in scenes(4, seed=2)]))
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        _normalise(vae, Settings(), Place(0, 1, torch.device("cpu"), tmp_path))
        latents = vae.encode(images).latent_dist.mean
        after = vae.decode(latents).sample
    assert torch.allclose(before, after, atol=1e-4)
    assert float(latents.var(dim=(0, 2, 3)).sum()) == pytest.approx(4, rel=0.3)


def test_outlines_say_where_each_shape_is():
    (scene,) = scenes(2, seed=5)[1:]
    where = outlines(scene)
    for placed in scene.objects:
        layer = where[SHAPES.index(placed.thing.shape)]
        assert layer[int(placed.y), int(placed.x)] == 1
    assert {SHAPES[i] for i in np.nonzero(where.sum(axis=(1, 2)))[0]} == {
        placed.thing.shape for placed in scene.objects
    }
