"""A model without its weights, to count what it would compute. Downloads only its configuration."""

from __future__ import annotations

from types import SimpleNamespace

from aae_batch.errors import ModelError
from aae_batch.sampling.model.loading import explained, index_of, source_of

_NETWORKS = ("unet", "transformer", "vae")


def load_skeleton(
    model: str, *, revision: str | None = None, s3_endpoint: str | None = None
) -> SimpleNamespace:
    """Return a pipeline's networks on torch's meta device and its scheduler, under diffusers'
    names, in an object of its class's name.

    Raises:
        ModelError: the model does not exist, one of its configurations is missing, or its scheduler
            is unknown.
    """
    import diffusers
    import torch
    import transformers

    index = index_of(model, revision=revision, s3_endpoint=s3_endpoint)
    source = source_of(model, s3_endpoint, weights=False)
    parts: dict[str, object] = {}
    with explained(model, source):
        for name, (_, class_name) in index.components.items():
            if name in _NETWORKS:
                kind = getattr(diffusers, class_name)
                config = kind.load_config(source, subfolder=name, revision=revision)
                with torch.device("meta"):
                    parts[name] = kind.from_config(config)
            elif name.startswith("text_encoder"):
                kind = getattr(transformers, class_name)
                config = kind.config_class.from_pretrained(
                    source, subfolder=name, revision=revision
                )
                with torch.device("meta"):
                    parts[name] = kind(config)
        own = diffusers.DDIMScheduler.load_config(source, subfolder="scheduler", revision=revision)
    scheduler = getattr(diffusers, own.get("_class_name", ""), None)
    if scheduler is None:
        raise ModelError(
            f"Model {model!r} has a scheduler {own.get('_class_name')}, which diffusers lacks; name "
            "one that it has in the model's scheduler_config.json."
        )
    parts["scheduler"] = scheduler.from_config(own)
    factor = 2 ** (len(parts["vae"].config.block_out_channels) - 1)  # type: ignore[attr-defined]
    for name, part in list(parts.items()):
        if name.startswith("text_encoder"):
            length = getattr(part.config, "max_position_embeddings", None)  # type: ignore[attr-defined]
            parts[name.replace("text_encoder", "tokenizer")] = SimpleNamespace(
                model_max_length=length
            )
    skeleton = type(index.pipeline, (SimpleNamespace,), {})
    return skeleton(**parts, vae_scale_factor=factor, default_sample_size=128)
