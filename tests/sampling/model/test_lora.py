"""LoRAs: how they are named, where they come from, and what they add to a model's weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.errors import ModelError, SettingsError
from aae_batch.sampling.model.loading import load_pipeline
from aae_batch.sampling.model.lora import Lora, parse_loras
from aae_batch.sampling.model.weights import lora_digests
from tests.conftest import small_pipeline
from tests.hub import COMMIT, MODEL, Hub
from tests.loras import changes, save_lora
from tests.pipelines import PIPELINES

MODELS = {"SD1": small_pipeline, **PIPELINES}


@pytest.mark.parametrize(
    ("text", "name", "scale"),
    [
        ("owner/name", "owner/name", 1.0),
        ("owner/name:0.8", "owner/name", 0.8),
        ("owner/name:-1", "owner/name", -1.0),
        (" owner/name@v1:1e-1 ", "owner/name@v1", 0.1),
        ("s3://bucket/folder", "s3://bucket/folder", 1.0),
        ("s3://bucket/folder:0.5", "s3://bucket/folder", 0.5),
        ("http://host:9000/a.safetensors", "http://host:9000/a.safetensors", 1.0),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:2", r"C:\loras\a.safetensors", 2.0),
        ("C:/loras/a", "C:/loras/a", 1.0),
        ("./a:b:1", "./a:b", 1.0),
    ],
)
def test_a_colon_begins_a_scale_unless_a_slash_follows(text, name, scale):
    lora = Lora.parse(text)
    assert (lora.id, lora.scale) == (name, scale)
    assert Lora.parse(str(lora)) == lora


@pytest.mark.parametrize("text", ["", ":1", "a/b:", "a/b:strong", "a/b:nan", "a/b:inf", "a/b:1:x"])
def test_a_malformed_lora_is_refused(text):
    with pytest.raises(SettingsError, match=r"finite number .* for example owner/name:0\.8\.$"):
        Lora.parse(text)


def test_a_lora_is_named_once():
    with pytest.raises(SettingsError, match="'a/b' is named twice"):
        parse_loras(["a/b:1", "c/d", "a/b:2"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small_pipeline().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return save_lora(small_pipeline(), tmp_path_factory.mktemp("lora"))


def weights(pipe, part: str) -> dict[str, torch.Tensor]:
    return getattr(pipe, part).state_dict()


def assert_added(before: dict, after: dict, added: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys(), "no layer is left over"
    assert added.keys() <= before.keys()
    for name, weight in before.items():
        if name in added:
            assert not torch.allclose(after[name], weight, atol=1e-3), name
            torch.testing.assert_close(after[name], weight + added[name], msg=name)
        else:
            assert torch.equal(after[name], weight), name


@pytest.mark.parametrize("family", ["SD1", "SDXL", "SD3", "FLUX-dev", "Chroma"])
def test_a_lora_is_added_to_the_weights_times_its_scale(family, tmp_path):
    MODELS[family]().save_pretrained(tmp_path / "model")
    part = "unet" if family in ("SD1", "SDXL") else "transformer"
    file = save_lora(MODELS[family](), tmp_path / "lora", (part,))
    before = weights(load_pipeline(str(tmp_path / "model")), part)
    after = weights(load_pipeline(str(tmp_path / "model"), lora=[f"{tmp_path}/lora:0.5"]), part)
    added = changes(file, part)
    assert_added(before, after, {name: 0.5 * change for name, change in added.items()})


def test_loras_add_up_in_every_network_that_they_change(folder, lora, tmp_path):
    other = save_lora(small_pipeline(), tmp_path, ("unet", "text_encoder"), seed=1)
    before = load_pipeline(folder)
    after = load_pipeline(folder, lora=[str(lora), f"{tmp_path}:-2"])
    one, two = changes(lora, "unet"), changes(other, "unet")
    sums = {name: one[name] - 2 * two[name] for name in one}
    assert_added(weights(before, "unet"), weights(after, "unet"), sums)
    text = {name: -2 * change for name, change in changes(other, "text_encoder").items()}
    assert_added(weights(before, "text_encoder"), weights(after, "text_encoder"), text)


def test_loras_of_quantised_weights_stay_beside_them_and_are_guided(folder, lora, monkeypatch):
    """Weights that only say that they are quantised, so that the sums can be compared."""
    fused = load_pipeline(folder, lora=[f"{lora}:0.5"])
    monkeypatch.setattr("aae_batch.sampling.model.lora.is_quantized", lambda network: True)
    beside = load_pipeline(folder, lora=[f"{lora}:0.5"])
    assert beside.get_active_adapters() == ["lora_0"]
    one, other, plain = (final_latents(pipe) for pipe in (fused, beside, load_pipeline(folder)))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(one, plain, rtol=1e-2, atol=1e-2)


def final_latents(pipe) -> torch.Tensor:
    config = GuidanceConfig(num_inference_steps=2, max_iter_to_alter=1, thresholds={})
    (result,) = Engine.from_pipeline(pipe).generate([Request("a star", token_indices=[2])], config)
    return result.latents


# --- refusals ---


def test_without_peft_it_is_named(folder, lora, monkeypatch):
    monkeypatch.setattr("aae_batch.sampling.model.lora.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"^A LoRA needs peft: pip install --upgrade peft\.$"):
        load_pipeline(folder, lora=[str(lora)])
    assert load_pipeline(folder)


def test_a_missing_lora_is_told_as_such(folder, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="does not exist; check the path"):
        load_pipeline(folder, lora=[f"{tmp_path}/nowhere:0.5"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'someone/some-lora' is not here .* check the network"):
        load_pipeline(folder, lora=["someone/some-lora"])


def test_a_folder_has_one_safetensors_file(folder, lora, tmp_path):
    (tmp_path / "pytorch_lora_weights.bin").touch()
    with pytest.raises(ModelError, match="has no safetensors file, and pickled weights"):
        load_pipeline(folder, lora=[str(tmp_path)])
    shutil.copy(lora, tmp_path / "one.safetensors")
    load_pipeline(folder, lora=[str(tmp_path)])
    shutil.copy(lora, tmp_path / "two.safetensors")
    with pytest.raises(
        ModelError, match=r"2 safetensors files .*name one, as /.*/one\.safetensors"
    ):
        load_pipeline(folder, lora=[str(tmp_path)])
    load_pipeline(folder, lora=[f"{tmp_path}/two.safetensors"])


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("SDXL", "its weights have other sizes"),
        ("FLUX-dev", "none of its weights has a place in it"),
    ],
)
def test_a_lora_for_another_model_is_refused(family, said, lora, tmp_path):
    MODELS[family]().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"is not for this model, a .*Pipeline: {said}; use one"):
        load_pipeline(str(tmp_path), lora=[str(lora)])


def test_a_file_that_is_no_lora_is_refused(folder, lora, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="is not for this model"):
        load_pipeline(folder, lora=[f"{tmp_path}/a.safetensors"])
    with pytest.raises(ModelError, match="is not for this model"):
        load_pipeline(folder, lora=[f"{folder}/vae"])


def test_a_control_lora_is_refused(tmp_path):
    """It replaces the layer that takes the latents by one that takes an image too."""
    PIPELINES["FLUX-dev"]().save_pretrained(tmp_path / "model")
    tensors = load_file(save_lora(PIPELINES["FLUX-dev"](), tmp_path, ("transformer",)))
    tensors["transformer.x_embedder.lora_A.weight"] = torch.ones(2, 32)
    tensors["transformer.x_embedder.lora_B.weight"] = torch.ones(16, 2)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ModelError, match="it is a control LoRA, which takes an image"):
        load_pipeline(str(tmp_path / "model"), lora=[str(tmp_path)])


def test_a_lora_with_numbers_that_are_not_finite_is_refused(folder, lora, tmp_path):
    tensors = load_file(lora)
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"cannot be added .* choose a smaller scale"):
        load_pipeline(folder, lora=[str(tmp_path)])


# --- where they come from, and what identifies them ---


def test_a_local_lora_is_identified_by_its_file(lora, tmp_path):
    shutil.copytree(lora.parent, tmp_path / "lora")
    name = str(tmp_path / "lora")
    before = lora_digests([name])
    assert lora_digests([f"{name}:0.5"]) == before
    (tmp_path / "lora" / "README.md").write_text("other words change nothing")
    assert lora_digests([name]) == before
    tensors = load_file(lora)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, tmp_path / "lora" / lora.name)
    assert lora_digests([name]) != before


def test_a_lora_in_an_object_store_is_a_folder_or_a_file(
    folder, lora, bucket, s3_server, tmp_path, monkeypatch
):
    monkeypatch.setenv("AAE_BATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    bucket.client.upload_file(str(lora), bucket.name, f"loras/a/{lora.name}")
    expected = weights(load_pipeline(folder, lora=[f"{lora}:0.5"]), "unet")
    for name in (f"{bucket.url}/loras/a", f"{bucket.url}/loras/a/{lora.name}"):
        found = weights(load_pipeline(folder, lora=[f"{name}:0.5"], s3_endpoint=s3_server), "unet")
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        before = lora_digests([name], s3_server)
        bucket.client.put_object(Bucket=bucket.name, Key="loras/a/README.md", Body=b"words")
        assert lora_digests([name], s3_server) == before
    bucket.client.put_object(Bucket=bucket.name, Key=f"loras/a/{lora.name}", Body=b"others")
    assert lora_digests([name], s3_server) != before
    with pytest.raises(ModelError, match=r"LoRA 's3://.*/nowhere' cannot be read: .*check the URL"):
        load_pipeline(folder, lora=[f"{bucket.url}/nowhere"], s3_endpoint=s3_server)


FROM_HUB = f"""
from aae_batch.errors import ModelError
from aae_batch.sampling.model.lora import Lora, lora_file, lora_version
for name in ("{MODEL}", "{MODEL}/more/b.safetensors", "{MODEL}@{COMMIT}", "{MODEL}/c.safetensors"):
    try:
        print(lora_version(Lora(name)), lora_file(Lora(name)).read_text())
    except ModelError as error:
        print(error)
"""


def test_a_lora_of_the_hub_is_identified_by_its_commit(tmp_path):
    (tmp_path / "repository" / "more").mkdir(parents=True)
    for name in ("README.md", "a.safetensors", "more/b.safetensors"):
        (tmp_path / "repository" / name).write_text(Path(name).stem)
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "AAE_BATCH_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }
    said = []
    with Hub(tmp_path / "repository") as hub:
        for changes in ({"HF_ENDPOINT": hub.url}, {"HF_HUB_OFFLINE": "1"}):
            result = subprocess.run(
                [sys.executable, "-c", FROM_HUB],
                env=environment | changes,
                capture_output=True,
                text=True,
                check=True,
            )
            said.append(result.stdout.splitlines())
        hub.shutdown()
        assert len(hub.fetched()) == 2
    online, offline = said
    assert online[:3] == offline[:3] == [f"{COMMIT} a", f"{COMMIT} b", f"{COMMIT} a"]
    assert "has no safetensors file" in online[3]
