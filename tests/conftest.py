"""Small real pipelines with random weights, shaped like Stable Diffusion 1.x and 2.x, and an S3."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import uuid4

# The models of these tests are too small to share out, and threads that wait for each other on a busy
# machine take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from tests.any_storage import storage  # noqa: F401
from tests.faulty_proxy import FaultyProxy
from tests.small_job import (  # noqa: F401
    manifest,
    ray_here,
    settings,
    settings_in,
    tiny_pipeline_folder,
)
from tests.small_output import make_output  # noqa: F401
from training.networks import MAX_TOKENS, tokenizer

TEXT_WIDTH = 32

# The same examples every time, however slow the machine is; `--hypothesis-profile=default` finds others.
hypothesis.settings.register_profile("same", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("same")


def small_pipeline(
    *, seed: int = 0, version: int = 1, sample_size: int = 16
) -> StableDiffusionPipeline:
    """A pipeline with cross-attention at three levels and random weights, large enough that the
    attention maps differ from place to place and from word to word.

    Args:
        version: of Stable Diffusion; 2 is recognised by the width of its text encoder.
    """
    torch.manual_seed(seed)
    words = tokenizer()
    text_width = {1: TEXT_WIDTH, 2: 1024}[version]
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=text_width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="gelu" if version == 2 else "quick_gelu",
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 4, 4) if version == 2 else 2,
        use_linear_projection=version == 2,
        cross_attention_dim=text_width,
    )
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("attn2.to_q.weight", "attn2.to_k.weight")):
                parameter *= 3
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if version == 2 else "epsilon",
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=words,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


LONG = (
    "test_nodes.py",
    "test_object_store.py",
    "test_readme.py",
    "generate/test_driver.py",
    "test_cluster.py",
    "test_score.py",
    "test_plugin.py",
    "shapes/test_model.py",
    "test_cluster_files.py",
    "jobs/test_generate.py",
    "test_family.py",
)
"""Files that take long, though their tests are few. They begin first, so that at the end no process is left
alone with one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not str(item.path).endswith(LONG))


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """No test survives a power cut, and ten thousand small files that wait for the disk take minutes. That
    files do wait is seen in test_whole_file."""
    fsync, os.fsync = os.fsync, lambda handle: None
    yield
    os.fsync = fsync


@pytest.fixture(scope="session")
def sd1_pipeline() -> StableDiffusionPipeline:
    return small_pipeline(version=1)


@pytest.fixture(scope="session")
def sd2_pipeline() -> StableDiffusionPipeline:
    return small_pipeline(version=2)


# --- object storage ------------------------------------------------------------------------------

SECRET = "the-secret-that-nobody-may-see"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 on this machine, spoken to by HTTP."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@dataclass(frozen=True)
class Bucket:
    """An empty bucket, which the environment has credentials for, and boto3's client to look into it."""

    name: str
    endpoint: str
    client: object

    @property
    def url(self) -> str:
        return f"s3://{self.name}"


def set_credentials(patch: pytest.MonkeyPatch) -> None:
    """Credentials and retries by the environment, and by nothing else of this machine."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        patch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        patch.setenv(name, os.devnull)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_MAX_ATTEMPTS", "4")


@pytest.fixture
def aws(monkeypatch) -> None:
    set_credentials(monkeypatch)


@pytest.fixture(scope="session")
def s3_client(s3_server):
    import boto3

    session = boto3.session.Session("AKIATEST", SECRET, region_name="us-east-1")
    return session.client("s3", endpoint_url=s3_server)


@pytest.fixture
def bucket(s3_server, s3_client, aws, monkeypatch) -> Bucket:
    """One that `s3://` URLs lead to without further settings."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    name = f"bucket-{uuid4().hex[:12]}"
    s3_client.create_bucket(Bucket=name)
    return Bucket(name, s3_server, s3_client)


@pytest.fixture
def proxy(s3_server) -> Iterator[FaultyProxy]:
    """Before the S3 of `bucket`."""
    with FaultyProxy(s3_server) as proxy:
        yield proxy
