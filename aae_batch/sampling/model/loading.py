"""Load a pipeline that can be guided from a hub id, a folder, a URL, or `"shapes"`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from aae_batch.errors import ModelError, OutputError, SettingsError
from aae_batch.methods import DEFAULT
from aae_batch.quiet import quiet
from aae_batch.sampling.config import GuidanceConfig, SteeringSettings
from aae_batch.sampling.families import FAMILIES, Family, Reader, Sizes, why_not_guidable
from aae_batch.sampling.model.files import (
    check_files,
    no_safetensors,
    no_variant,
    only_variants,
    refuse_single_file,
    refuse_without_vocabulary,
    variants_in,
)
from aae_batch.sampling.words import Stream, Tokenizer
from aae_batch.store.base import expanded, is_url
from aae_batch.store.fetch import fetch_folder, fetch_in_turn

SHAPES_MODEL, SHAPES_FLOW_MODEL = "shapes", "shapes-flow"
EMBEDDED = {SHAPES_MODEL: "weights", SHAPES_FLOW_MODEL: "flow"}
"""The models in this package, and their folders in `aae_batch/shapes`: Stable Diffusion 1 and 3 in
miniature."""

GUIDANCE_FILE = "guidance.json"
"""File beside `model_index.json` with the `GuidanceConfig` values that suit the model best."""

MODEL_FILES = (".json", ".safetensors", ".txt", ".model")
"""Extensions of the files read from a model folder."""

_SMALL_FILES = (".json", ".txt", ".model")
"""Those of `MODEL_FILES` that are not weights."""

QUANTIZERS = {
    "auto-round": ("auto_round", "auto-round"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "bitsandbytes_4bit": ("bitsandbytes", "bitsandbytes"),
    "bitsandbytes_8bit": ("bitsandbytes", "bitsandbytes"),
    "gguf": ("gguf", "gguf"),
    "modelopt": ("modelopt", "nvidia-modelopt[hf]"),
    "quanto": ("optimum", "optimum-quanto"),
    "torchao": ("torchao", "torchao"),
}
"""Modules, and what to install, by the quantisation method in a network's configuration."""


def load_pipeline(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    lora: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    s3_endpoint: str | None = None,
):
    """Load a pipeline that can be guided, from safetensors only, ready to sample.

    Args:
        model: a hub id such as `stable-diffusion-v1-5/stable-diffusion-v1-5`; a folder in
            diffusers' layout, local or in an object store (`s3://bucket/folder`, or any scheme of
            fsspec); or `"shapes"` or `"shapes-flow"` for a model in this package.
        revision: branch, tag or commit on the hub.
        variant: which of the model's weights, e.g. `fp16` for files such as
            `model.fp16.safetensors`.
        lora: LoRAs to add to the weights, as `ID` or `ID:scale`; see
            `aae_batch.sampling.model.lora.Lora`.
        device: `auto` (CUDA, else MPS, else CPU) or a torch device.
        dtype: `auto` (bfloat16 or float16 on CUDA, else float32), `float32`, `float16`, `bfloat16`
            or `float64`.
        s3_endpoint: URL of the S3-compatible store that holds the model.

    Raises:
        ModelError: the model or a LoRA does not exist, the model cannot be guided or has no such
            variant, a LoRA is not for it, or a library that they need is missing.
        SettingsError: the device or dtype is unknown or unavailable, or a LoRA is malformed.
    """
    import diffusers
    import transformers  # noqa: F401 - so that it is quiet

    with quiet():
        return _load(diffusers, model, revision, variant, lora, device, dtype, s3_endpoint)


def _load(diffusers, model, revision, variant, lora, device, dtype, s3_endpoint):
    import torch

    from aae_batch.sampling.model.lora import add_loras, lora_file, parse_loras, refuse_without_peft

    model = expanded(model)
    place = torch_device(device)
    precision = torch_dtype(dtype, place)
    loras = parse_loras(lora)
    index = index_of(model, revision=revision, s3_endpoint=s3_endpoint)
    needs_quantizer = _refuse_without_quantizer(model, index)
    if loras:
        refuse_without_peft()
    lora_files = [lora_file(one, s3_endpoint) for one in loras]
    folder = _here(model, source_of(model, s3_endpoint), revision, variant=variant)
    variant = check_files(model, Path(folder), index.components, variant)
    with explained(model, folder, needs_quantizer):
        pipe = getattr(diffusers, _PLAIN.get(index.pipeline, index.pipeline)).from_pretrained(
            folder,
            dtype=precision,
            variant=variant,
            use_safetensors=True,
            **_without_checker(index.pipeline),
            **_text_encoders(model, index, Path(folder), variant, precision),
        )
    pipe.set_progress_bar_config(disable=True)
    _refuse_missing_parameters(model, pipe)
    _bound_tokenizers(pipe)
    if loras:
        add_loras(pipe, loras, lora_files)
    try:
        return _placed(pipe, place)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        raise ModelError(f"Model {model!r} does not fit on {place}: {error}") from error
    except ValueError as error:  # from bitsandbytes' models
        raise ModelError(
            f"Model {model!r} cannot be moved to {place}: {first_line(str(error))}"
        ) from error


