"""FLOPs per image: this engine against diffusers' Attend-and-Excite pipeline on the SD 1.4 architecture,
and (`--families`) FLOPs and memory of every family of models at its real size.

Each kind of pass is counted once on the meta device, by running the code that sampling runs, and
multiplied by the number of such passes. The denoising network's passes and the objective are counted; the
text encoders and the VAE are left out.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import (
    ChromaTransformer2DModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
    pipeline_stable_diffusion_attend_and_excite as upstream,
)
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aae_batch.manifest.price import (
    SamplingPasses,
    count_flops,
    count_guided,
    count_sampling,
)
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.families import FAMILIES
from aae_batch.sampling.model.family import TEXT, Network, network_of
from aae_batch.sampling.model.unet import StableDiffusion
from aae_batch.sampling.steering import GuidanceSchedule

STEPS, GUIDED_STEPS = 50, 25
TERA, GIB = 1e12, 2**30
SUBJECTS = [2, 5]
REFINEMENTS = {0: 0, 10: 1, 30: 2, 60: 3}
"""Refinements of an image, and the number of steps that make them (at most 20 each)."""


@dataclass(frozen=True)
class Passes:
    """FLOPs of one pass of each kind, for one image."""

    attend: int
    """Our guided forward, which ends at the last map, with the objective."""
    attend_backward: int
    denoise: int
    """Our forward with classifier-free guidance: two rows."""
    shared: int
    """What the second row saves, because it begins like the first."""
    composed: int
    """The same of composable-diffusion with two conjuncts: two rows and one."""
    structured: int
    """The same of structure-diffusion: two rows, with values of another text."""
    upstream_forward: int
    """Diffusers' guided forward, with the objective."""
    upstream_backward: int
    upstream_denoise: int


def sd14_unet(device: str = "meta") -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1.4, without its weights."""
    with torch.device(device):
        return UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        )


def count_passes() -> Passes:
    unet = sd14_unet()
    latents = torch.empty(1, 4, 64, 64, device="meta")
    timesteps = torch.empty(1, device="meta")
    text = torch.empty(1, 77, 768, device="meta")
    pipe = guidable(unet)
    own = count_sampling(StableDiffusion(pipe), latents)
    further = _further(pipe, latents, timesteps, text)
    forward, backward, upstream_denoise = _upstream(unet, latents, timesteps, text)
    return Passes(
        own.attend,
        own.attend_backward,
        own.denoise,
        own.shared,
        *further,
        forward,
        backward,
        upstream_denoise,
    )


def ours(passes: Passes, refinements: int) -> int:
    """FLOPs of one image: every guided step and every refinement is one forward and one backward."""
    guided = GUIDED_STEPS + refinements
    return guided * (passes.attend + passes.attend_backward) + STEPS * passes.denoise


def theirs(passes: Passes, refinements: int) -> int:
    """FLOPs of one image: a guided forward at all steps, and where a step refines one before and one
    after it."""
    forwards = STEPS + refinements + REFINEMENTS[refinements]
    backwards = GUIDED_STEPS + refinements
    return (
        forwards * passes.upstream_forward
        + backwards * passes.upstream_backward
        + STEPS * passes.upstream_denoise
    )


def guidable(unet: UNet2DConditionModel) -> SimpleNamespace:
    return SimpleNamespace(
        unet=unet,
        vae=SimpleNamespace(config=SimpleNamespace(latent_channels=4)),
        tokenizer=SimpleNamespace(model_max_length=77),
        text_encoder=object(),
        scheduler=DDIMScheduler(),
        vae_scale_factor=8,
    )


def _further(
    pipe: SimpleNamespace, latents: Tensor, timesteps: Tensor, text: Tensor
) -> tuple[int, int]:
    """A step of composable-diffusion with two conjuncts, in two forwards as the engine takes it, and one of
    structure-diffusion."""
    model = StableDiffusion(pipe)

    def denoise(rows: int, values: Tensor | None = None) -> int:
        several = [torch.cat([tensor] * rows) for tensor in (latents, timesteps, text)]
        bag = {TEXT: several[2]}
        return count_flops(
            lambda: model.denoise(
                several[0], several[1], bag, values, slice(1, None), sample_of=[0] * rows
            )
        )

    with model.recording_maps():
        return denoise(2) + denoise(1), denoise(2, torch.cat([text] * 2))


def _upstream(
    unet: UNet2DConditionModel, latents: Tensor, timesteps: Tensor, text: Tensor
) -> tuple[int, int, int]:
    store = upstream.AttentionStore((16, 16))
    processors = {
        name: upstream.AttendExciteAttnProcessor(store, name.split("_")[0])
        for name in unet.attn_processors
    }
    store.num_att_layers = len(processors)
    unet.set_attn_processor(processors)

    def loss(moving: Tensor) -> Tensor:
        store.reset()
        unet(moving, timesteps, encoder_hidden_states=text)
        maps = store.aggregate_attention(("up", "down", "mid"))
        words = (maps[:, :, 1:-1] * 100).softmax(dim=-1)
        smoothing = upstream.GaussianSmoothing().to("meta")
        padded = [F.pad(words[None, None, :, :, i - 1], (1,) * 4, mode="reflect") for i in SUBJECTS]
        return (1 - torch.stack([smoothing(image).max() for image in padded])).max()

    forward, backward = count_guided(loss, latents)
    double = [torch.cat([tensor, tensor]) for tensor in (latents, timesteps, text)]
    denoise = count_flops(lambda: unet(double[0], double[1], encoder_hidden_states=double[2]))
    return forward, backward, denoise


# --- every family at its real size ---------------------------------------------------------------


@dataclass(frozen=True)
class Real:
    """A model at its real size.

    Attributes:
        pipeline: its class, which chooses the family.
        network: makes the denoising network; called on the meta device.
        own: settings that differ from the family's defaults.
        choices: other settings of where guidance reads, to compare with the default.
    """

    name: str
    pipeline: str
    network: Callable[[], Any]
    own: dict[str, Any] = field(default_factory=dict)
    choices: tuple[dict[str, Any], ...] = ()

    @property
    def config(self) -> GuidanceConfig:
        return GuidanceConfig(**{**FAMILIES[self.pipeline].defaults, **self.own})

    def model(self) -> Network:
        with torch.device("meta"):
            network = self.network()
        return on_meta(self.pipeline, network)


def sdxl_unet() -> UNet2DConditionModel:
    """The UNet of Stable Diffusion XL base 1.0."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _sd35(layers: int, positions: int, dual: int) -> SD3Transformer2DModel:
    """Stable Diffusion 3.5, whose width grows with its depth."""
    return SD3Transformer2DModel(
        num_layers=layers,
        num_attention_heads=layers,
        caption_projection_dim=64 * layers,
        pos_embed_max_size=positions,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm",
    )


