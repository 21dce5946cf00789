"""The world, and the detector that says what a picture of it shows."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from aae_batch.shapes.detector import detect, judge
from aae_batch.shapes.world import PAIRS, SHAPES, SIZE, THINGS, Thing, caption, outline
from training.pictures import coverage, place, render


def test_a_seed_names_a_picture():
    one, two = (render(place(PAIRS[5], Random(3))) for _ in range(2))
    assert np.array_equal(one, two)
    assert one.size == (SIZE, SIZE)


def test_objects_keep_clear_of_the_border_and_of_each_other():
    random = Random(0)
    for _ in range(50):
        scene = place(random.choice(PAIRS), random)
        covered = sum(coverage(placed, SIZE) for placed in scene.objects)
        assert covered.max() <= 1, "no pixel is covered twice"
        assert covered[0].max() == covered[-1].max() == 0
        assert covered[:, 0].max() == covered[:, -1].max() == 0


def test_captions_name_things_in_order():
    pair = (Thing("circle", "red"), Thing("square", "blue"))
    assert caption(pair) == "a red circle and a blue square"
    assert caption(pair, coloured=False) == "a circle and a square"


def test_an_unknown_shape_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="circle, square"):
        outline("hexagon")


def test_the_detector_is_right_on_held_out_pictures():
    random = Random(2024)
    right = total = 0
    for i in range(400):
        things = [random.choice(THINGS)] if i % 2 else list(random.choice(PAIRS))
        seen = {(d.shape, d.colour) for d in detect(render(place(things, random)))}
        right += seen == {(thing.shape, thing.colour) for thing in things}
        total += 1
    assert right / total >= 0.98


def test_the_detector_bears_with_the_blur_of_a_decoder():
    random = Random(7)
    right = 0
    for _ in range(200):
        things = random.choice(PAIRS)
        picture = render(place(things, random)).filter(ImageFilter.GaussianBlur(1.5))
        right += judge(picture, things).bound == (True, True)
    assert right / 200 >= 0.98


def test_touching_objects_of_two_colours_are_two_objects():
    picture = Image.new("RGB", (SIZE, SIZE), (235,) * 3)
    picture.paste((214, 40, 46), (20, 40, 60, 80))
    picture.paste((42, 88, 208), (60, 40, 100, 80))
    assert [(d.shape, d.colour) for d in detect(picture)] == [("square", "red"), ("square", "blue")]


def test_a_verdict_counts_what_nobody_asked_for():
    asked = (Thing("circle", "red"), Thing("square", "blue"))
    shown = [Thing("circle", "green"), Thing("star", "yellow")]
    verdict = judge(render(place(shown, Random(1))), asked)
    assert verdict.drawn == (True, False)
    assert verdict.bound == (False, False)
    assert verdict.junk == 1


def test_every_shape_is_told_from_every_other():
    for shape in SHAPES:
        picture = render(place([Thing(shape, "green")], Random(4)))
        assert [d.shape for d in detect(picture)] == [shape]
