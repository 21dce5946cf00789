"""Loads the transformers models that score images, by hub id, folder or URL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aae_batch.errors import ModelError
from aae_batch.sampling.model.loading import (
    MODEL_FILES,
    missing_parameters,
    refuse_missing_folder,
    source_of,
    torch_device,
    torch_dtype,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

JUDGE_FILES = (*MODEL_FILES, ".bin", ".model")
"""Suffixes of the files that a judge depends on: those of a generator, pickled weights, and SentencePiece
vocabularies."""


@dataclass(frozen=True)
class Judge:
    """A model with its tokenizer and image processor."""

    model: Any
    tokenizer: Any
    processor: Any

    @classmethod
    def load(
        cls,
        auto_class: Any,
        name: str,
        device: str,
        dtype: str,
        s3_endpoint: str | None,
        needs: Sequence[str] = (),
        advice: str = "",
    ) -> Judge:
        """Load a model through one of transformers' auto classes, with its tokenizer and processor.

        Weights are read from safetensors, or, if a hub id or a folder has none, from a pickle restricted
        to tensors (torch's `weights_only`).

        Args:
            needs: attributes that a model of the right kind has.
            advice: completes the error message for a model without them: "Model ... is a BertModel".

        Raises:
            ModelError: the model does not exist, is of the wrong kind, or does not fit on the device.
            SettingsError: device or dtype is unknown or not available.
        """
        from transformers import AutoImageProcessor, AutoTokenizer

        place = torch_device(device)
        precision = torch_dtype(dtype, place)
        refuse_missing_folder(name)
        source = source_of(name, s3_endpoint)
        try:
            model, found = auto_class.from_pretrained(
                source, dtype=precision, output_loading_info=True
            )
            missing = missing_parameters(model, found)
            if missing:  # transformers would initialize them at random
                raise ModelError(
                    f"Model {name!r} lacks {len(missing)} weights of a {type(model).__name__} (e.g. "
                    f"{missing[0]}); use a model of the kind that the metric needs."
                )
            if not all(hasattr(model, attribute) for attribute in needs):
                raise ModelError(f"Model {name!r} is a {type(model).__name__}{advice}")
            tokenizer = AutoTokenizer.from_pretrained(source)
            processor = AutoImageProcessor.from_pretrained(source, backend="pil")
        except (OSError, ValueError) as error:
            raise ModelError(_why(name, source, error)) from error
        try:
            model = model.eval().requires_grad_(False).to(place)
        except RuntimeError as error:
            raise ModelError(f"Model {name!r} does not fit on {place}: {error}") from error
        return cls(model, tokenizer, processor)

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """Preprocess images for the model, on its device and in its precision."""
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    def tokens(self, texts: Sequence[str], padding: bool | str) -> Any:
        """Tokenize texts for the model, truncated to its maximum length."""
        longest = self.model.config.text_config.max_position_embeddings
        return self.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.model.device)


def _why(model: str, source: str, error: Exception) -> str:
    """Summarize an error of transformers or the hub client in one sentence."""
    lines = str(error).strip().splitlines()
    words = lines[0] if lines else "no details were given"
    if Path(source).is_dir():
        return f"Folder {model!r} is not such a model in transformers' layout: {words}"
    return (
        f"Model {model!r} is not a local folder and cannot be fetched from the hub; check the "
        f"spelling and the network, or give the path of a downloaded folder. ({words})"
    )
