"""Models of transformers that judge pictures: by hub id, folder, or URL of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aae_batch.errors import ModelError
from aae_batch.sampling.model.loading import MODEL_FILES, source_of, torch_device, torch_dtype

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

JUDGE_FILES = (*MODEL_FILES, ".bin", ".model")
"""The files of a folder that a judge depends on: a generator's, pickled weights, and SentencePiece's words."""


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
        """A model as one of transformers' auto classes makes it, and what stands beside its weights.

        Weights are read from safetensors, or, where a hub id or a folder has none, from a pickle of
        tensors alone (torch's `weights_only`).

        Args:
            needs: attributes of a model of the right kind.
            advice: ends the sentence on one without these: "Model ... is a BertModel".

        Raises:
            ModelError: there is no such model, or it is of another kind.
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
            missing = sorted(
                {*found["missing_keys"]} & {key for key, _ in model.named_parameters()}
            )
            if missing:  # transformers would go on with random ones
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
        """Images as the model takes them, where it is and in its precision."""
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    def tokens(self, texts: Sequence[str], padding: bool | str) -> Any:
        """Texts as the model takes them; longer ones than it reads are cut."""
        longest = self.model.config.text_config.max_position_embeddings
        return self.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.model.device)


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