def _refuse_missing_parameters(model: str, pipe) -> None:
    """Raise a ModelError if the weights lack some of a network's parameters, which diffusers leaves without
    data."""
    import torch

    for part, network in pipe.components.items():
        if isinstance(network, torch.nn.Module):
            _refuse_missing(
                model, part, [n for n, one in network.named_parameters() if one.is_meta]
            )


def _refuse_missing(model: str, part: str, missing: Sequence[str]) -> None:
    if missing:
        raise ModelError(
            f"Model {model!r}: the weights of {part} lack {len(missing)} parameters, such as "
            f"{missing[0]}; take those that belong to its config.json."
        )


def _text_encoders(
    model: str, index: Index, folder: Path, variant: str | None, precision: Any
) -> dict[str, Any]:
    """Load the text encoders as diffusers would, but those that are quantised.

    Raises:
        ModelError: their weights lack parameters, which transformers would fill at random.
    """
    import transformers

    loaded = {}
    for part, (library, kind) in index.components.items():
        is_plain = library == "transformers" and "quantization_config" not in index.config_of(part)
        if not (part.startswith("text_encoder") and is_plain):
            continue
        has_variant = any((folder / part).glob(f"*.{variant}*.safetensors"))
        loaded[part], found = getattr(transformers, kind).from_pretrained(
            folder / part,
            dtype=precision,
            variant=variant if has_variant else None,
            use_safetensors=True,
            output_loading_info=True,
        )
        _refuse_missing(model, part, missing_parameters(loaded[part], found))
    return loaded


def missing_parameters(network: Any, found: Mapping[str, Any]) -> list[str]:
    """Return the parameters that transformers did not find in a network's weights.

    Args:
        found: what transformers says of the loading (`output_loading_info`).
    """
    return sorted({*found["missing_keys"]} & {name for name, _ in network.named_parameters()})


def _bound_tokenizers(pipe) -> None:
    """Let no tokenizer of CLIP return more positions than its encoder has: some are saved without
    `model_max_length`."""
    for _, tokenizer, most in limits(pipe):
        tokenizer.model_max_length = most
    if hasattr(pipe, "tokenizer_max_length"):  # Stable Diffusion 3 and FLUX.1 keep it
        pipe.tokenizer_max_length = pipe.tokenizer.model_max_length


def limits(pipe) -> Iterator[tuple[str, Any, int]]:
    """Yield a pipeline's tokenizers by name, each with the number of positions that its encoder has."""
    for number in ("", "_2"):
        tokenizer = getattr(pipe, f"tokenizer{number}", None)
        config = getattr(getattr(pipe, f"text_encoder{number}", None), "config", None)
        if tokenizer is not None and config is not None:
            yield f"tokenizer{number}", tokenizer, most_positions(tokenizer, config.to_dict())


def most_positions(tokenizer: Any, encoder: Mapping[str, Any]) -> int:
    """Return the number of positions of a tokenizer whose text encoder has this configuration; T5's
    says nothing about it."""
    return min(tokenizer.model_max_length, encoder.get("max_position_embeddings", math.inf))


def is_quantized(network: Any) -> bool:
    """True for a network of diffusers or transformers whose weights are quantised."""
    return getattr(network, "hf_quantizer", None) is not None


def _placed(pipe, place):
    """Move a pipeline to a device. Leave what is there: bitsandbytes places the weights that it
    quantises, and some of its versions cannot move them."""
    import torch

    for network in pipe.components.values():
        if not isinstance(network, torch.nn.Module):
            continue
        there = network.device
        is_there = there.type == place.type and place.index in (None, there.index)
        if not (is_quantized(network) and is_there):
            network.to(place)
    return pipe


