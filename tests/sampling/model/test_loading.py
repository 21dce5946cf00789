"""Loading real folders, and what is said when that fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.errors import ModelError, SettingsError
from aae_batch.sampling.model.loading import (
    _placed,
    default_guidance,
    load_pipeline,
    load_streams,
)
from aae_batch.sampling.model.weights import weights_digest
from tests.conftest import small_pipeline
from tests.pipelines import PIPELINES


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
    with pytest.raises(
        ModelError, match=r"a KandinskyPipeline, which cannot be guided; use .* FLUX"
    ):
        load_pipeline(str(tmp_path))


def test_pickled_weights_are_not_loaded(sd1_pipeline, tmp_path):
    sd1_pipeline.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(
        ModelError, match=r"no safetensors weights in \w+, only .*\.bin, and pickled"
    ):
        load_pipeline(str(tmp_path))


UNET = "unet/diffusion_pytorch_model.safetensors"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def without_a_parameter(file: Path) -> None:
    weights = load_file(file)
    weights.pop(next(name for name in weights if name.endswith(("conv_out.weight", "fc1.weight"))))
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("tokenizer", shutil.rmtree, "has no vocabulary in tokenizer; copy"),
        ("unet", shutil.rmtree, r"has no unet/config\.json; copy"),
        ("scheduler", shutil.rmtree, r"has no scheduler/scheduler_config\.json; copy"),
        (UNET, Path.unlink, "has no weights in unet; copy"),
        (UNET, cut, rf"{UNET} is cut off or damaged"),
        ("text_encoder/model.safetensors", cut, r"text_encoder/model.safetensors is cut off"),
        (
            UNET,
            lambda file: file.write_text("version https://git-lfs.github"),
            "run `git lfs pull`",
        ),
        (UNET, without_a_parameter, r"weights of unet lack 1 parameters, such as conv_out\.weight"),
        (
            "text_encoder/model.safetensors",
            without_a_parameter,
            r"weights of text_encoder lack 1 parameters, such as .*layers\.0\.mlp\.fc1\.weight",
        ),
    ],
)
def test_a_broken_folder_is_told_by_the_part(folder, tmp_path, name, harm, said):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    harm(tmp_path / name)
    with pytest.raises(ModelError, match=said) as refused:
        load_pipeline(str(tmp_path))
    assert ". " not in str(refused.value)


def test_a_lora_that_was_left_in_is_told_with_how_to_save_it(tmp_path):
    pipe = small_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipe.save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"unet was saved with a LoRA attached.*unload_lora_weights"
    ):
        load_pipeline(str(tmp_path))


def test_a_single_file_is_told_with_how_to_convert_it(folder):
    with pytest.raises(ModelError, match=r"single file.*from_single_file\('.*safetensors'\)"):
        load_pipeline(str(folder / UNET))


@pytest.mark.parametrize("family", ["SDXL", "SD3", "FLUX-dev"])
def test_a_tokenizer_without_a_length_has_that_of_its_text_encoder(tmp_path, family):
    pipe = PIPELINES[family]()
    pipe.save_pretrained(tmp_path)
    before = [stream.length for stream in load_streams(str(tmp_path))]
    for file in tmp_path.glob("tokenizer*/tokenizer_config.json"):
        config = json.loads(file.read_text())
        config.pop("model_max_length", None)
        file.write_text(json.dumps(config))
    assert [stream.length for stream in load_streams(str(tmp_path))] == before
    engine = Engine.from_pretrained(str(tmp_path), slots=1)
    assert [stream.length for stream in engine.model.streams] == before
    assert engine.model.encode("a star", engine.defaults)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("shape", "did you mean 'shapes'?"),
        ("shapes-flw", "did you mean 'shapes-flow'?"),
        ("stable-diffusion-xl-base-1.0", "mean 'stabilityai/stable-diffusion-xl-base-1.0'?"),
        ("nonsense", "a hub id has an owner: owner/name."),
        ("my/folder/of/models", "folder 'my/folder/of/models' does not exist"),
        ("/nowhere/model.safetensors", "'/nowhere/model.safetensors' does not exist"),
    ],
)
def test_a_name_that_can_be_no_model_is_answered_before_the_hub_is_asked(monkeypatch, name, said):
    monkeypatch.setattr("aae_batch.sampling.model.loading.from_hub", None)
    with pytest.raises(ModelError) as refused:
        load_streams(name)
    assert said in str(refused.value)


def test_dtypes_and_devices_may_be_torch_s_own(folder):
    pipe = load_pipeline(str(folder), device=torch.device("cpu"), dtype=torch.bfloat16)
    assert (pipe.unet.dtype, pipe.unet.device) == (torch.bfloat16, torch.device("cpu"))


def test_libraries_are_quiet_while_they_load_and_as_before_afterwards(folder, capfd):
    import diffusers
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled

    def state() -> tuple:
        logs = (transformers.utils.logging, diffusers.utils.logging)
        return (
            [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs],
            are_progress_bars_disabled(),
        )

    before = state()
    load_pipeline(str(folder))
    assert state() == before
    assert capfd.readouterr().err == ""


def test_unknown_dtype_and_device_are_named(folder):
    with pytest.raises(SettingsError, match="dtype 'float8'"):
        load_pipeline(str(folder), dtype="float8")
    with pytest.raises(SettingsError, match="Device 'tpu"):
        load_pipeline(str(folder), device="tpu:0")


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_what_has_the_name_of_an_embedded_model_here_is_not_in_its_way(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "shapes")
    assert load_streams("shapes")


# --- variants, shards, quantised weights ---


def assert_same_weights(one, other) -> None:
    for name, network in one.components.items():
        if isinstance(network, torch.nn.Module):
            there = getattr(other, name).state_dict()
            assert network.state_dict().keys() == there.keys()
            for key, weight in network.state_dict().items():
                assert torch.equal(weight, there[key]), (name, key)


@pytest.fixture(scope="module")
def variant_folder(sd1_pipeline, tmp_path_factory):
    """The model and, as a variant, one with other weights."""
    path = tmp_path_factory.mktemp("variant")
    sd1_pipeline.save_pretrained(path)
    small_pipeline(seed=1).save_pretrained(path, variant="fp16")
    return path


def test_a_variant_is_loaded_if_it_is_asked_for(variant_folder, sd1_pipeline):
    assert_same_weights(sd1_pipeline, load_pipeline(str(variant_folder)))
    assert_same_weights(small_pipeline(seed=1), load_pipeline(str(variant_folder), variant="fp16"))


def test_a_missing_variant_is_told_with_those_that_are_there(variant_folder, folder, tmp_path):
    with pytest.raises(ModelError, match=r"variant 'ema'; give --variant fp16 or leave it out\.$"):
        load_pipeline(str(variant_folder), variant="ema")
    with pytest.raises(ModelError, match=r"no weights of the variant 'fp16'; leave it out\.$"):
        load_pipeline(str(folder), variant="fp16")
    small_pipeline().save_pretrained(tmp_path, variant="fp16")
    small_pipeline().save_pretrained(tmp_path, variant="ema")
    with pytest.raises(ModelError, match=r"of the variant ema or fp16; add --variant ema\.$"):
        load_pipeline(str(tmp_path))


def test_the_only_variant_is_loaded_unasked(variant_folder, tmp_path):
    shutil.copytree(variant_folder, tmp_path, dirs_exist_ok=True)
    for part in ("unet", "text_encoder"):
        (plain,) = (f for f in (tmp_path / part).glob("*.safetensors") if "fp16" not in f.name)
        plain.unlink()
    loaded = load_pipeline(str(tmp_path))
    assert_same_weights(small_pipeline(seed=1), loaded)


@pytest.mark.parametrize("variant", [None, "bf16"])
def test_weights_may_be_in_shards(tmp_path, variant):
    pipe = PIPELINES["FLUX-dev"]()
    pipe.save_pretrained(tmp_path, max_shard_size="30KB", variant=variant)
    for part in ("transformer", "text_encoder_2"):
        assert len(list((tmp_path / part).glob("*-of-*.safetensors"))) > 1
    assert_same_weights(pipe, load_pipeline(str(tmp_path), variant=variant))


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}']
)
def test_a_broken_index_of_shards_is_told(folder, tmp_path, content):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / f"{UNET}.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"unet/.*\.index\.json is damaged; copy or download it"):
        load_pipeline(str(tmp_path))


def test_only_the_index_of_the_variant_that_is_loaded_counts(tmp_path):
    pipe = PIPELINES["FLUX-dev"]()
    pipe.save_pretrained(tmp_path, max_shard_size="30KB", variant="fp16")
    index = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    plain = index.read_text().replace(".fp16", "")
    index.with_name(index.name.replace(".fp16", "")).write_text(plain)
    assert_same_weights(pipe, load_pipeline(str(tmp_path)))


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "torchao"}, r"quantised with torchao, .* pip install 'torchao', or"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "pip install 'bitsandbytes'"),
        ({"load_in_8bit": True}, "pip install 'bitsandbytes'"),
        ({"quant_method": "quanto"}, "pip install 'optimum-quanto'"),
        ({"quant_method": "unheard-of"}, "is quantised and cannot be loaded here: .*unheard-of"),
    ],
)
def test_quantised_weights_need_their_library(folder, tmp_path, monkeypatch, quantization, said):
    """They are refused before they are read."""
    monkeypatch.setattr("aae_batch.sampling.model.loading.find_spec", lambda name: None)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "unet" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": quantization}
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said) as refusal:
        load_pipeline(str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_quantised_weights_that_are_in_place_are_not_moved(sd1_pipeline):
    """bitsandbytes places them as it loads them, and cannot always move them."""

    class Quantised(torch.nn.Linear):
        hf_quantizer = "bitsandbytes"
        device = torch.device("meta")

        def to(self, *place):
            raise ValueError("`.to` is not supported for `8-bit` `bitsandbytes` models")

    pipe = SimpleNamespace(
        components={
            "unet": Quantised(1, 1),
            "vae": AutoencoderKL.from_config(sd1_pipeline.vae.config),
            "scheduler": sd1_pipeline.scheduler,
        }
    )
    assert _placed(pipe, torch.device("meta")) is pipe
    assert pipe.components["vae"].device.type == "meta"
    with pytest.raises(ValueError, match="not supported"):
        _placed(pipe, torch.device("cpu"))


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
