"""What a result does with its image."""

from __future__ import annotations

import pickle

import numpy as np
import PIL.Image
import pytest

from aae_batch.errors import NonFiniteError
from aae_batch.request import Request, Result

PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def test_the_image_of_pixels_is_made_once_when_it_is_first_asked_for(monkeypatch):
    made, make = [], PIL.Image.fromarray
    monkeypatch.setattr(PIL.Image, "fromarray", lambda one: made.append(1) or make(one))
    result = Result(Request("a star"), image=PIXELS)
    assert not made
    assert result.image.size == (3, 2)
    assert np.array_equal(np.asarray(result.image), PIXELS)
    assert len(made) == 1


@pytest.mark.parametrize("asked_for", [False, True])
def test_a_result_can_be_pickled_before_and_after_its_image_is_made(asked_for):
    result = Result(Request("a star"), image=PIXELS)
    if asked_for:
        assert result.image is not None
    image = pickle.loads(pickle.dumps(result)).image
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), PIXELS)


def test_an_image_is_given_back_as_it_is():
    image = PIL.Image.new("RGB", (3, 2))
    assert Result(Request("a star"), image).image is image


def test_a_failed_result_has_no_image():
    result = Result(Request("a star"), error=NonFiniteError("a star", "NaN"))
    assert result.image is None
