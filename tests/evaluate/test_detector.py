from __future__ import annotations

import pytest

from aae_batch.evaluate.detector import OpenVocabularyDetector, ShapesDetector, thing_of
from aae_batch.shapes.detector import judge
from aae_batch.shapes.world import Thing
from tests.evaluate.conftest import drawn, row

PROMPT = "a red circle and a blue square"
PICTURES = {
    "both": ("red circle", "blue square"),
    "one": ("red circle",),
    "other colours": ("yellow circle", "blue square"),
    "none": ("green star",),
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shown", PICTURES.values(), ids=PICTURES)
def test_shapes_are_found_as_the_embedded_detector_judges(shown, seed):
    image = drawn(*shown, seed=seed)
    (score,) = ShapesDetector().score([row(PROMPT, ["circle", "square"])], [image], {})
    verdict = judge(image, [Thing("circle", "red"), Thing("square", "blue")])
    assert score["found"] == list(verdict.drawn)
    assert score["bound"] == list(verdict.bound)
    assert score["subjects_named"] == 2
    assert score["subjects_found"] == sum(verdict.drawn)
    assert score["all_found"] is all(verdict.drawn)
    assert score["all_bound"] is all(verdict.bound)
    assert score["other_objects"] == verdict.junk
    assert [value > 0.72 for value in score["scores"]] == score["found"]


def test_a_wrong_colour_is_found_and_not_bound():
    image = drawn(*PICTURES["other colours"])
    (score,) = ShapesDetector().score([row(PROMPT, ["circle", "square"])], [image], {})
    assert (score["all_found"], score["bound"]) == (True, [False, True])


def test_subjects_that_only_the_token_indices_name_are_looked_for():
    attention = {"a": [{"subject": "circle"}, {"subject": "square"}]}
    (score,) = ShapesDetector().score([row(PROMPT)], [drawn(*PICTURES["both"])], attention)
    assert score["found"] == [True, True]


def test_what_is_no_shape_of_the_world_is_not_judged():
    (score,) = ShapesDetector().score([row("a dog", ["dog"])], [drawn("red circle")], {})
    assert set(score.values()) == {None}


def test_without_subjects_there_is_nothing_to_find():
    (score,) = ShapesDetector().score([row("a circle")], [drawn("red circle")], {})
    assert (score["subjects_named"], score["all_found"], score["found"]) == (0, None, [])


@pytest.mark.parametrize(
    ("subject", "phrase", "thing"),
    [
        ("circle", "a red circle", Thing("circle", "red")),
        ("red circle", "a blue square", Thing("circle", "red")),
        ("circle", "a circle", Thing("circle", "")),
        ("circle", "a circle on a red square", Thing("circle", "")),
        ("square", "a blue circle on a red square", Thing("square", "red")),
        ("Circle", "A Red Circle.", Thing("circle", "red")),
        ("dog", "a red dog", None),
    ],
)
def test_a_subject_has_the_colour_that_its_phrase_gives_it(subject, phrase, thing):
    assert thing_of(subject, phrase) == thing


@pytest.fixture(scope="module")
def owl(judges) -> OpenVocabularyDetector:
    metric = OpenVocabularyDetector(judges.detector, threshold=0.5)
    metric.load("cpu", "float32")
    return metric


def direct_scores(folder: str, image, texts: list[str]) -> list[float]:
    """The best box of each text, by the model's own processor, one picture at a time."""
    import torch
    from transformers import Owlv2ForObjectDetection, Owlv2Processor

    processor = Owlv2Processor.from_pretrained(folder)
    model = Owlv2ForObjectDetection.from_pretrained(folder).eval()
    inputs = processor(text=[texts], images=image, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0].sigmoid().max(dim=0).values.tolist()


def test_the_best_box_of_each_subject_is_that_of_a_direct_computation(owl, judges):
    rows = [row(PROMPT, ["circle", "square"]), row("a green star", ["star"]), row("a cross")]
    images = [drawn(*PICTURES["both"]), drawn("green star"), drawn("red cross")]
    scores = owl.score(rows, images, {})
    asked = [["a photo of a red circle", "a photo of a blue square"], ["a photo of a green star"]]
    for score, image, texts in zip(scores[:2], images[:2], asked, strict=True):
        expected = direct_scores(judges.detector, image, texts)
        assert score["scores"] == pytest.approx(expected, abs=1e-5)
        assert score["found"] == [value >= 0.5 for value in expected]
        assert score["subjects_found"] == sum(score["found"])
    assert scores[2]["scores"] == []
    assert scores[2]["all_found"] is None


def test_the_threshold_decides_and_the_scores_stay(owl, judges):
    rows, images = [row(PROMPT, ["circle", "square"])], [drawn(*PICTURES["both"])]
    (score,) = owl.score(rows, images, {})
    for threshold, found in [(0.0, True), (1.0, False)]:
        other = OpenVocabularyDetector(judges.detector, threshold)
        other.load("cpu", "float32")
        (again,) = other.score(rows, images, {})
        assert again["scores"] == score["scores"]
        assert again["all_found"] is found
