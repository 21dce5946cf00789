"""The recorder: whose maps it reads, and where it stops a forward."""

from __future__ import annotations

import pytest
import torch

from aae_batch.errors import ModelError
from aae_batch.sampling.model.attention_layers import cross_attention_layers, values_from
from aae_batch.sampling.model.recorder import AttentionRecorder, Layer
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
