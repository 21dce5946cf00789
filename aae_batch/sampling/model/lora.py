"""LoRA: changes to a model's weights, each in a small file, that are added when it is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from aae_batch.errors import ModelError, OutputError, SettingsError
from aae_batch.sampling.model.loading import first_line, from_hub, is_not_found, is_quantized
from aae_batch.store.base import expanded, is_url
from aae_batch.store.fetch import fetch_folder, folder_digest

WEIGHTS = ".safetensors"
USUAL_NAME = f"pytorch_lora_weights{WEIGHTS}"
"""What diffusers calls a LoRA in a folder."""

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([^@]+\.safetensors))?(?:@(.+))?")
"""`owner/name`, a file in it, and a revision."""


@dataclass(frozen=True)
class Lora:
    """A LoRA and its scale.

    Attributes:
        id: a `.safetensors` file, or a folder with one, local or in an object store; or a hub id,
            `owner/name`, with a file (`owner/name/file.safetensors`) and a revision
            (`owner/name@revision`) if need be.
        scale: multiplies the change.
    """

    id: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Parse `ID` or `ID:scale`. A colon that a slash follows is part of the id, as in
        `s3://bucket/name` and `C:\\name`.

        Raises:
            SettingsError: there is no id, or the scale is not a finite number.
        """
        head, colon, tail = text.strip().rpartition(":")
        if not colon or "/" in tail or "\\" in tail:
            head, tail = text.strip(), "1"
        try:
            scale = float(tail)
        except ValueError:
            scale = math.nan
        if not head or not math.isfinite(scale):
            raise SettingsError(
                f"lora {text!r} is not ID or ID:scale with a finite number as the scale; give for "
                "example owner/name:0.8."
            )
        return cls(expanded(head), scale)

    def __str__(self) -> str:
        return f"{self.id}:{self.scale!r}"


def parse_loras(texts: Sequence[str]) -> tuple[Lora, ...]:
    """Parse several LoRAs.

    Raises:
        SettingsError: one is malformed or named twice.
    """
    loras = tuple(Lora.parse(text) for text in texts)
    names = [lora.id for lora in loras]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingsError(
            f"lora {twice!r} is named twice; name it once, with the scale it should have."
        )
    return loras


class _HubId(NamedTuple):
    repo: str
    file: str | None
    revision: str | None


def _hub_id(lora: Lora) -> _HubId | None:
    """Return the parts of a hub id; None for a local path that exists.

    Raises:
        ModelError: it is a path and does not exist, or neither.
    """
    if Path(lora.id).exists():
        return None
    found = _HUB_ID.fullmatch(lora.id)
    if found is None or lora.id.startswith((".", "/", "~")):
        raise ModelError(f"LoRA {lora.id!r} does not exist; check the path.")
    return _HubId(*found.groups())


# --- files ---


def lora_file(lora: Lora, s3_endpoint: str | None = None) -> Path:
    """Return the local file with a LoRA's weights, downloaded once per machine.

    Raises:
        ModelError: the LoRA does not exist, or has no safetensors file or several.
    """
    if is_url(lora.id):
        folder, name = _split(lora.id)
        try:
            here = fetch_folder(folder, _is_weights(name), s3_endpoint)
        except OutputError as error:
            raise ModelError(f"LoRA {lora.id!r} cannot be read: {error}") from None
        return _only_file(lora, here / name if name else here)
    hub = _hub_id(lora)
    if hub is None:
        return _only_file(lora, Path(lora.id))
    if hub.file:
        return _only_file(lora, _snapshot(lora, hub, [hub.file]) / hub.file)
    return _only_file(lora, _snapshot(lora, hub, [f"*{WEIGHTS}"], ["*/*"]))


def lora_version(lora: Lora, s3_endpoint: str | None = None) -> str | Path:
    """Return what tells a LoRA from another of the same id: its local file, a digest of its listing
    in an object store, or its commit on the hub.

    Raises:
        ModelError: the LoRA does not exist, or has no safetensors file or several.
    """
    if is_url(lora.id):
        folder, name = _split(lora.id)
        try:
            return folder_digest(folder, _is_weights(name), s3_endpoint)
        except OutputError as error:
            raise ModelError(f"LoRA {lora.id!r} cannot be read: {error}") from None
    hub = _hub_id(lora)
    if hub is None:
        return lora_file(lora)
    return _snapshot(lora, hub, ["*.json", "*.md"], ["*/*"]).name


def _split(url: str) -> tuple[str, str]:
    """Return the folder of a URL, and the file in it that the URL names, or an empty string."""
    if not url.endswith(WEIGHTS):
        return url, ""
    folder, _, name = url.rpartition("/")
    return folder, name