def _refuse_without_quantizer(model: str, index: Index) -> bool:
    """Return whether some of a model's weights are quantised.

    Raises:
        ModelError: they are, and the library that reads them is not installed.
    """
    methods = {}
    for component in index.components:
        quantization = index.config_of(component).get("quantization_config")
        if isinstance(quantization, dict):
            # bitsandbytes' first configurations do not name it
            methods[component] = str(quantization.get("quant_method", "bitsandbytes"))
    for component, method in methods.items():
        module, package = QUANTIZERS.get(method, (None, None))
        if module is not None and find_spec(module) is None:
            raise ModelError(
                f"Model {model!r} has a {component} quantised with {method}, which is not "
                f"installed: pip install '{package}', or use the model without quantisation."
            )
    return bool(methods)


_PLAIN = {"StableDiffusionAttendAndExcitePipeline": "StableDiffusionPipeline"}
"""Pipelines that are loaded as another class with the same components."""


def _without_checker(pipeline: str) -> dict[str, Any]:
    """Return the arguments that keep a pipeline from loading its safety checker."""
    if pipeline not in ("StableDiffusionPipeline", *_PLAIN):
        return {}
    return {"safety_checker": None, "requires_safety_checker": False}


def named(model: str, lora: Sequence[str] = ()) -> str:
    """Return a model's name for display, with its LoRAs; explains what an embedded one is."""
    if lora:
        return f"{model} with LoRA {', '.join(lora)}"
    if model not in EMBEDDED:
        return model
    return (
        f"{model}, a small one in this package, which draws coloured shapes; --model names another"
    )


class Index(NamedTuple):
    """What a model's `model_index.json` says.

    Attributes:
        pipeline: the pipeline's class.
        family: the model's.
        folder: the local folder with the model's small files.
        components: the names of the parts that the model has, each with library and class.
        left_out: those that it says it does without.
    """

    pipeline: str
    family: Family
    folder: Path
    components: dict[str, tuple[str, str]]
    left_out: Set[str]

    def config_of(self, component: str) -> dict[str, Any]:
        """Return the configuration of a network; empty if it has none."""
        try:
            return json.loads((self.folder / component / "config.json").read_text())
        except (OSError, ValueError):
            return {}


def index_of(model: str, *, revision: str | None = None, s3_endpoint: str | None = None) -> Index:
    """Return what is known of a model without its weights. Imports neither torch nor diffusers.

    Raises:
        ModelError: the model does not exist or cannot be guided.
    """
    model = expanded(model)
    _refuse_no_name(model)
    source = source_of(model, s3_endpoint, weights=False)
    with quiet():
        folder = Path(_here(model, source, revision, weights=False))
    with explained(model, str(folder)):
        file = folder / "model_index.json"
        if not file.is_file():
            raise OSError(f"there is no file named {file.name} in it")
        index = json.loads(file.read_text())
        if not isinstance(index, dict):
            raise ValueError(f"{file.name} is not a JSON object")
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise ModelError(f"Model {model!r} is {why_not_guidable(name)}.")
    listed = {
        part: kind for part, kind in index.items() if isinstance(kind, list) and len(kind) == 2
    }
    components = {part: (kind[0], kind[1]) for part, kind in listed.items() if kind[0] is not None}
    return Index(name, FAMILIES[name], folder, components, listed.keys() - components.keys())


def check_local_files(model: str, index: Index, variant: str | None) -> None:
    """Check the files of a model in a local folder; pass others, whose weights are not here yet.

    Raises:
        ModelError: they are incomplete.
    """
    if model in EMBEDDED or Path(model).is_dir():
        check_files(model, index.folder, index.components, variant)


def load_streams(
    model: str,
    max_sequence_length: int | None = None,
    *,
    revision: str | None = None,
    s3_endpoint: str | None = None,
    index: Index | None = None,
) -> tuple[Stream, ...]:
    """Load only a model's tokenizers, which suffice to check prompts and subjects: how its network
    reads them. Does not need torch.

    Args:
        index: the model's, if it has been read.

    Raises:
        ModelError: the model does not exist, cannot be guided, or lacks a tokenizer.
        SettingsError: its prompts have a fixed length.
    """
    index = index or index_of(model, revision=revision, s3_endpoint=s3_endpoint)
    tokenizers = {
        reader.folder: _tokenizer(model, index, reader)
        for reader in index.family.readers
        if reader.encoder not in index.left_out
    }
    return index.family.streams(tokenizers, max_sequence_length)


def _tokenizer(model: str, index: Index, reader: Reader) -> Tokenizer:
    from transformers import CLIPTokenizer, T5Tokenizer

    kind = {"CLIP": CLIPTokenizer, "T5": T5Tokenizer}[reader.name]
    refuse_without_vocabulary(model, index.folder, [reader.folder])
    with explained(model, str(index.folder)), quiet():
        tokenizer = kind.from_pretrained(index.folder, subfolder=reader.folder)
    tokenizer.model_max_length = most_positions(tokenizer, index.config_of(reader.encoder))
    return tokenizer


