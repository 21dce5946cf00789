"""Models of transformers that judge pictures: by hub id, folder, or URL of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aae_batch.errors import ModelError
from aae_batch.sampling.model.loading import MODEL_FILES, source_of, torch_device, torch_dtype

JUDGE_FILES = (*MODEL_FILES, ".bin", ".model")
"""The files of a folder that a judge depends on: a generator's, pickled weights, and SentencePiece's words."""


def load_model(
    auto_class: Any, model: str, device: str, dtype: str, s3_endpoint: str | None = None
) -> Any:
    """A model as one of transformers' auto classes makes it, ready to judge.

    Weights are read from safetensors, or, where a hub id or a folder has none, from a pickle of
    tensors alone (torch's `weights_only`).

    Raises:
        ModelError: there is no such model, or it is of another kind.
        SettingsError: device or dtype is unknown or not available.
    """
    place = torch_device(device)
    precision = torch_dtype(dtype, place)
    refuse_missing_folder(model)
    source = source_of(model, s3_endpoint)
    try:
        loaded, found = auto_class.from_pretrained(
            source, dtype=precision, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(_why(model, source, error)) from error
    lacking = sorted({*found["missing_keys"]} & {name for name, _ in loaded.named_parameters()})
    if lacking:  # transformers would go on with random ones
        raise ModelError(
            f"Model {model!r} lacks {len(lacking)} weights of a {type(loaded).__name__} (e.g. "
            f"{lacking[0]}); use a model of the kind that the metric needs."
        )
    try:
        return loaded.eval().requires_grad_(False).to(place)
    except RuntimeError as error:
        raise ModelError(f"Model {model!r} does not fit on {place}: {error}") from error


def load_part(auto_class: Any, model: str, s3_endpoint: str | None = None, **options: Any) -> Any:
    """What stands beside a model's weights: its tokenizer, or its image processor.

    Raises:
        ModelError: the model has none.
    """
    refuse_missing_folder(model)
    source = source_of(model, s3_endpoint)
    try:
        return auto_class.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ModelError(_why(model, source, error)) from error


def refuse_missing_folder(model: str) -> None:
    """Raises: ModelError: it is the path of a folder that does not exist."""
    if (Path(model).is_absolute() or model.startswith((".", "~"))) and not Path(model).is_dir():
        raise ModelError(f"Model folder {model!r} does not exist; check the path.")


def _why(model: str, source: str, error: Exception) -> str:
    """One sentence for what transformers or the hub's client says in many."""
    lines = str(error).strip().splitlines()
    words = lines[0] if lines else "no details were given"
    if Path(source).is_dir():
        return f"Folder {model!r} is not such a model in transformers' layout: {words}"
    return (
        f"Model {model!r} is neither a folder here nor can it be had from the hub; check the spelling "
        f"and the network, or give the path of a downloaded folder. ({words})"
    )
