"""A model without its weights, to count what it would compute. Downloads only its configuration."""

from __future__ import annotations

from types import SimpleNamespace

from aae_batch.errors import ModelError
from aae_batch.sampling.model.loading import explained, source_of


def load_skeleton(
    model: str, *, revision: str | None = None, s3_endpoint: str | None = None
) -> SimpleNamespace:
    """Return a pipeline's networks on torch's meta device and its scheduler, under diffusers'
    names.

    Raises:
        ModelError: the model does not exist, one of its configurations is missing, or its scheduler
            is unknown.
    """
    import diffusers
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    source = source_of(model, s3_endpoint, weights=False)
    parts: dict[str, object] = {}
    with explained(model, source):
        for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            config = kind.load_config(source, subfolder=name, revision=revision)
            with torch.device("meta"):
                parts[name] = kind.from_config(config)
        own = DDIMScheduler.load_config(source, subfolder="scheduler", revision=revision)
        text = CLIPTextConfig.from_pretrained(source, subfolder="text_encoder", revision=revision)
        with torch.device("meta"):
            parts["text_encoder"] = CLIPTextModel(text)
    scheduler = getattr(diffusers, own.get("_class_name", ""), None)
    if scheduler is None:
        raise ModelError(
            f"Model {model!r} has a scheduler {own.get('_class_name')}, which diffusers lacks; name "
            "one that it has in the model's scheduler_config.json."
        )
    parts["scheduler"] = scheduler.from_config(own)
    factor = 2 ** (len(parts["vae"].config.block_out_channels) - 1)  # type: ignore[attr-defined]
    return SimpleNamespace(**parts, tokenizer=object(), vae_scale_factor=factor)
