"""Pipelines as other people's code has them: what diffusers' own pipeline takes is taken, and afterwards all is
as it was."""

from __future__ import annotations

import gc
import threading
from contextlib import closing

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    CustomDiffusionAttnProcessor,
    IPAdapterAttnProcessor2_0,
)

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.errors import ModelError
from tests.conftest import small_pipeline
from tests.sampling.test_paper import difference

CONFIG = GuidanceConfig(num_inference_steps=3, max_iter_to_alter=2, thresholds={0: 0.3})
FAST = GuidanceConfig(num_inference_steps=1, max_iter_to_alter=1, thresholds={})
PROMPT, SUBJECTS = "a red circle and a star", ["red circle", "star"]
GUIDED = Request(PROMPT, SUBJECTS, seed=1)
PLAIN = Request(PROMPT, SUBJECTS, seed=1, method="stable-diffusion")


def latents(pipe, config: GuidanceConfig = CONFIG) -> tuple[torch.Tensor, torch.Tensor]:
    results = list(Engine.from_pipeline(pipe, slots=1).generate([GUIDED, PLAIN], config))
    assert [result.error for result in results] == [None, None]
    return results[0].latents, results[1].latents


def free_u(pipe) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def decoded_in_parts(pipe) -> None:
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()


@pytest.fixture(scope="module")
def guided() -> torch.Tensor:
    return latents(small_pipeline().to(torch.float64))[0]


@pytest.mark.parametrize(
    "prepare",
    [
        lambda pipe: pipe.enable_attention_slicing(1),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
        lambda pipe: pipe.fuse_qkv_projections(),
        lambda pipe: pipe.unet.enable_gradient_checkpointing(),
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
        decoded_in_parts,
        free_u,
    ],
    ids=["slicing", "plain", "fused", "checkpoints", "offload", "last", "parts", "freeu"],
)
def test_what_diffusers_pipeline_takes_is_taken(prepare, guided):
    pipe = small_pipeline().to(torch.float64)
    prepare(pipe)
    before = pipe.unet.attn_processors
    ours, plain = latents(pipe)
    assert pipe.unet.attn_processors == before
    theirs = pipe(
        PROMPT,
        num_inference_steps=3,
        generator=torch.Generator("cpu").manual_seed(1),
        output_type="latent",
    ).images[0]
    assert difference(plain, theirs) < 1e-9
    assert (difference(ours, guided) < 1e-9) == (prepare is not free_u)


def test_a_compiled_network_is_compiled_once_and_not_for_guidance():
    """One block of it, which a layer that guidance reads is in."""
    pipe = small_pipeline()
    engine = Engine.from_pipeline(pipe, slots=1)
    unseen = Request(PROMPT, seed=1, method="stable-diffusion")
    requests = [GUIDED, unseen, GUIDED, unseen]
    expected = [result.latents for result in engine.generate(requests, FAST)]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.compile(backend=backend, fullgraph=True)
    for request, theirs in zip(requests, expected, strict=True):
        (result,) = engine.generate(request, FAST)
        assert result.error is None
        assert difference(result.latents, theirs) < 1e-5
    assert len(graphs) == 1


def custom_diffusion(pipe) -> None:
    pipe.unet.set_attn_processor(CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False))


def ip_adapter(pipe) -> None:
    modules = dict(pipe.unet.named_modules())
    processors = dict(pipe.unet.attn_processors)
    for name in processors:
        if "mid_block" in name and "attn2" in name:  # not the first layer
            layer = modules[name.removesuffix(".processor")]
            processors[name] = IPAdapterAttnProcessor2_0(layer.inner_dim, 32)
    pipe.unet.set_attn_processor(processors)


def parallel(pipe) -> None:
    pipe.unet = torch.nn.DataParallel(pipe.unet)


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (custom_diffusion, "CustomDiffusionAttnProcessor.*unload"),
        (ip_adapter, r"IPAdapterAttnProcessor2_0.*unload_ip_adapter\(\)"),
        (parallel, r"DataParallel.*pipe\.unet = pipe\.unet\.module"),
    ],
)
def test_what_cannot_be_guided_is_refused_and_nothing_is_changed(prepare, says):
    pipe = small_pipeline()
    prepare(pipe)
    unet = pipe.unet.module if prepare is parallel else pipe.unet
    before = unet.attn_processors
    with pytest.raises(ModelError, match=says):
        list(Engine.from_pipeline(pipe).generate(GUIDED, CONFIG))
    assert unet.attn_processors == before
    assert all(parameter.requires_grad for parameter in unet.parameters())


# --- one pipeline, several runs ---


def state(pipe) -> dict:
    networks = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    return {
        "processors": pipe.unet.attn_processors,
        "scheduler": {name: repr(value) for name, value in vars(pipe.scheduler).items()},
        **{
            name: [(one.requires_grad, one.dtype, one.device) for one in network.parameters()]
            for name, network in networks.items()
        },
        "modes": [
            (
                one.training,
                getattr(one, "gradient_checkpointing", None),
                len(one._forward_hooks),
                len(one._forward_pre_hooks),
            )
            for network in networks.values()
            for one in network.modules()
        ],
    }


