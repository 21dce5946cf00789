"""Check a model's folder before it is loaded: libraries say less clearly what is wrong with it, or nothing
at all. Imports no torch."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from aae_batch.errors import ModelError

VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.json")
"""Files of which a tokenizer needs one. Without, transformers makes a tokenizer that knows no words."""

_PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_AGAIN = "copy or download it again, as a whole"
_LORA = re.compile(r"(.*)\.(?:base_layer|lora_[AB])\.")
"""peft's names of parameters, while a LoRA is attached to a layer."""


def refuse_single_file(model: str) -> None:
    """Raise a ModelError if `model` names a file of weights instead of a folder."""
    if not Path(model).is_file():
        return
    raise ModelError(
        f"Model {model!r} is a single file, and models are folders here; convert it in Python: "
        f"diffusers.StableDiffusionPipeline.from_single_file({model!r}).save_pretrained('folder'), or with "
        "its family's own pipeline."
    )


def refuse_without_vocabulary(model: str, folder: Path, tokenizers: Iterable[str]) -> None:
    """Raise a ModelError if one of these subfolders has no tokenizer in it."""
    for part in tokenizers:
        if not any((folder / part / name).is_file() for name in VOCABULARIES):
            raise ModelError(f"Model {model!r} has no vocabulary in {part}; {_AGAIN}.")


def check_files(model: str, folder: Path, parts: Iterable[str], variant: str | None) -> str | None:
    """Check that a model's folder has everything that is loaded, and return the variant of its weights:
    `variant`, or the only one if there are no weights without.

    Args:
        parts: the names of its components, under diffusers' names.

    Raises:
        ModelError: something is missing, cut off or pickled, or there is no such variant.
    """
    kinds = {part: re.sub(r"_\d$", "", part) for part in parts}
    tokenizers = [part for part, kind in kinds.items() if kind == "tokenizer"]
    refuse_without_vocabulary(model, folder, tokenizers)
    networks = [part for part, kind in kinds.items() if kind in _STEMS]
    files = [(part, "config.json") for part in networks]
    if "scheduler" in kinds:
        files.append(("scheduler", "scheduler_config.json"))
    for part, name in files:
        if not (folder / part / name).is_file():
            raise ModelError(f"Model {model!r} has no {part}/{name}; {_AGAIN}.")
    weights = {part: _weights(model, folder / part, _STEMS[kinds[part]]) for part in networks}
    variant = _variant(model, list(weights.values()), variant)
    for part, by_variant in weights.items():
        own = variant if variant in by_variant else None
        _check_shards(model, folder / part, _STEMS[kinds[part]], own)
        for file in by_variant[own]:
            _check_weights(model, part, file)
    return variant


_STEMS = {
    "unet": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
"""How the files of a network's weights begin: diffusers' are named otherwise than transformers'."""


def _weights(model: str, folder: Path, stem: str) -> dict[str | None, list[Path]]:
    """Return a network's files by their variant, None without one, each list with the shards that are there."""
    found: dict[str | None, list[Path]] = defaultdict(list)
    for file in sorted(folder.iterdir()):
        named = re.fullmatch(
            rf"{stem}(?:\.([^.]+?))?(?:-\d{{5}}-of-\d{{5}})?\.safetensors", file.name
        )
        if named:
            found[named[1]].append(file)
    if found:
        return found
    pickled = next((file for file in folder.iterdir() if file.suffix in _PICKLED), None)
    if pickled is None:
        raise ModelError(f"Model {model!r} has no weights in {folder.name}; {_AGAIN}.")
    raise ModelError(no_safetensors(model, f" in {folder.name}, only {pickled.name}"))


def _check_shards(model: str, folder: Path, stem: str, variant: str | None) -> None:
    """Check that all files are there that the index of a variant names, if it has one."""
    ending = "" if variant is None else f".{variant}"
    file = folder / f"{stem}.safetensors.index{ending}.json"
    if not file.is_file():
        return
    try:
        names = sorted({*json.loads(file.read_text())["weight_map"].values()})
        missing = [name for name in names if not (folder / name).is_file()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ModelError(
            f"Model {model!r}: {folder.name}/{file.name} is damaged; {_AGAIN}."
        ) from None
    if missing:
        raise ModelError(f"Model {model!r} has no {folder.name}/{missing[0]}; {_AGAIN}.")


def no_safetensors(model: str, where: str = "") -> str:
    return (
        f"Model {model!r} has no safetensors weights{where}, and pickled ones are not loaded; convert it "
        "with pipe.save_pretrained(folder, safe_serialization=True), or take another revision or variant."
    )


def _variant(
    model: str, weights: Sequence[dict[str | None, list[Path]]], variant: str | None
) -> str | None:
    """Return the variant in which every network has weights; those that have none of it may have weights
    without a variant."""
    known = {one for found in weights for one in found if one is not None}
    fitting = [one for one in sorted(known) if all({one, None} & found.keys() for found in weights)]
    is_plain = all(None in found for found in weights)
    if variant is not None and variant not in fitting:
        fixes = [f"give --variant {one}" for one in fitting] + ["leave it out"] * is_plain
        raise ModelError(no_variant(model, variant, fixes or [_AGAIN]))
    if variant is not None or is_plain:
        return variant
    if len(fitting) != 1:
        raise ModelError(only_variants(model, fitting or sorted(known)))
    return fitting[0]


def no_variant(model: str, variant: str, fixes: Sequence[str] = ("leave it out",)) -> str:
    return f"Model {model!r} has no weights of the variant {variant!r}; {' or '.join(fixes)}."


def only_variants(model: str, variants: Sequence[str]) -> str:
    return (
        f"Model {model!r} has only weights of the variant {' or '.join(variants)}; add --variant "
        f"{variants[0]}."
    )


def variants_in(names: str) -> list[str]:
    """Return the variants of the weights that a text names."""
    stems = "|".join({*_STEMS.values()})
    found = re.findall(rf"\b(?:{stems})\.([\w-]+?)(?:-\d{{5}}-of-\d{{5}})?\.safetensors", names)
    return sorted({*found})


def _check_weights(model: str, part: str, file: Path) -> None:
    """Check that a file of weights is whole, by its header, and that they are the network's own."""
    if file.open("rb").read(20) == b"version https://git-":
        raise ModelError(
            f"Model {model!r}: {part}/{file.name} is only a pointer of Git LFS; run `git lfs pull` in the "
            "model's folder."
        )
    try:
        with safe_open(file, framework="numpy") as opened:
            adapted = next(filter(None, map(_LORA.match, opened.keys())), None)
    except SafetensorError as error:
        raise ModelError(
            f"Model {model!r}: {part}/{file.name} is cut off or damaged ({error}); {_AGAIN}."
        ) from error
    if adapted:
        raise ModelError(
            f"Model {model!r}: {part} was saved with a LoRA attached, so its own parameters are missing "
            f"(such as {adapted[1]}.weight); load the pipeline again, call pipe.fuse_lora() and "
            "pipe.unload_lora_weights(), then save it."
        )
