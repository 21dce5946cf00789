"""Loading real folders, and what is said when that fails."""

from __future__ import annotations

import json

import pytest
import torch

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.errors import ModelError, SettingsError
from aae_batch.sampling.model.loading import default_guidance, load_pipeline, load_streams
from aae_batch.sampling.model.weights import weights_digest


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
    (stream,) = load_streams(str(folder))
    assert stream.tokenizer("a star").input_ids[1:-1] == [
        stream.tokenizer.convert_tokens_to_ids(token) for token in ("a</w>", "star</w>")
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


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is not a JSON object"), ("[]", "is not a JSON object"), ('{"steps": 3}', "steps")],
)
def test_settings_of_a_model_that_do_not_fit_name_the_file(tmp_path, text, said):
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "guidance.json").write_text(text)
    with pytest.raises(ModelError, match=rf"guidance\.json .*{said}"):
        default_guidance(str(tmp_path))


def test_a_missing_folder_is_told_as_such(tmp_path):
    with pytest.raises(ModelError, match=r"does not exist; check the path"):
        load_pipeline(str(tmp_path / "nowhere"))


def test_a_hub_that_cannot_be_reached_is_told_as_such(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'someone/some-model'.*(network|spelling)"):
        load_pipeline("someone/some-model")


def test_another_kind_of_pipeline_is_refused_before_its_weights_are_read(tmp_path):
    index = {"_class_name": "KandinskyPipeline", "_diffusers_version": "0.30.0"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"a KandinskyPipeline, which cannot be guided; use .* FLUX"):
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


@pytest.fixture
def model_url(folder, bucket, tmp_path, monkeypatch):
    """The folder in an object store, with the endpoint unknown to the environment."""
    monkeypatch.setenv("AAE_BATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.client.upload_file(
                str(path), bucket.name, f"tiny/{path.relative_to(folder).as_posix()}"
            )
    return f"{bucket.url}/tiny"


def test_a_model_in_an_object_store_is_loaded_as_a_folder_is(model_url, folder, s3_server):
    there = load_pipeline(model_url, s3_endpoint=s3_server)
    here = load_pipeline(str(folder))
    for (name, one), other in zip(
        there.unet.named_parameters(), here.unet.parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_the_tokenizer_and_settings_of_a_model_in_an_object_store_need_no_weights(
    model_url, bucket, s3_server, tmp_path
):
    guidance = json.dumps({"num_inference_steps": 30}).encode()
    bucket.client.put_object(Bucket=bucket.name, Key="tiny/guidance.json", Body=guidance)
    (stream,) = load_streams(model_url, s3_endpoint=s3_server)
    assert stream.tokenizer("a star").input_ids
    assert default_guidance(model_url, s3_server).num_inference_steps == 30
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_changed_model_in_an_object_store_has_another_fingerprint(model_url, bucket, s3_server):
    before = weights_digest(model_url, s3_server)
    assert weights_digest(model_url, s3_server) == before
    bucket.client.put_object(Bucket=bucket.name, Key="tiny/unet/config.json", Body=b"{}")
    assert weights_digest(model_url, s3_server) != before


def test_a_missing_model_in_an_object_store_is_told_as_such(model_url, s3_server):
    for use in (load_pipeline, load_streams):
        with pytest.raises(ModelError, match=r"no model at s3://.*/nowhere: check the URL"):
            use(f"{model_url}/nowhere", s3_endpoint=s3_server)
    with pytest.raises(ModelError, match="no model at"):
        weights_digest(f"{model_url}/nowhere", s3_server)
