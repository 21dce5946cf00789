"""The recorder: whose maps it reads, and where it stops a forward."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    ChromaTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.attention_processor import AttnProcessor
from torch.overrides import TorchFunctionMode

from aae_batch.errors import ModelError
from aae_batch.sampling.model.attention_layers import (
    cross_attention_layers,
    self_attention_layers,
    values_from,
)
from aae_batch.sampling.model.recorder import ALL, AttentionRecorder, Layer
from tests.conftest import small_pipeline


def forward(pipe, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, 16, 16, generator=generator)
    text = torch.randn(batch, 16, 32, generator=generator)
    with torch.no_grad():
        return pipe.unet(latents, torch.tensor([3] * batch), encoder_hidden_states=text).sample


def recorder_of(unet, level: int) -> AttentionRecorder:
    return AttentionRecorder([Layer(layer) for layer in cross_attention_layers(unet, level)])


def test_layers_are_found_in_the_order_they_run(sd1_pipeline):
    unet = sd1_pipeline.unet
    names = {module: name for name, module in unet.named_modules()}
    assert [names[layer].split(".attentions")[0] for layer in cross_attention_layers(unet, 2)] == [
        "down_blocks.2",
        "mid_block",
        "up_blocks.0",
        "up_blocks.0",
    ]


@pytest.mark.parametrize(("level", "queries"), [(0, 256), (1, 64), (2, 16)])
def test_maps_are_distributions_over_the_tokens(sd1_pipeline, level, queries):
    recorder = recorder_of(sd1_pipeline.unet, level)
    with recorder.recording():
        forward(sd1_pipeline)
    recorder.close()
    assert recorder.maps.shape == (2, queries, 16)
    assert torch.allclose(recorder.maps.sum(dim=-1), torch.ones(2, queries), atol=1e-5)


def test_recording_does_not_change_the_prediction(sd1_pipeline):
    plain = forward(sd1_pipeline)
    recorder = recorder_of(sd1_pipeline.unet, 2)
    idle = forward(sd1_pipeline)
    with recorder.recording(rows=slice(1, None)):
        recorded = forward(sd1_pipeline)
    recorder.close()
    assert torch.equal(plain, idle)
    assert torch.allclose(plain, recorded, atol=1e-5)
    assert recorder.maps.shape[0] == 1


def test_the_forward_stops_at_the_last_map(sd1_pipeline):
    reached = []
    hook = sd1_pipeline.unet.conv_out.register_forward_pre_hook(lambda *_: reached.append(1))
    recorder = recorder_of(sd1_pipeline.unet, 2)
    with recorder.recording(stop_early=True):
        forward(sd1_pipeline)
    recorder.close()
    hook.remove()
    assert not reached
    assert recorder.maps.shape == (2, 16, 16)


def test_maps_before_any_recording_are_an_error(sd1_pipeline):
    recorder = recorder_of(sd1_pipeline.unet, 2)
    recorder.close()
    with pytest.raises(RuntimeError, match="recording"):
        _ = recorder.maps


def test_values_of_the_same_text_change_nothing(sd1_pipeline):
    text = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = sd1_pipeline.unet(latents, 3, encoder_hidden_states=text).sample
        with values_from(sd1_pipeline.unet, text.clone()):
            same = sd1_pipeline.unet(latents, 3, encoder_hidden_states=text).sample
        with values_from(sd1_pipeline.unet, text.flip(1)):
            other = sd1_pipeline.unet(latents, 3, encoder_hidden_states=text).sample
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, other, atol=1e-3)


def test_values_of_another_text_leave_the_keys_as_they_are(sd1_pipeline):
    (layer, *_) = cross_attention_layers(sd1_pipeline.unet, 0)
    keys = []
    hook = layer.to_k.register_forward_hook(lambda module, arguments, made: keys.append(made))
    forward(sd1_pipeline)
    with values_from(sd1_pipeline.unet, torch.zeros(2, 16, 32)):
        forward(sd1_pipeline)
    hook.remove()
    assert torch.equal(*keys)


def test_values_are_those_of_the_prompt_again_after_an_exception(sd1_pipeline):
    plain = forward(sd1_pipeline)
    with pytest.raises(KeyError), values_from(sd1_pipeline.unet, torch.zeros(2, 16, 32)):
        raise KeyError("broken on the way")
    assert torch.equal(forward(sd1_pipeline), plain)


def test_fused_projections_are_refused_with_what_to_call():
    pipe = small_pipeline()
    pipe.fuse_qkv_projections(vae=False)
    with (
        pytest.raises(ModelError, match="unfuse_qkv_projections"),
        values_from(pipe.unet, torch.zeros(2, 16, 32)),
    ):
        pass


# --- against a dense softmax ---

TEXT = 5
PICTURE, WORDS = slice(TEXT, None), slice(TEXT)


class Dense(TorchFunctionMode):
    """Every attention of a forward as a dense softmax, [batch, heads, queries, keys], by its layer."""

    def __init__(self, layers) -> None:
        super().__init__()
        self.seen: dict[torch.nn.Module, torch.Tensor] = {}
        self.now = None
        self.hooks = [layer.register_forward_pre_hook(self._enter) for layer in layers]

    def _enter(self, layer, _) -> None:
        self.now = layer

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is F.scaled_dot_product_attention and self.now is not None:
            query, key = (arguments or (named["query"], named["key"]))[:2]
            scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
            if (mask := (named or {}).get("attn_mask")) is not None:
                scores = scores + mask
            self.seen[self.now] = scores.softmax(dim=-1)
            self.now = None
        return function(*arguments, **(named or {}))

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def stable_diffusion():
    unet = small_pipeline().unet.double()
    text = normal(2, 16, 32)
    layers = [Layer(layer) for layer in cross_attention_layers(unet, 1)]
    layers += [Layer(layer, keys=None) for layer in self_attention_layers(unet, 1)]

    def forward(latents):
        unet(latents, torch.tensor([3, 700]), encoder_hidden_states=text)

    return unet, layers, normal(2, 4, 16, 16), forward


def stable_diffusion_3():
    network = SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).double()
    blocks = network.transformer_blocks[:2]
    layers = [Layer(block.attn, slice(16), slice(16, None)) for block in blocks]
    layers.append(Layer(blocks[0].attn2, keys=None))

    def forward(latents):
        network(
            hidden_states=latents,
            encoder_hidden_states=normal(2, TEXT, 16),
            pooled_projections=normal(2, 12),
            timestep=torch.tensor([300.0, 700.0]).double(),
        )

    return network, layers, normal(2, 4, 4, 4), forward


def flux():
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
    ).double()
    blocks = [*network.transformer_blocks, network.single_transformer_blocks[0]]
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0))

    def forward(latents):
        network(
            hidden_states=latents,
            encoder_hidden_states=normal(2, TEXT, 16),
            pooled_projections=normal(2, 12),
            timestep=torch.tensor([0.3, 0.7]).double(),
            img_ids=places,
            txt_ids=torch.zeros(TEXT, 3),
        )

    return (
        network,
        [Layer(block.attn, PICTURE, WORDS) for block in blocks],
        normal(2, 12, 4),
        forward,
    )


def chroma():
    """With a mask of each row's own."""
    network = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ).double()
    mask = torch.ones(2, TEXT + 12)
    mask[0, 3:TEXT] = mask[1, 2:TEXT] = 0
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0))

    def forward(latents):
        network(
            hidden_states=latents,
            encoder_hidden_states=normal(2, TEXT, 16),
            timestep=torch.tensor([0.3, 0.7]).double(),
            img_ids=places,
            txt_ids=torch.zeros(TEXT, 3),
            attention_mask=mask.double(),
        )

    layers = [
        Layer(block.attn, PICTURE, WORDS, with_affinity=True)
        for block in network.transformer_blocks
    ]
    return network, layers, normal(2, 12, 4), forward