def sizes_of(index: Index, attn_res: tuple[int, int] | None = None) -> Sizes:
    """Return what height and width of an image may be, from the configurations of the VAE (a factor
    of 8 if it has none) and of the network, and from the maps' resolution."""
    blocks = index.config_of("vae").get("block_out_channels", [0] * 4)
    network, level = index.config_of(index.family.parts[0]), index.family.level
    if attn_res is not None and isinstance(size := network.get("sample_size"), int):
        level = max(0, (size // attn_res[0]).bit_length() - 1)
    return Sizes.of(index.family, 2 ** (len(blocks) - 1), network, level)


def _defaults(index: Index) -> dict[str, Any]:
    """Return the settings that a family's pipeline has by default. FLUX.1-schnell, the distilled
    one, differs from dev in taking no guidance."""
    defaults = dict(index.family.defaults)
    distilled = index.config_of("transformer").get("guidance_embeds", True) is False
    if index.family.is_guidance_embedded and distilled:
        defaults |= {"num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 256}
    return defaults


def default_guidance(
    model: str, s3_endpoint: str | None = None, revision: str | None = None
) -> GuidanceConfig:
    """Return a model's own settings: those in its folder's `guidance.json`, else those of its
    family's pipeline, else the paper's.

    Raises:
        ModelError: the model does not exist, or `guidance.json` cannot be read or is invalid.
    """
    index = index_of(model, revision=revision, s3_endpoint=s3_endpoint)
    file = index.folder / GUIDANCE_FILE
    try:
        given = json.loads(file.read_text()) if file.is_file() else {}
        # Steering that is given for no method is Attend-and-Excite's, as when that was the only one.
        steering = {
            name: given.pop(name) for name in SteeringSettings.model_fields if name in given
        }
        by_method = {DEFAULT: steering} | given.pop("by_method", {}) if steering else {}
        by_method = {"by_method": by_method} if by_method else {}
        return GuidanceConfig(**{**_defaults(index), **given, **by_method})
    except OSError as error:
        raise ModelError(f"Model {model!r}: cannot read {file}: {error.strerror}.") from error
    except (ValueError, TypeError) as error:  # no JSON, or not an object
        raise ModelError(f"Model {model!r}: {file} is not a JSON object: {error}.") from error
    except SettingsError as error:
        raise ModelError(f"Model {model!r}: {file} does not fit: {error}") from error


def refuse_missing_folder(model: str) -> None:
    """Raise a ModelError if `model` is the path of a folder that does not exist, or of a file."""
    if model in EMBEDDED or is_url(model):
        return
    refuse_single_file(model)
    if Path(model).is_dir() or _HUB_ID.fullmatch(model):
        return
    raise ModelError(f"Model folder {model!r} does not exist; check the path.")


_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def _refuse_no_name(model: str) -> None:
    """Raise a ModelError if `model` can be neither a folder nor a hub id."""
    refuse_missing_folder(model)
    if model not in EMBEDDED and not Path(model).is_dir() and "/" not in model:
        raise ModelError(
            f"Model {model!r} is neither a folder here nor an embedded model ({', '.join(EMBEDDED)}), and a "
            f"hub id has an owner: owner/name{_meant(model)}."
        )


def _meant(model: str) -> str:
    """Return the question for the known model whose name is nearest, if one is near."""
    ids = [one for family in FAMILIES.values() for one in family.examples]
    known = {one.rpartition("/")[2].lower(): one for one in (*ids, *EMBEDDED)}
    known |= {one.lower(): one for one in ids}
    near = get_close_matches(model.lower(), known, n=1, cutoff=0.7)
    return f" (did you mean {known[near[0]]!r}?)" if near else ""


def source_of(model: str, s3_endpoint: str | None = None, weights: bool = True) -> str:
    """Return where to load a model from: `model` itself, an embedded model's folder, or the
    local copy of a model in an object store.

    Args:
        weights: also copy the weights.

    Raises:
        ModelError: the object store has no such model or cannot be read.
    """
    if model in EMBEDDED:
        return str(files("aae_batch.shapes") / EMBEDDED[model])
    if not is_url(model):
        return expanded(model)
    try:
        endings = MODEL_FILES if weights else _SMALL_FILES
        return str(fetch_folder(model, lambda name: name.endswith(endings), s3_endpoint))
    except OutputError as error:
        raise ModelError(str(error)) from None


def _here(
    model: str,
    source: str,
    revision: str | None,
    weights: bool = True,
    variant: str | None = None,
) -> str:
    """Return the local folder of a model, downloaded once per machine if it comes from the hub. An
    earlier download is used if the hub cannot be reached.

    Raises:
        ModelError: the hub has no such model, or cannot be reached and the model is not cached.
    """
    if Path(source).is_dir():
        return source
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        if not weights:
            small = [f"*{ending}" for ending in _SMALL_FILES]
            return snapshot_download(model, revision=revision, allow_patterns=small)
        from diffusers import DiffusionPipeline

        return str(
            DiffusionPipeline.download(
                model,
                revision=revision,
                variant=variant,
                use_safetensors=True,
                safety_checker=None,
            )
        )

    with explained(model, source):
        try:
            return from_hub(f"{model} {revision}", fetch)
        except (OSError, ValueError) as error:
            if variant is not None and f"`variant={variant}`" in str(error):
                raise ModelError(no_variant(model, variant)) from error
            if variant is None and (variants := variants_in(str(error))):
                raise ModelError(only_variants(model, variants)) from error
            raise


def from_hub(name: str, fetch: Callable[[], str]) -> str:
    """Download from the hub in one process of this machine at a time; wait for a busy hub.

    Args:
        name: identifies what is fetched.

    Raises:
        ModelError: the cache cannot be written to.
        OSError, ValueError: whatever `fetch` raises.
    """
    try:
        return fetch_in_turn(name, fetch, _patience)
    except OutputError as error:
        raise ModelError(str(error)) from None


_UNREACHABLE_SECONDS = 4.0
"""Most machines without a network will not get one, and their users wait for an answer."""


def _patience(error: BaseException) -> float:
    """Return how many seconds to wait for the hub: few if it cannot be reached, none if it has no such
    model."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return 0
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return math.inf if status in (408, 429) or status >= 500 else 0
        # The hub's client has changed its HTTP library twice; they agree on these names.
        if {kind.__name__ for kind in type(cause).__mro__} & {"TransportError", "ConnectionError"}:
            return _UNREACHABLE_SECONDS
        cause = cause.__cause__ or cause.__context__
    return 0


@contextmanager
def explained(model: str, source: str, needs_quantizer: bool = False) -> Iterator[None]:
    """Turn the long errors of the hub's client, transformers and diffusers into one-sentence
    `ModelError`s.

    Args:
        needs_quantizer: weights are quantised, and loading them needs a library and its hardware.
    """
    try:
        yield
    except (ImportError, RuntimeError, NotImplementedError, OSError, ValueError) as error:
        is_about_files = isinstance(error, (OSError, ValueError))
        if needs_quantizer and (not is_about_files or "quantiz" in str(error)):
            raise ModelError(
                f"Model {model!r} is quantised and cannot be loaded here: {first_line(str(error))}"
            ) from error
        if is_about_files:
            raise ModelError(_why_unloadable(model, source, error)) from error
        raise


def _why_unloadable(model: str, source: str, error: Exception) -> str:
    text = str(error)
    if "safetensors" in text:
        return no_safetensors(model)
    if Path(source).is_dir():
        return f"Folder {model!r} is not a complete diffusers model: {first_line(text)}"
    if is_not_found(error):
        return (
            f"Model {model!r} was not found: it is neither a local folder nor a hub id that you can "
            f"access; check the spelling{_meant(model)}, or log in with `hf auth login` if it is private "
            "or gated."
        )
    return (
        f"Model {model!r} is not a folder here and the hub cannot be reached; check the network, or "
        f"give the path of a downloaded diffusers folder. ({first_line(text)})"
    )


def is_not_found(error: Exception) -> bool:
    """True if the hub has no such repository, or none that this user can access."""
    signs = ("401", "404", "not a valid model identifier", "Repository Not")
    return any(sign in str(error) for sign in signs)


def first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no details were given"


def torch_device(name: Any):
    """`auto` (CUDA, else MPS, else CPU), or a torch device or its name.

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
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SettingsError(
            f"Device '{name}' cannot be used here ({first_line(str(error))}); try 'auto' or 'cpu'."
        ) from error
    return device


def torch_dtype(name: Any, device):
    """`auto` (bfloat16 or float16 on CUDA, else float32), or a torch dtype or its name.

    Raises:
        SettingsError: it is unknown.
    """
    import torch

    name = str(name).removeprefix("torch.")
    known = ("float16", "bfloat16", "float32", "float64")
    if name in known:
        return getattr(torch, name)
    if name != "auto":
        raise SettingsError(f"dtype {name!r} is unknown; use auto, {', '.join(known)}.")
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
