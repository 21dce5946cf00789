"""A hub id, a folder here or in an object store, or "shapes" -> a pipeline that can be guided."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from aae_batch.errors import ModelError, OutputError, SettingsError
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.store.base import is_url
from aae_batch.store.fetch import fetch_folder, fetch_in_turn

EMBEDDED = "shapes"
GUIDABLE = ("StableDiffusionPipeline", "StableDiffusionAttendAndExcitePipeline")
"""Pipeline classes, as a model's index names them, whose parts are those of Stable Diffusion."""

GUIDANCE_FILE = "guidance.json"
"""Beside `model_index.json`: the values of `GuidanceConfig` that suit the model best."""

MODEL_FILES = (".json", ".safetensors", ".txt")
"""The files of a folder that are read."""

_SMALL_FILES = (".json", ".txt")
"""Those of them that are not weights."""


def load_pipeline(
    model: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    s3_endpoint: str | None = None,
):
    """Load a `StableDiffusionPipeline`, from safetensors only, ready to sample.

    Args:
        model: a hub id such as `stable-diffusion-v1-5/stable-diffusion-v1-5`, a folder in
            diffusers' layout, here or in an object store (`s3://bucket/folder`, or any scheme of
            fsspec), or `"shapes"` for the model in this package.
        revision: branch, tag or commit on the hub.
        device: `auto` (CUDA, else MPS, else CPU) or a torch device.
        dtype: `auto` (bfloat16 or float16 on CUDA, else float32), `float32`, `float16`,
            `bfloat16` or `float64`.
        s3_endpoint: URL of an S3-compatible store, for a model that lies there.

    Raises:
        ModelError: there is no such model, or it cannot be guided.
        SettingsError: device or dtype is unknown or not available.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    place = torch_device(device)
    precision = torch_dtype(dtype, place)
    folder = _guidable(model, revision, s3_endpoint)
    with explained(model, folder):
        pipe = StableDiffusionPipeline.from_pretrained(
            folder,
            dtype=precision,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe.to(place)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        raise ModelError(f"Model {model!r} does not fit on {place}: {error}") from error


def named(model: str) -> str:
    """How a model is called where a person reads which one is used."""
    if model != EMBEDDED:
        return model
    return f"{model}, the small one in this package, which draws coloured shapes; --model names another"


def load_tokenizer(model: str, *, revision: str | None = None, s3_endpoint: str | None = None):
    """Only the tokenizer of a model: enough to check prompts and subjects, and no torch is needed.

    Raises:
        ModelError: there is no such model, or it has no CLIP tokenizer.
    """
    from transformers import CLIPTokenizer

    folder = _guidable(model, revision, s3_endpoint, weights=False)
    with explained(model, folder):
        return CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")


def load_vae_scale_factor(
    model: str, *, revision: str | None = None, s3_endpoint: str | None = None
) -> int:
    """Pixels to a cell of a model's latents, from the VAE's configuration; 8 where there is none."""
    from diffusers import AutoencoderKL

    source = source_of(model, s3_endpoint, weights=False)
    folder = _here(model, source, revision, weights=False)
    try:
        config = AutoencoderKL.load_config(folder, subfolder="vae")
    except (OSError, ValueError):
        return 8
    return 2 ** (len(config["block_out_channels"]) - 1)


def default_guidance(model: str, s3_endpoint: str | None = None) -> GuidanceConfig:
    """The model's own settings where its folder brings them (`guidance.json`), else the paper's.

    Raises:
        ModelError: that file cannot be read, or holds no such settings.
    """
    file = Path(source_of(model, s3_endpoint, weights=False)) / GUIDANCE_FILE
    try:
        return (
            GuidanceConfig(**json.loads(file.read_text())) if file.is_file() else GuidanceConfig()
        )
    except OSError as error:
        raise ModelError(f"Model {model!r}: cannot read {file}: {error.strerror}.") from error
    except (ValueError, TypeError) as error:  # no JSON, or not an object
        raise ModelError(f"Model {model!r}: {file} is not a JSON object: {error}.") from error
    except SettingsError as error:
        raise ModelError(f"Model {model!r}: {file} does not fit: {error}") from error


def source_of(model: str, s3_endpoint: str | None = None, weights: bool = True) -> str:
    """Where a model is loaded from: what was given, or the folder of the embedded model, or that
    into which a model from an object store was copied.

    Args:
        weights: whether they are needed, too.

    Raises:
        ModelError: the object store has no such model, or cannot be read.
    """
    if model == EMBEDDED:
        return str(files("aae_batch.shapes") / "weights")
    if not is_url(model):
        return model
    try:
        endings = MODEL_FILES if weights else _SMALL_FILES
        return str(fetch_folder(model, lambda name: name.endswith(endings), s3_endpoint))
    except OutputError as error:
        raise ModelError(str(error)) from None


def _guidable(
    model: str, revision: str | None, s3_endpoint: str | None, weights: bool = True
) -> str:
    """The folder of this machine with a model's files, fetched if need be: the weights once its index
    says that it can be guided.

    Raises:
        ModelError: there is no such model, or it cannot be guided.
    """
    from diffusers import DiffusionPipeline

    source = source_of(model, s3_endpoint, weights)
    looks_local = model == EMBEDDED or Path(model).is_absolute() or model.startswith((".", "~"))
    if looks_local and not Path(source).is_dir():
        raise ModelError(f"Model folder {model!r} does not exist; check the path.")
    folder = _here(model, source, revision, weights=False)
    with explained(model, folder):
        name = DiffusionPipeline.load_config(folder).get("_class_name")
    if name not in GUIDABLE:
        raise ModelError(
            f"Model {model!r} is a {name}, which cannot be guided; use a Stable Diffusion 1.x or 2.x "
            "text-to-image model (StableDiffusionPipeline)."
        )
    return _here(model, source, revision) if weights else folder


def _here(model: str, source: str, revision: str | None, weights: bool = True) -> str:
    """A model of the hub as the folder of this machine into which the hub's client fetches it, once,
    whoever asks. What is there already is used where the hub cannot be reached.

    Raises:
        ModelError: the hub has no such model, or cannot be reached and the model is not here.
    """
    if Path(source).is_dir():
        return source
    from diffusers import StableDiffusionPipeline
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        if not weights:
            small = [f"*{ending}" for ending in _SMALL_FILES]
            return snapshot_download(model, revision=revision, allow_patterns=small)
        return str(
            StableDiffusionPipeline.download(
                model, revision=revision, use_safetensors=True, safety_checker=None
            )
        )

    try:
        with explained(model, source):
            return fetch_in_turn(f"{model} {revision}", fetch, _may_pass)
    except OutputError as error:
        raise ModelError(str(error)) from None


def _may_pass(error: BaseException) -> bool:
    """Whether the hub was busy or out of reach, rather than without such a model."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status in (408, 429) or status >= 500
        # The hub's client has changed its HTTP library twice; they agree on these names.
        if {kind.__name__ for kind in type(cause).__mro__} & {"TransportError", "ConnectionError"}:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