def joint(make):
    """That model, with the affinity of the picture's part of its joint attention."""
    network, layers, latents, forward = make()
    layers = [replace(one, with_affinity=True) for one in layers if one.keys is not None]
    return network, layers, latents, forward


@pytest.mark.parametrize("columns", [None, (1, 3)], ids=["", "columns"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    "made",
    [
        stable_diffusion,
        stable_diffusion_3,
        flux,
        chroma,
        partial(joint, stable_diffusion_3),
        partial(joint, flux),
    ],
    ids=["sd", "sd3", "flux", "chroma", "sd3-affinity", "flux-affinity"],
)
def test_maps_and_gradients_are_those_of_a_dense_softmax(made, checkpointing, columns):
    """And of chosen tokens alone, over all keys too."""
    torch.manual_seed(0)
    network, layers, latents, forward = made()
    network.requires_grad_(False)
    start = latents.clone().requires_grad_(True)
    with Dense([layer.module for layer in layers]) as dense:
        forward(start)
    text = [layer for layer in layers if layer.keys is not None]
    maps = [dense.seen[one.module][:, :, one.queries, one.keys].mean(1) for one in text]
    expected = [torch.stack(maps).mean(0)]
    if columns is not None and text[0].keys != ALL:
        others = [i for i in range(TEXT) if i not in columns]
        expected[0] = expected[0].index_fill(-1, torch.tensor(others), 0)
    own = [dense.seen[one.module] for one in layers if one.keys is None]
    for one in layers:
        if one.with_affinity:
            among = dense.seen[one.module][:, :, one.queries, one.queries]
            own.append(among / among.sum(dim=-1, keepdim=True))
    if own:
        expected.append(torch.cat(own, dim=1).mean(1)[1:])

    if checkpointing:
        network.enable_gradient_checkpointing()
        network.train()  # diffusers checkpoints in no other mode
    recorder = AttentionRecorder(layers)
    again = latents.clone().requires_grad_(True)
    with recorder.recording(affinity_rows=slice(1, None), stop_early=True, columns=columns):
        forward(again)
    recorded = [recorder.maps] if len(expected) == 1 else [recorder.maps, recorder.affinity]
    weights = [normal(*map.shape) for map in expected]
    losses = [
        sum((map * weight).sum() for map, weight in zip(some, weights, strict=True))
        for some in (expected, recorded)
    ]
    (theirs,) = torch.autograd.grad(losses[0], start)
    (ours,) = torch.autograd.grad(losses[1], again)
    recorder.close()
    for map, other in zip(recorded, expected, strict=True):
        assert (map - other).abs().max() < 1e-12
    assert (ours - theirs).abs().max() < 1e-12 * theirs.abs().max()
    assert theirs.abs().max() > 1e-3


def test_attention_that_does_not_go_through_torchs_function_is_refused():
    pipe = small_pipeline()

    class Twice(AttnProcessor):
        pass

    pipe.unet.set_attn_processor(Twice())
    recorder = recorder_of(pipe.unet, 2)
    with pytest.raises(ModelError, match=r"\(Twice\).*set_default"), recorder.recording():
        forward(pipe)
    recorder.close()
