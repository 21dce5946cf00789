from __future__ import annotations

import ast
import pickle
from importlib.metadata import distribution

import pytest
import torch

from aae_batch.errors import ModelError, SettingsError
from aae_batch.evaluate.captions import CaptionsMetric
from aae_batch.evaluate.clip import ClipMetric
from aae_batch.evaluate.templates import IMAGENET_TEMPLATES, ensemble, filled
from aae_batch.job.records import Loaded
from tests.evaluate.conftest import drawn, row

PROMPT = "a red circle and a blue square"
OTHER = "a green star"


@pytest.fixture(scope="module")
def metric(judges) -> ClipMetric:
    metric = ClipMetric(judges.clip)
    assert metric.load("cpu", "auto") == Loaded("cpu", "float32")
    return metric


def direct_text(folder: str, texts: list[str]) -> torch.Tensor:
    """The mean of normalised embeddings, one text at a time and unpadded, of length one."""
    from transformers import CLIPModel, CLIPTokenizer

    model, words = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    vectors = []
    with torch.no_grad():
        for text in texts:
            tokens = words(text, return_tensors="pt")["input_ids"]
            vector = model.text_projection(model.text_model(tokens).pooler_output)[0]
            vectors.append(vector / vector.norm())
    mean = torch.stack(vectors).mean(dim=0)
    return mean / mean.norm()


def direct_image(folder: str, image) -> torch.Tensor:
    """Resized, normalised and embedded by hand."""
    import numpy as np
    from PIL.Image import Resampling
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    pixels = np.asarray(image.resize((32, 32), Resampling.BICUBIC), dtype=np.float32) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = torch.from_numpy((pixels - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)
    with torch.no_grad():
        vector = model.visual_projection(model.vision_model(pixels[None]).pooler_output)[0]
    return vector / vector.norm()


def test_there_are_eighty_templates_each_with_one_place():
    assert len(set(IMAGENET_TEMPLATES)) == 80
    assert all(template.count("{}") == 1 for template in IMAGENET_TEMPLATES)


def test_the_templates_are_clips_own():
    """As OpenCLIP's package has them, which is read and not imported: it would ask for torchvision."""
    package = distribution("open_clip_torch")
    source = package.locate_file("open_clip/zero_shot_metadata.py").read_text()
    (theirs,) = (
        statement.value.elts
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign)
        and statement.targets[0].id == "OPENAI_IMAGENET_TEMPLATES"
    )
    filled_in = [eval(ast.unparse(one))("frog") for one in theirs]
    assert [template.format("frog") for template in IMAGENET_TEMPLATES] == filled_in


@pytest.mark.parametrize("text", [PROMPT, "a red circle", "an orange", "cat"])
def test_a_text_is_put_into_templates_as_the_official_code_does(text):
    official = [template.format(text) for template in IMAGENET_TEMPLATES]
    assert ensemble(text) == [t.replace("a a", "a").replace("the a", "a") for t in official]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("apple", "a photo of the apple."),
        ("The cat", "a photo of The cat."),
        ("AN apple", "a photo of AN apple."),
        ("cat in the a cappella choir", "a photo of the cat in the a cappella choir."),
    ],
)
def test_a_templates_article_gives_way_to_the_texts_own_and_nothing_else_is_changed(text, expected):
    assert filled("a photo of the {}.", text) == expected


def test_similarities_are_those_of_a_direct_computation(metric, judges):
    image = drawn("red circle", "blue square")
    (score,) = metric.score([row(PROMPT, ["circle", "square"])], [image], {})
    seen = direct_image(judges.clip, image)
    of = {
        text: float(seen @ direct_text(judges.clip, ensemble(text)))
        for text in (PROMPT, "a red circle", "a blue square")
    }
    assert score["clip_full"] == pytest.approx(of[PROMPT], abs=1e-5)
    assert score["clip_min_subject"] == pytest.approx(
        min(of["a red circle"], of["a blue square"]), abs=1e-5
    )
    assert abs(of["a red circle"] - of["a blue square"]) > 1e-3


def test_scores_do_not_depend_on_the_batch_or_its_order(metric):
    rows = [row(PROMPT, ["circle", "square"]), row(OTHER, ["star"])]
    images = [drawn("red circle", "blue square"), drawn("green star")]
    together = metric.score(rows, images, {})
    alone = [metric.score([r], [image], {})[0] for r, image in zip(rows, images, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_a_row_without_subjects_has_no_minimum(metric):
    (score,) = metric.score([row(OTHER)], [drawn("green star")], {})
    assert score["clip_min_subject"] is None
    assert score["clip_full"] is not None


def test_a_text_that_is_too_long_is_cut(metric):
    (score,) = metric.score([row(" ".join([PROMPT] * 20))], [drawn("green star")], {})
    assert abs(score["clip_full"]) <= 1


@pytest.mark.parametrize("prefix", ["a picture of ", ""])
def test_captions_are_compared_with_the_prompt(judges, prefix):
    metric = CaptionsMetric(judges.captioner, judges.clip, prefix=prefix)
    metric.load("cpu", "float32")
    images = [drawn("red circle", "blue square"), drawn("green star")]
    scores = metric.score([row(PROMPT), row(OTHER)], images, {})
    for prompt, image, score in zip([PROMPT, OTHER], images, scores, strict=True):
        assert score["caption"] == direct_caption(judges.captioner, image, prefix)
        expected = direct_text(judges.clip, ensemble(prompt)) @ direct_text(
            judges.clip, [score["caption"]]
        )
        assert score["clip_caption"] == pytest.approx(float(expected), abs=1e-5)


def direct_caption(folder: str, image, prefix: str) -> str:
    """By the model's own processor, one picture at a time, cut as LAVIS cuts it."""
    from transformers import BlipForConditionalGeneration, BlipProcessor

    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)
    inputs = processor(images=image, text=prefix or None, return_tensors="pt")
    tokens = model.generate(**inputs, num_beams=3, max_length=30, min_length=10)
    text = processor.decode(tokens[0], skip_special_tokens=True)
    assert text.startswith(prefix)
    return text[len(prefix) :].strip()


def test_a_caption_goes_on_from_its_prefix(judges):
    metric = CaptionsMetric(judges.captioner, judges.clip, prefix="a picture of ")
    metric.load("cpu", "float32")
    captions = metric.captions([drawn("red circle")])
    metric.prefix = ""
    assert metric.captions([drawn("red circle")]) != captions


def test_a_metric_travels_to_an_actor_before_it_is_loaded(judges):
    metric = ClipMetric(judges.clip)
    assert pickle.loads(pickle.dumps(metric)) == metric


def _bert(folder) -> str:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def test_a_model_that_is_not_there_or_of_another_kind_is_named(judges, tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        ClipMetric(str(tmp_path / "none")).load("cpu", "float32")
    with pytest.raises(ModelError, match="not such a model in transformers' layout"):
        ClipMetric(str(tmp_path)).load("cpu", "float32")
    with pytest.raises(ModelError, match=r"lacks \d+ weights of a BlipModel"):
        ClipMetric(judges.captioner).load("cpu", "float32")
    with pytest.raises(ModelError, match="does not compare texts with images"):
        ClipMetric(_bert(tmp_path / "bert")).load("cpu", "float32")
    with pytest.raises(ModelError, match="not such a model in transformers' layout"):
        CaptionsMetric(judges.clip, judges.clip).load("cpu", "float32")
    with pytest.raises(SettingsError, match="dtype"):
        ClipMetric(judges.clip).load("cpu", "float12")
