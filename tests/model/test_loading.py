"""Loading real folders, and what is said when that fails."""

from __future__ import annotations

import json

import pytest
import torch

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.errors import ModelError, SettingsError
from aae_batch.model.loading import default_guidance, load_pipeline, load_tokenizer


@pytest.fixture(scope="module")
def folder(sd1_pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    sd1_pipeline.save_pretrained(path)
    return path


def test_a_folder_is_loaded_and_guided(folder):
    engine = Engine.from_pretrained(str(folder), slots=1)
    config = GuidanceConfig(num_inference_steps=2, max_iter_to_alter=1, thresholds={})
    (result,) = engine.generate([Request("a star", token_indices=[2])], config)
    assert result.image.size == (128, 128)


def test_the_tokenizer_alone_is_loaded(folder):
    assert load_tokenizer(str(folder))("a star").input_ids[1:-1] == [
        load_tokenizer(str(folder)).convert_tokens_to_ids(token) for token in ("a</w>", "star</w>")
    ]


def test_dtype_and_device_are_as_asked(folder):
    pipe = load_pipeline(str(folder), device="cpu", dtype="bfloat16")
    assert pipe.unet.dtype == torch.bfloat16
    assert load_pipeline(str(folder)).unet.dtype == torch.float32


def test_a_models_own_settings_are_its_defaults(folder):
    assert default_guidance(str(folder)) == GuidanceConfig()
    (folder / "guidance.json").write_text(json.dumps({"num_inference_steps": 30}))
    assert default_guidance(str(folder)).num_inference_steps == 30
    (folder / "guidance.json").unlink()


def test_a_missing_folder_is_told_as_such(tmp_path):
    with pytest.raises(ModelError, match=r"does not exist; check the path"):
        load_pipeline(str(tmp_path / "nowhere"))


def test_a_hub_that_cannot_be_reached_is_told_as_such(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'someone/some-model'.*(network|spelling)"):
        load_pipeline("someone/some-model")


def test_another_kind_of_pipeline_is_refused_before_its_weights_are_read(tmp_path):
    index = {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.30.0"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="StableDiffusionXLPipeline, which cannot be guided"):
        load_pipeline(str(tmp_path))


def test_pickled_weights_are_not_loaded(sd1_pipeline, tmp_path):
    sd1_pipeline.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ModelError, match="safetensors"):
        load_pipeline(str(tmp_path))


def test_unknown_dtype_and_device_are_named(folder):
    with pytest.raises(SettingsError, match="dtype 'float8'"):
        load_pipeline(str(folder), dtype="float8")
    with pytest.raises(SettingsError, match="Device 'tpu"):
        load_pipeline(str(folder), device="tpu:0")
