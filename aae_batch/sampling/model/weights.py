"""Identify a model's weights without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from aae_batch.errors import ModelError, OutputError
from aae_batch.sampling.model.loading import MODEL_FILES, source_of
from aae_batch.sampling.model.lora import lora_version, parse_loras
from aae_batch.store.base import is_url
from aae_batch.store.fetch import folder_digest

_END = 1 << 20


def weights_digest(
    model: str, s3_endpoint: str | None = None, endings: tuple[str, ...] = MODEL_FILES
) -> str | None:
    """Return a SHA-256 over a local model's files, or over the listing of a model in an object
    store; None for a hub model.

    Only the two ends of a large file are read: different weights differ there too.

    Args:
        endings: extensions of the files that count.

    Raises:
        ModelError: the object store has no such model or cannot be read.
    """
    if is_url(model):
        try:
            return folder_digest(model, lambda name: name.endswith(endings), s3_endpoint)
        except OutputError as error:
            raise ModelError(str(error)) from None
    folder = Path(source_of(model))
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix not in endings:
            continue
        _add_file(digest, path, path.relative_to(folder).as_posix())
    return digest.hexdigest()


def lora_digests(loras: Sequence[str], s3_endpoint: str | None = None) -> dict[str, str]:
    """Return what identifies the weights of each LoRA, by its id: a SHA-256 over a local file or over
    the listing of an object store, or a commit on the hub.

    Raises:
        ModelError: a LoRA does not exist or cannot be read.
        SettingsError: one is malformed.
    """
    versions = {one.id: lora_version(one, s3_endpoint) for one in parse_loras(loras)}
    return {
        name: _file_digest(version) if isinstance(version, Path) else version
        for name, version in versions.items()
    }


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    _add_file(digest, path, path.name)
    return digest.hexdigest()


def _add_file(digest, path: Path, name: str) -> None:
    size = path.stat().st_size
    digest.update(f"{name} {size}\n".encode())
    with path.open("rb") as file:
        digest.update(file.read(_END))
        file.seek(max(0, size - _END))
        digest.update(file.read(_END))
