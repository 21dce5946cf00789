"""A model of the hub: fetched once by a machine, however many ask, and then without the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.hub import COMMIT, MODEL, Hub

LOAD = f"""
import aae_batch.store.fetch as fetch
fetch.WAITS = (0.2,) * 5
from aae_batch.sampling.model.loading import load_pipeline
print(type(load_pipeline({MODEL!r})).__name__)
"""


@pytest.fixture
def hub(sd1_pipeline, tmp_path) -> Iterator[Hub]:
    sd1_pipeline.save_pretrained(tmp_path / "model")
    with Hub(tmp_path / "model") as hub:
        yield hub


@pytest.fixture
def load(hub, tmp_path):
    """Start a process that loads the model on a machine with an empty cache."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "AAE_BATCH_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)

    def load(**changes: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", LOAD],
            env={**environment, **changes},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return load


def outcome(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    return out.strip() or err


@pytest.mark.slow
def test_weights_are_fetched_once_from_a_busy_hub_and_used_when_it_is_gone(hub, load):
    hub.refuse = 4
    started = [load(), load()]
    assert [outcome(one) for one in started] == ["StableDiffusionPipeline"] * 2
    assert hub.refuse == 0
    names = [name for name in hub.files() if name.endswith(".safetensors")]
    assert len(names) == 3, "UNet, VAE and text encoder"
    assert sorted(hub.fetched()) == sorted(f"GET /{MODEL}/resolve/{COMMIT}/{n}" for n in names)
    hub.shutdown()
    hub.server_close()
    assert outcome(load()) == "StableDiffusionPipeline"


def test_a_model_that_the_hub_does_not_have_is_asked_for_once(hub, load):
    hub.folder = hub.folder / "unet"
    assert "ModelError" in outcome(load())
    assert not hub.fetched()


def test_a_model_with_weights_of_a_variant_only_is_told_with_the_option(hub, load):
    for file in hub.files().values():
        if file.suffix == ".safetensors":
            file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert "only weights of the variant fp16; add --variant fp16." in outcome(load())