@pytest.fixture
def pipe():
    """With some of its parameters frozen, and in training mode, which is not to change either."""
    pipe = small_pipeline()
    for parameter in pipe.unet.mid_block.parameters():
        parameter.requires_grad_(False)
    pipe.unet.up_blocks.train()
    return pipe


class Stop(BaseException):
    """As KeyboardInterrupt is, which would end the tests."""


def stops() -> None:
    raise Stop


def test_the_pipeline_is_as_it_was_however_a_run_ends(pipe):
    before = state(pipe)
    engine = Engine.from_pipeline(pipe, slots=2)

    list(engine.generate([GUIDED, PLAIN], FAST))
    assert state(pipe) == before

    results = engine.generate([GUIDED] * 9, FAST)
    next(results)
    assert state(pipe) != before
    results.close()
    assert state(pipe) == before

    results = engine.generate([GUIDED] * 9, FAST)
    next(results)
    cycle = [results]
    cycle.append(cycle)
    del results, cycle
    gc.collect()
    assert state(pipe) == before

    def broken():
        yield GUIDED
        raise KeyError("the reader broke")

    with pytest.raises(KeyError):
        list(engine.generate(broken(), FAST))
    assert state(pipe) == before

    handle = pipe.unet.mid_block.attentions[0].register_forward_pre_hook(lambda *_: stops())
    with pytest.raises(Stop):
        list(engine.generate([GUIDED], FAST))
    handle.remove()
    assert state(pipe) == before


def test_a_second_run_on_a_pipeline_is_refused_until_the_first_is_closed(pipe):
    before = state(pipe)
    engine = Engine.from_pipeline(pipe, slots=1)
    with closing(engine.generate([GUIDED] * 2, FAST)) as first:
        next(first)
        for other in (engine, Engine.from_pipeline(type(pipe)(**pipe.components))):
            with pytest.raises(ModelError, match=r"still sampling for another generate; take all"):
                next(other.generate(GUIDED, FAST))
        refused: list[BaseException] = []

        def elsewhere() -> None:
            try:
                next(engine.generate(GUIDED, FAST))
            except ModelError as error:
                refused.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert len(refused) == 1
        assert next(first).error is None, "the first goes on"
    assert state(pipe) == before
    assert [result.error for result in engine.generate(GUIDED, FAST)] == [None]


def test_the_pipeline_itself_may_run_between_two_results(pipe):
    pipe.unet.eval()
    how = {"num_inference_steps": 2, "output_type": "latent"}

    def theirs() -> torch.Tensor:
        return pipe(PROMPT, generator=torch.Generator("cpu").manual_seed(1), **how).images[0]

    alone = theirs()
    engine = Engine.from_pipeline(pipe, slots=1)
    expected = [result.latents for result in engine.generate([GUIDED] * 2, FAST)]
    with closing(engine.generate([GUIDED] * 2, FAST)) as results:
        first = next(results)
        assert torch.equal(theirs(), alone)
        second = next(results)
    assert torch.equal(torch.stack([first.latents, second.latents]), torch.stack(expected))


def test_a_text_is_encoded_again_in_the_next_run():
    pipe = small_pipeline()
    engine = Engine.from_pipeline(pipe)
    (before,) = engine.generate(PLAIN, FAST)
    with torch.no_grad():
        for parameter in pipe.text_encoder.parameters():
            parameter.mul_(1.5)
    (after,) = engine.generate(PLAIN, FAST)
    (expected,) = Engine.from_pipeline(pipe).generate(PLAIN, FAST)
    assert torch.equal(after.latents, expected.latents)
    assert not torch.equal(after.latents, before.latents)


# --- what callers set in torch ---


def test_a_run_takes_and_keeps_what_its_caller_set_in_torch():
    pipe = small_pipeline()
    expected = torch.stack(latents(pipe))
    before = torch.get_rng_state()
    with torch.inference_mode():
        results = Engine.from_pipeline(pipe, slots=1).generate([GUIDED, PLAIN], CONFIG)
        inference = [next(results)]
        assert torch.is_inference_mode_enabled()
        inference += results
    torch.set_default_dtype(torch.float64)
    try:
        double = torch.stack(latents(pipe))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.stack([result.latents for result in inference]), expected)
    assert torch.equal(double, expected)


def test_weights_that_were_loaded_in_inference_mode_are_refused():
    with torch.inference_mode():
        pipe = small_pipeline()
    with pytest.raises(
        ModelError, match=r"loaded inside torch.inference_mode\(\).*load it outside"
    ):
        list(Engine.from_pipeline(pipe).generate(GUIDED, FAST))


def test_a_tokenizer_without_a_limit_is_refused_in_a_sentence():
    pipe = small_pipeline()
    pipe.tokenizer.model_max_length = int(1e30)  # what transformers makes of none
    with pytest.raises(ModelError, match=r"set pipe\.tokenizer\.model_max_length = 16"):
        Engine.from_pipeline(pipe)