def _is_weights(wanted: str):
    def wants(name: str) -> bool:
        return name == wanted if wanted else name.endswith(WEIGHTS) and "/" not in name

    return wants


def _only_file(lora: Lora, path: Path) -> Path:
    """Return the weights at a path, a file or a folder."""
    if path.is_file() and path.suffix == WEIGHTS:
        return path
    if (path / USUAL_NAME).is_file():
        return path / USUAL_NAME
    found = sorted(path.glob(f"*{WEIGHTS}"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:5])
        raise ModelError(
            f"LoRA {lora.id!r} has {len(found)} safetensors files ({names}); name one, as "
            f"{lora.id.partition('@')[0].rstrip('/')}/{found[0].name}."
        )
    if not found:
        raise ModelError(
            f"LoRA {lora.id!r} has no safetensors file, and pickled weights are not loaded; give a "
            "file, or a folder or repository with one."
        )
    return found[0]


def _snapshot(lora: Lora, hub: _HubId, wanted: list[str], ignored: Sequence[str] = ()) -> Path:
    """Return the local folder of a commit, with the wanted files of it."""
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        return snapshot_download(
            hub.repo, revision=hub.revision, allow_patterns=wanted, ignore_patterns=list(ignored)
        )

    try:
        return Path(from_hub(f"{hub.repo} {hub.revision}", fetch))
    except (OSError, ValueError) as error:
        if is_not_found(error):
            raise ModelError(
                f"LoRA {lora.id!r} was not found: it is neither a file or folder here nor a hub id "
                "that you can access; check the spelling, or log in with `hf auth login` if it is "
                "private or gated."
            ) from error
        raise ModelError(
            f"LoRA {lora.id!r} is not here and the hub cannot be reached; check the network, or "
            f"give the path of a downloaded file. ({first_line(str(error))})"
        ) from error


# --- adding them ---


def refuse_without_peft() -> None:
    """Check that peft, which diffusers loads LoRAs with, is installed.

    Raises:
        ModelError: it is not, or is too old.
    """
    from diffusers.utils import USE_PEFT_BACKEND

    if find_spec("peft") is None or not USE_PEFT_BACKEND:
        raise ModelError("A LoRA needs peft: pip install --upgrade peft.")


def add_loras(pipe, loras: Sequence[Lora], files: Sequence[Path]) -> None:
    """Add LoRAs to a pipeline's weights, each with its scale. Quantised weights cannot be changed, so
    their LoRAs remain separate layers.

    Raises:
        ModelError: one does not fit the model.
    """
    names = [f"lora_{number}" for number in range(len(loras))]
    for lora, name, file in zip(loras, names, files, strict=True):
        try:
            pipe.load_lora_weights(
                str(file.parent), weight_name=file.name, adapter_name=name, use_safetensors=True
            )
        except (
            Exception
        ) as error:  # whatever the libraries make of a file that is for another model
            has_other_sizes = "size mismatch" in str(error)
            why = "its weights have other sizes" if has_other_sizes else first_line(str(error))
            raise _misfit(lora, pipe, why) from error
        if not any(name in adapters for adapters in pipe.get_list_adapters().values()):
            raise _misfit(lora, pipe, "none of its weights has a place in it")
        if _takes_an_image(pipe):
            raise _misfit(lora, pipe, "it is a control LoRA, which takes an image")
    pipe.set_adapters(names, [lora.scale for lora in loras])
    parts = list(pipe.get_list_adapters())
    if any(is_quantized(getattr(pipe, part)) for part in parts):
        return
    try:
        pipe.fuse_lora(components=parts, adapter_names=names, safe_fusing=True)
    except ValueError as error:  # sums that are not finite
        listed = ", ".join(map(str, loras))
        raise ModelError(
            f"LoRA {listed} cannot be added to the weights ({first_line(str(error))}); choose a smaller "
            "scale or another dtype."
        ) from error
    pipe.unload_lora_weights()


def _misfit(lora: Lora, pipe: Any, why: str) -> ModelError:
    return ModelError(
        f"LoRA {lora.id!r} is not for this model, a {type(pipe).__name__}: {why.rstrip('.')}; use one "
        "that was trained for the model."
    )


def _takes_an_image(pipe: Any) -> bool:
    """True if a LoRA has replaced layers of the network, as those of FLUX.1 Canny and Depth do."""
    network = getattr(pipe, "transformer", None)
    replaced = ("_overwritten_params", "_transformer_norm_layers")
    return any(getattr(network, name, None) for name in replaced)
