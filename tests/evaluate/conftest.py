"""Small real judges with random weights, and pictures of the world of shapes."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from PIL.Image import Image

from aae_batch.shapes.world import Thing
from training.networks import tokenizer
from training.pictures import place, render

TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
VISION = TEXT | {"image_size": 32, "patch_size": 16}
HEADS = {"num_attention_heads": 2}


def drawn(*names: str, seed: int = 0) -> Image:
    """A picture of things such as "red circle"."""
    things = [Thing(*reversed(name.split())) for name in names]
    return render(place(things, Random(seed)))


def row(prompt: str, subjects: list[str] | None = None, **values) -> dict:
    """A row of the metadata table, as far as metrics read it."""
    return {"id": "a", "prompt": prompt, "subjects": subjects, **values}


def _text_config(words, longest: int = 32) -> dict:
    return {
        **TEXT,
        **HEADS,
        "vocab_size": len(words),
        "max_position_embeddings": longest,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def _processor(folder: Path, kind: str, **values) -> None:
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": kind, **values})
    )


@pytest.fixture(scope="session")
def judges(tmp_path_factory) -> SimpleNamespace:
    """Folders of a CLIP model, a captioning one and an open-vocabulary detector."""
    root = tmp_path_factory.mktemp("judges")
    return SimpleNamespace(
        clip=str(_clip(root / "clip")),
        captioner=str(_captioner(root / "captioner")),
        detector=str(_detector(root / "detector")),
    )


def _clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(1)
    words = tokenizer()
    config = CLIPConfig(
        text_config=_text_config(words), vision_config=VISION | HEADS, projection_dim=16
    )
    model = CLIPModel(config)
    _spread(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    _processor(folder, "CLIPImageProcessor", **size)
    return folder


def _captioner(folder: Path) -> Path:
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

    torch.manual_seed(0)
    folder.mkdir()
    listed = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "blue", "circle"]
    vocabulary = {word: i for i, word in enumerate([*listed, "square", "and", "picture", "of"])}
    words = BertTokenizer(vocab=vocabulary, bos_token="[DEC]")
    text = _text_config(words) | {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.sep_token_id,
        "sep_token_id": words.sep_token_id,
        "encoder_hidden_size": 16,
        "projection_dim": 16,
        "is_decoder": True,
    }
    config = BlipConfig(
        text_config=text,
        vision_config=VISION | HEADS | {"projection_dim": 16},
        projection_dim=16,
        image_text_hidden_size=16,
    )
    model = BlipForConditionalGeneration(config)
    _spread(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    _processor(folder, "BlipImageProcessor", size={"height": 32, "width": 32})
    return folder


def _detector(folder: Path) -> Path:
    from transformers import Owlv2Config, Owlv2ForObjectDetection

    torch.manual_seed(0)
    words = tokenizer()
    config = Owlv2Config(
        text_config=_text_config(words), vision_config=VISION | HEADS, projection_dim=16
    )
    model = Owlv2ForObjectDetection(config)
    _spread(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    _processor(folder, "Owlv2ImageProcessor", size={"height": 32, "width": 32})
    return folder


def _spread(model: torch.nn.Module) -> None:
    """Weights large enough that what goes in shows in what comes out."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