def _to(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


_SCHNELL = {"num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 256}

REAL = (
    Real("SD 1.5, 512 px", "StableDiffusionPipeline", lambda: sd14_unet()),
    Real(
        "SDXL base, 1024 px",
        "StableDiffusionXLPipeline",
        sdxl_unet,
        choices=(
            {"attn_res": (32, 32)},
            {"attn_res": (32, 32), "attn_layers": _to(0, 19)},
            {"attn_res": (64, 64), "attn_layers": _to(0, 3)},
        ),
    ),
    Real(
        "SD 3.5 medium, 1024 px",
        "StableDiffusion3Pipeline",
        partial(_sd35, 24, 384, 13),
        choices=({"attn_layers": _to(0, 7)}, {"attn_layers": (16,)}, {"attn_layers": _to(0, 22)}),
    ),
    Real(
        "SD 3.5 large, 1024 px",
        "StableDiffusion3Pipeline",
        partial(_sd35, 38, 192, 0),
        choices=({"attn_layers": _to(0, 12)}, {"attn_layers": (19,)}),
    ),
    Real(
        "FLUX.1-dev, 1024 px",
        "FluxPipeline",
        partial(FluxTransformer2DModel, guidance_embeds=True),
        choices=(
            {"attn_layers": _to(0, 5)},
            {"attn_layers": _to(6, 12)},
            {"attn_layers": _to(0, 12)},
            {"attn_layers": (18,)},
        ),
    ),
    Real("FLUX.1-schnell, 1024 px", "FluxPipeline", FluxTransformer2DModel, _SCHNELL),
    Real("Chroma, 1024 px", "ChromaPipeline", ChromaTransformer2DModel),
)
"""Networks by the configurations of the models' own repositories; what is not given is diffusers' default, which
for FLUX.1 and Chroma is theirs."""


def on_meta(pipeline: str, network: Any, size: int = 128) -> Network:
    """Return a network on the meta device behind the verbs of its family, in an object with what else a pipeline
    of that class needs to be counted.

    Args:
        size: side of the latents where the network's configuration does not say it.
    """
    is_unet = isinstance(network, UNet2DConditionModel)
    schedulers = {"StableDiffusionXLPipeline": EulerDiscreteScheduler}
    own = schedulers.get(pipeline, DDIMScheduler if is_unet else FlowMatchEulerDiscreteScheduler)
    numbers = ("",) if pipeline == "StableDiffusionPipeline" else ("", "_2", "_3")
    tokenizers = {f"tokenizer{i}": SimpleNamespace(model_max_length=77) for i in numbers}
    kind = type(pipeline, (SimpleNamespace,), {})
    pipe = kind(
        **{"unet" if is_unet else "transformer": network},
        **tokenizers,
        **{f"text_encoder{i}": object() for i in numbers},
        vae=SimpleNamespace(config=SimpleNamespace(latent_channels=4)),
        scheduler=own(),
        vae_scale_factor=8,
        default_sample_size=size,
    )
    return network_of(pipe)


@dataclass(frozen=True)
class Guided:
    """The cost of reading attention at some layers, for one row.

    Attributes:
        forward, backward: FLOPs, without gradient checkpointing.
        recomputed: FLOPs that gradient checkpointing adds to the backward.
        record: FLOPs that recording the maps adds to a plain forward.
        memory, checkpointed: most bytes of live tensors during a guided forward and its backward, in bfloat16
            and beside the parameters, for the longest prompt, without and with gradient checkpointing.
        shared: as in `SamplingPasses`.
    """

    forward: int
    backward: int
    recomputed: int
    record: int
    memory: int
    checkpointed: int
    shared: int = 0


def plain_forward(model: Network, config: GuidanceConfig) -> int:
    """Return the FLOPs of one row's forward, without recording."""
    with model.recording_maps(config):
        row = _row(model)
        return count_flops(lambda: model.denoise(*row))


def guided_cost(model: Network, config: GuidanceConfig) -> Guided:
    def counted(checkpoints: bool) -> tuple[SamplingPasses, int]:
        model.checkpoints = checkpoints  # type: ignore[misc]
        return count_sampling(model, _row(model)[0], config), _most_bytes(model, config)

    own = model.checkpoints
    try:
        (once, memory), (again, checkpointed) = counted(False), counted(True)
    finally:
        model.checkpoints = own  # type: ignore[misc]
    recomputed = again.attend_backward - once.attend_backward
    record = once.denoise + once.shared - 2 * plain_forward(model, config)
    return Guided(
        once.attend, once.attend_backward, recomputed, record, memory, checkpointed, once.shared
    )


def per_image(
    model: Network, config: GuidanceConfig, plain: int, guided: Guided
) -> tuple[int, ...]:
    """Return the FLOPs of a plain image and of one with Attend-and-Excite without refinements, as the engine runs
    the model, and the number of guided steps. Steps that are not guided record the subjects' attention."""
    steps = config.num_inference_steps
    schedule = GuidanceSchedule(config.steering(), steps)
    count = sum(schedule.guides(step) for step in range(steps))
    rows = model.facts.rows(config)
    once = guided.forward + guided.backward
    if model.checkpoints:
        once += guided.recomputed
    image = steps * (rows * plain - (rows - 1) * guided.shared)
    return image, image + count * once + (steps - count) * guided.record, count


def _row(model: Network) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    latents = torch.empty(1, *model.latent_shape(None, None), device="meta")
    text = {name: tensor.unsqueeze(0) for name, tensor in model.blank().items()}
    return latents, torch.empty(1, device="meta"), text


def _most_bytes(model: Network, config: GuidanceConfig) -> int:
    before = model.dtype
    torch.nn.Module.to(model.network, torch.bfloat16)
    try:
        with model.recording_maps(config):
            latents, timesteps, text = _row(model)
            latents.requires_grad_(True)
            live = Live([*model.network.parameters(), *model.network.buffers()])
            with patch.object(F, "scaled_dot_product_attention", _fused), live:
                maps, _ = model.attend(latents.view_as(latents), timesteps, text)
                torch.autograd.grad(maps.sum(), latents)
        return live.most
    finally:
        torch.nn.Module.to(model.network, before)


class Live(TorchDispatchMode):
    """Follows the bytes of the tensors that operators return, until they are freed.

    Args:
        beside: tensors that do not count.
    """

    def __init__(self, beside: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in beside}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        self.most = max(self.most, self.bytes)
        return made

    def _follow(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: object) -> None:
            del self._known[key]
            self.bytes -= size

        self._known[key] = weakref.ref(storage, freed)
        self.bytes += size


def _fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """Attention as a GPU has it: the meta device would keep the softmax of every layer."""
    given = (query, key, value)
    how = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if has_torch_function(given):  # the recorder's
        return handle_torch_function(_fused, given, *given, attn_mask=attn_mask, **how)
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    return operator(*given, attn_mask, torch.is_grad_enabled(), **how)[0]


def family_tables(models: Iterable[Real] = REAL) -> str:
    """Count every model, with the layers that its family reads by default and with other choices."""
    passes = [
        "| model | parameters, GiB | plain forward | reads | guided forward | backward "
        "| recomputed | recording | memory, GiB | with checkpointing |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    images = [
        "| model | steps | guided | plain, TFLOP | attend-and-excite, TFLOP | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for real in models:
        model = real.model()
        gib = sum(one.numel() for one in model.network.parameters()) * 2 / GIB
        plain = plain_forward(model, real.config)
        for changes in ({}, *real.choices):
            config = real.config.updated(**changes)
            guided = guided_cost(model, config)
            first = [real.name, f"{gib:.1f}", f"{plain / TERA:.2f}"] if not changes else [""] * 3
            flops = (guided.forward, guided.backward, guided.recomputed, guided.record)
            numbers = [f"{one / TERA:.2f}" for one in flops]
            numbers += [f"{one / GIB:.2f}" for one in (guided.memory, guided.checkpointed)]
            passes.append(_line(*first, _where(changes), *numbers))
            if not changes:
                image, with_guidance, count = per_image(model, config, plain, guided)
                tera = (f"{one / TERA:,.0f}" for one in (image, with_guidance))
                ratio = f"{with_guidance / image:.2f}"
                images.append(_line(real.name, config.num_inference_steps, count, *tera, ratio))
    return "\n".join([*passes, "", *images])


def _where(changes: dict[str, Any]) -> str:
    numbers = changes.get("attn_layers", ())
    layers = "-".join(str(one) for one in dict.fromkeys((*numbers[:1], *numbers[-1:])))
    size = "x".join(map(str, changes.get("attn_res", ())))
    return " of ".join(filter(None, (layers, size))) or "default"


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flops",
        description="FLOPs per image of this engine and of diffusers' pipeline, on SD 1.4 at 512 px.",
    )
    parser.add_argument(
        "--families",
        action="store_true",
        help="instead: TFLOP and memory of every family at its real size (minutes)",
    )
    if parser.parse_args().families:
        print(family_tables())
        return
    passes = count_passes()
    plain = passes.upstream_denoise / 2
    print(f"one UNet forward: {plain / 1e12:.3f} TFLOP; in units of it:")
    print(
        f"  our guided forward    {passes.attend / plain:.3f}   backward {passes.attend_backward / plain:.3f}"
    )
    print(f"  shared by the rows of a sample {passes.shared / plain:.3f}")
    print(
        f"  diffusers' forward    {passes.upstream_forward / plain:.3f}"
        f"   backward {passes.upstream_backward / plain:.3f}"
    )
    print()
    print("| refinements | this engine, TFLOP | diffusers, TFLOP | ratio |")
    print("|---|---|---|---|")
    for refinements in REFINEMENTS:
        mine, other = ours(passes, refinements), theirs(passes, refinements)
        print(f"| {refinements} | {mine / 1e12:.1f} | {other / 1e12:.1f} | {mine / other:.3f} |")
    print()
    print("| method | this engine, TFLOP | times stable-diffusion |")
    print("|---|---|---|")
    for method, denoise in (
        ("stable-diffusion", passes.denoise),
        ("composable-diffusion, two conjuncts", passes.composed),
        ("structure-diffusion", passes.structured),
    ):
        print(f"| {method} | {STEPS * denoise / 1e12:.1f} | {denoise / passes.denoise:.3f} |")


if __name__ == "__main__":
    main()