@contextmanager
def explained(model: str, source: str) -> Iterator[None]:
    """What the hub's client, transformers or diffusers say in many sentences, as a `ModelError` of one."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ModelError(_why_unloadable(model, source, error)) from error


def _why_unloadable(model: str, source: str, error: Exception) -> str:
    text = str(error)
    if "safetensors" in text:
        return (
            f"Model {model!r} has no safetensors weights, and pickled ones are not loaded; convert it "
            "with pipe.save_pretrained(folder, safe_serialization=True), or take another revision."
        )
    if Path(source).is_dir():
        return f"Folder {model!r} is not a complete diffusers model: {_first_line(text)}"
    unknown = ("401", "404", "not a valid model identifier", "Repository Not")
    if any(sign in text for sign in unknown):
        return (
            f"There is no model {model!r}: it is neither a folder here nor an id that the hub shows "
            "you; check the spelling, or log in with `hf auth login` if it is private or gated."
        )
    return (
        f"Model {model!r} is not a folder here and the hub cannot be reached; check the network, or "
        f"give the path of a downloaded diffusers folder. ({_first_line(text)})"
    )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no details were given"


def torch_device(name: str):
    """`auto` (CUDA, else MPS, else CPU), or a torch device by name.

    Raises:
        SettingsError: it is unknown or not available.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"Device {name!r} cannot be used here ({_first_line(str(error))}); try 'auto' or 'cpu'."
        ) from error
    return device


def torch_dtype(name: str, device):
    """`auto` (bfloat16 or float16 on CUDA, else float32), or a torch dtype by name.

    Raises:
        SettingsError: it is unknown.
    """
    import torch

    known = ("float16", "bfloat16", "float32", "float64")
    if name in known:
        return getattr(torch, name)
    if name != "auto":
        raise SettingsError(f"dtype {name!r} is unknown; use auto, {', '.join(known)}.")
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
