"""Storms over a Ray and an S3 of their own, each in processes of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest

from tests.chaos.attacker import SECRET, Storm
from tests.small_job import tiny_pipeline_folder  # noqa: F401


@pytest.fixture(scope="session")
def s3_process() -> Iterator[str]:
    """The endpoint of an S3 that shares no process with who watches it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield url
        server.kill()


@pytest.fixture(scope="session")
def fake_model(tmp_path_factory) -> Path:
    """What the fake engine is given for a model."""
    folder = tmp_path_factory.mktemp("fake-model")
    settings = {"num_inference_steps": 4, "thresholds": {"1": 0.3}}
    index = {"_class_name": "StableDiffusionPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "guidance.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def raging(s3_process, fake_model, request, tmp_path_factory) -> Callable:
    """A context with a storm of a seed, on an engine."""

    @contextmanager
    def make(seed: int, engine: str = "fake") -> Iterator[Storm]:
        model = fake_model
        if engine == "real":
            model = request.getfixturevalue("tiny_pipeline_folder")
        client = boto3.session.Session("AKIATEST", SECRET, region_name="us-east-1").client(
            "s3", endpoint_url=s3_process
        )
        folder = tmp_path_factory.mktemp("storm")
        with Storm(folder, s3_process, client, model, seed, engine).raging() as storm:
            yield storm

    return make


@pytest.fixture
def seed(capsys) -> int:
    """As `AAE_BATCH_SEED` says, else a new one; in both cases it is printed."""
    value = int(os.environ.get("AAE_BATCH_SEED", int.from_bytes(os.urandom(4), "big")))
    with capsys.disabled():
        print(f"\nAAE_BATCH_SEED={value}")
    return value
