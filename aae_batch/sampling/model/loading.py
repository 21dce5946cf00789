"""Load a pipeline that can be guided from a hub id, a folder, a URL, or `"shapes"`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from aae_batch.errors import ModelError, OutputError, SettingsError
from aae_batch.methods import DEFAULT
from aae_batch.sampling.config import GuidanceConfig, SteeringSettings
from aae_batch.store.base import is_url
from aae_batch.store.fetch import fetch_folder, fetch_in_turn

EMBEDDED, EMBEDDED_FLOW = "shapes", "shapes-flow"
GUIDABLE = ("StableDiffusionPipeline", "StableDiffusionAttendAndExcitePipeline")
"""Pipeline classes (`_class_name` in `model_index.json`) with Stable Diffusion's components."""

GUIDANCE_FILE = "guidance.json"
"""File beside `model_index.json` with the `GuidanceConfig` values that suit the model best."""

MODEL_FILES = (".json", ".safetensors", ".txt")
"""Extensions of the files read from a model folder."""

_SMALL_FILES = (".json", ".txt")
"""Those of `MODEL_FILES` that are not weights."""


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
        model: a hub id such as `stable-diffusion-v1-5/stable-diffusion-v1-5`; a folder in
            diffusers' layout, local or in an object store (`s3://bucket/folder`, or any scheme of
            fsspec); or `"shapes"` for the model in this package.
        revision: branch, tag or commit on the hub.
        device: `auto` (CUDA, else MPS, else CPU) or a torch device.
        dtype: `auto` (bfloat16 or float16 on CUDA, else float32), `float32`, `float16`, `bfloat16`
            or `float64`.
        s3_endpoint: URL of the S3-compatible store that holds the model.

    Raises:
        ModelError: the model does not exist or cannot be guided.
        SettingsError: the device or dtype is unknown or unavailable.
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
    """Return a model's name for display; explains what `"shapes"` is."""
    if model != EMBEDDED:
        return model
    return f"{model}, the small one in this package, which draws coloured shapes; --model names another"


def load_tokenizer(model: str, *, revision: str | None = None, s3_endpoint: str | None = None):
    """Load only a model's tokenizer, which suffices to check prompts and subjects. Does not need
    torch.

    Raises:
        ModelError: the model does not exist or has no CLIP tokenizer.
    """
    from transformers import CLIPTokenizer

    folder = _guidable(model, revision, s3_endpoint, weights=False)
    with explained(model, folder):
        return CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")


def load_vae_scale_factor(
    model: str, *, revision: str | None = None, s3_endpoint: str | None = None
) -> int:
    """Return pixels per latent cell, from the VAE's configuration; 8 if it has none."""
    from diffusers import AutoencoderKL

    source = source_of(model, s3_endpoint, weights=False)
    folder = _here(model, source, revision, weights=False)
    try:
        config = AutoencoderKL.load_config(folder, subfolder="vae")
    except (OSError, ValueError):
        return 8
    return 2 ** (len(config["block_out_channels"]) - 1)


def default_guidance(model: str, s3_endpoint: str | None = None) -> GuidanceConfig:
    """Return the model's own settings if its folder has `guidance.json`, else the paper's.

    Raises:
        ModelError: `guidance.json` cannot be read or is invalid.
    """
    file = Path(source_of(model, s3_endpoint, weights=False)) / GUIDANCE_FILE
    try:
        given = json.loads(file.read_text()) if file.is_file() else {}
        # Steering that is given for no method is Attend-and-Excite's, as when that was the only one.
        steering = {
            name: given.pop(name) for name in SteeringSettings.model_fields if name in given
        }
        by_method = {DEFAULT: steering} | given.pop("by_method", {}) if steering else {}
        return GuidanceConfig(**given, **({"by_method": by_method} if by_method else {}))
    except OSError as error:
        raise ModelError(f"Model {model!r}: cannot read {file}: {error.strerror}.") from error
    except (ValueError, TypeError) as error:  # no JSON, or not an object
        raise ModelError(f"Model {model!r}: {file} is not a JSON object: {error}.") from error
    except SettingsError as error:
        raise ModelError(f"Model {model!r}: {file} does not fit: {error}") from error


def source_of(model: str, s3_endpoint: str | None = None, weights: bool = True) -> str:
    """Return where to load a model from: `model` as given, the embedded model's folder, or the
    local copy of a model in an object store.

    Args:
        weights: also copy the weights.

    Raises:
        ModelError: the object store has no such model or cannot be read.
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
    """Return the local folder with a model's files, fetched if necessary. Weights are fetched only
    after the model's index shows that it can be guided.

    Raises:
        ModelError: the model does not exist or cannot be guided.
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
    """Return the local folder of a model, downloaded once per machine if it comes from the hub. An
    earlier download is used if the hub cannot be reached.

    Raises:
        ModelError: the hub has no such model, or cannot be reached and the model is not cached.
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
    """True if the hub was busy or unreachable, False if it has no such model."""
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
    """Turn the long errors of the hub's client, transformers and diffusers into one-sentence
    `ModelError`s."""
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
            f"Model {model!r} was not found: it is neither a local folder nor a hub id that you can "
            "access; check the spelling, or log in with `hf auth login` if it is private or gated."
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
