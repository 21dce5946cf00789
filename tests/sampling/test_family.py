"""Every guided method against its paper's equation in plain loops (`family_oracle.py`): the objective on maps of
noise, and the whole way of a sample, alone and in a batch of all methods at different steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.methods import METHODS, Method, NoiseSearch
from aae_batch.sampling.objectives.maps import normalize_over_words, otsu_mask
from aae_batch.sampling.objectives.seen import Seen
from aae_batch.sampling.words import Subject
from tests.conftest import small_pipeline
from tests.family_oracle import LOSSES, Asked, Phrase, otsu
from tests.oracle import Search, nurse
from tests.sampling.test_paper import difference

GUIDED = sorted(name for name, method in METHODS.items() if method.is_guided)


def test_every_guided_method_has_an_oracle():
    assert sorted(LOSSES) == GUIDED


# --- the objectives, on maps of noise ---

HEIGHT, WIDTH, TOKENS = 3, 4, 16
SHOWN = [
    [Phrase((3,), ((2,),)), Phrase((7,), ((6,),))],
    [Phrase((3, 4), ((1,), (2,))), Phrase((6,)), Phrase((9,), ((8,),))],
    [Phrase((5,), ((3,), (4,)))],
    [Phrase((2,), ((1,),)), Phrase((4, 5), ((3,),)), Phrase((7,)), Phrase((8,))],
]
"""Pictures of different numbers of subjects and words, with words of several tokens."""
ENDS = [9, 11, 7, 10]


def subject(phrase: Phrase) -> Subject:
    tokens = tuple(sorted(phrase.tokens))
    return Subject("", tokens, ("",) * len(tokens), phrase.noun, phrase.modifiers)


def noise_maps(seed: int, *, apart: bool = False) -> tuple[Tensor, Tensor]:
    """Cross-attention and self-attention of each picture.

    Args:
        apart: each noun has columns to itself, and all places attend to much the same: subjects are in
            conflict, and none is neglected.
    """
    generator = torch.Generator().manual_seed(seed)
    some = partial(torch.randn, generator=generator, dtype=torch.float64)
    places = HEIGHT * WIDTH
    maps = 0.2 * some(len(SHOWN), HEIGHT, WIDTH, TOKENS)
    affinity = (0.5 if apart else 2) * some(len(SHOWN), places, places)
    if apart:
        for row, shown in enumerate(SHOWN):
            for column in range(WIDTH):
                maps[row, :, column, shown[column * len(shown) // WIDTH].noun[0]] += 1.0
    return maps.softmax(dim=-1).requires_grad_(), affinity.softmax(dim=-1).requires_grad_()


def judge(
    method: str,
    pooling: str,
    rows: Sequence[int],
    step: int,
    memory: list[dict],
    maps: Tensor,
    affinity: Tensor,
) -> tuple[Tensor, Tensor]:
    """What the package says of some of the pictures."""
    ends = torch.tensor([ENDS[row] for row in rows])
    places = torch.arange(maps.shape[-1])
    prompt = (places > 0) & (places < ends[:, None])
    objective = METHODS[method].load_objective()
    assert objective is not None
    return objective(
        Seen(
            maps,
            normalize_over_words(maps, prompt),
            prompt,
            [[subject(phrase) for phrase in SHOWN[row]] for row in rows],
            pooling,
            [step] * len(rows),
            memory,
            affinity,
        )
    )


EVERY = range(len(SHOWN))
objectives = pytest.mark.parametrize("method", GUIDED)


@objectives
@pytest.mark.parametrize("pooling", ["sum", "max"])
def test_loss_and_gradient_are_the_papers(method, pooling):
    """Over three steps, the second of which is seen twice, and in the last one conflict is what counts."""
    memory: list[dict] = [{} for _ in EVERY]
    asked = [
        Asked(shown, end, slice(1, end), pooling) for shown, end in zip(SHOWN, ENDS, strict=True)
    ]
    for seed, step in enumerate([0, 1, 1, 2]):
        maps, affinity = noise_maps(seed, apart=step == 2)
        losses, reached = judge(method, pooling, EVERY, step, memory, maps, affinity)
        gradients = torch.autograd.grad(losses.sum(), [maps, affinity], materialize_grads=True)
        for row in EVERY:
            loss, come = LOSSES[method](maps[row], affinity[row], step, asked[row])
            assert losses[row].item() == pytest.approx(loss.item(), rel=1e-9, abs=1e-12)
            assert reached[row].item() == pytest.approx(come.item(), rel=1e-9, abs=1e-12)
            theirs = torch.autograd.grad(loss, [maps, affinity], materialize_grads=True)
            for ours, own in zip(gradients, theirs, strict=True):
                assert torch.allclose(ours[row], own[row], rtol=1e-7, atol=1e-10)


@objectives
def test_the_gradient_is_that_of_finite_differences(method):
    memory: list[dict] = [{} for _ in EVERY]
    with torch.no_grad():
        judge(method, "sum", EVERY, 0, memory, *noise_maps(0))

    def losses(maps: Tensor, affinity: Tensor) -> Tensor:
        return judge(method, "sum", EVERY, 1, memory, maps, affinity)[0]

    torch.manual_seed(0)  # of the direction it looks in
    assert torch.autograd.gradcheck(losses, noise_maps(1), fast_mode=True)


def test_conform_takes_the_maps_of_the_step_before_as_constants():
    memory: list[dict] = [{} for _ in EVERY]
    before, now = noise_maps(0), noise_maps(1)
    judge("conform", "sum", EVERY, 0, memory, *before)
    losses, _ = judge("conform", "sum", EVERY, 1, memory, *now)
    alone, _ = judge("conform", "sum", EVERY, 1, [{} for _ in EVERY], *now)
    assert (losses != alone).any()
    (gradient,) = torch.autograd.grad(losses.sum(), before[0], allow_unused=True)
    assert gradient is None


@objectives
def test_no_rows_loss_depends_on_another_row(method):
    maps, affinity = noise_maps(0)
    losses, reached = judge(method, "sum", EVERY, 0, [{} for _ in EVERY], maps, affinity)
    for row in EVERY:
        others = [other for other in EVERY if other != row]
        for gradient in torch.autograd.grad(
            losses[row], [maps, affinity], retain_graph=True, materialize_grads=True
        ):
            assert (gradient[others] == 0).all()
        one = slice(row, row + 1)
        loss, come = judge(method, "sum", [row], 0, [{}], maps[one], affinity[one])
        assert loss.item() == pytest.approx(losses[row].item(), rel=1e-12, abs=1e-14)
        assert come.item() == pytest.approx(reached[row].item(), rel=1e-12, abs=1e-14)


def test_the_bright_part_of_a_map_is_otsus():
    maps = torch.rand(200, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps = maps ** torch.arange(1, 201)[:, None, None].div(20)  # from even to a single bright place
    maps[::3] = maps[::3].round(decimals=1)  # with equal places
    for map, bright in zip(maps, otsu_mask(maps), strict=True):
        assert torch.equal(bright, map > otsu(map.flatten().tolist()))


# --- whole samples ---

ODD = {
    "max_iter_to_alter": 2,
    "max_refinement_steps": 3,
    "scale_factor": 13.0,
    "scale_range": (2.0, 0.3),
    "guidance_scale": 2.5,
    "negative_prompt": "a star",
}


@dataclass(frozen=True)
class Case:
    """A prompt, and settings other than the defaults.

    Attributes:
        subjects: as a request names them, and the positions they stand at.
        thresholds: by method. Some steps are on target at once, some after two refinements, some never.
        searches: for the start noise, by method. One succeeds in its first round, one in its second, two never;
            two are drawn back to the normal distribution.
    """

    version: int
    prompt: str
    subjects: dict[str, Phrase]
    size: tuple[int, int]
    map_size: tuple[int, int]
    pooling: str
    scheduler: type | None
    thresholds: dict[str, dict[int, float]]
    searches: dict[str, NoiseSearch]

    def requests(self) -> list[Request]:
        height, width = self.size
        return [
            Request(
                self.prompt,
                subjects=list(self.subjects),
                method=method,
                seed=30 + number,
                num_inference_steps=4 + number % 3,
                height=8 * height,
                width=8 * width,
            )
            for number, method in enumerate([*GUIDED, "stable-diffusion"])
        ]

    def neighbours(self) -> list[Request]:
        """Rows that share forwards with those of `requests`, and have more subjects and words."""
        one = Request(
            "a star and a green cross and a blue square",
            subjects=["star", "green cross", "blue square"],
            num_inference_steps=3,
            height=8 * self.size[0],
            width=8 * self.size[1],
        )
        methods = ("composable-diffusion", "conform", "initno", "syngen")
        return [replace(one, method=method) for method in methods]

    def config(self) -> GuidanceConfig:
        return GuidanceConfig(
            **ODD,
            subject_pooling=self.pooling,
            scheduler=None if self.scheduler is None else self.scheduler.__name__,
            by_method={
                name: {"thresholds": thresholds} for name, thresholds in self.thresholds.items()
            },
        )

    def paper(self, pipe, request: Request) -> tuple[Tensor, int]:
        """The final latents and the refinements by the oracle."""
        method = request.method or ""
        end = len(pipe.tokenizer(self.prompt).input_ids) - 1
        last = end if self.version == 2 else pipe.tokenizer.model_max_length - 1
        asked = Asked(list(self.subjects.values()), end, slice(1, last), self.pooling)
        guided = method in LOSSES
        plan = self.searches.get(method)
        return nurse(
            pipe,
            self.prompt,
            partial(LOSSES.get(method, LOSSES["attend-and-excite"]), asked=asked),
            seed=request.seed,
            steps=request.num_inference_steps or 0,
            size=self.size,
            map_size=self.map_size,
            thresholds=self.thresholds.get(method, {}),
            guided_steps=ODD["max_iter_to_alter"] if guided else 0,
            guidance_scale=ODD["guidance_scale"],
            scale_factor=ODD["scale_factor"],
            scale_range=ODD["scale_range"],
            most_refinements=ODD["max_refinement_steps"],
            negative_prompt=ODD["negative_prompt"],
            scheduler=self.scheduler and self.scheduler.from_config(pipe.scheduler.config),
            search=plan and Search(**vars(plan)),
        )


PAIR = Case(
    version=1,
    prompt="a red circle and a blue square",
    subjects={"red circle": Phrase((3,), ((2,),)), "blue square": Phrase((7,), ((6,),))},
    size=(9, 13),
    map_size=(3, 4),
    pooling="sum",
    scheduler=None,
    thresholds={
        "attend-and-excite": {1: 0.5, 3: 0.9},
        "conform": {1: 0.23, 3: 0.9},
        "divide-and-bind": {1: 0.1, 3: 0.9},
        "focus": {1: 0.9, 3: 0.5},
        "initno": {1: 0.5, 3: 0.9},
        "predicated": {1: 0.4, 3: 0.9},
        "self-cross": {1: 0.5, 3: 0.9},
        "syngen": {1: 0.9, 3: 0.4},
    },
    searches={
        "initno": NoiseSearch(2, 3, 0.03, 0.99, 0.0002),
        "self-cross": NoiseSearch(2, 3, 0.03, 0.492, 0.1),
    },
)
UNEVEN = Case(
    version=2,
    prompt="a red blue circle and a star",
    subjects={"red blue circle": Phrase((4,), ((2,), (3,))), "star": Phrase((7,))},
    size=(16, 16),
    map_size=(4, 4),
    pooling="max",
    scheduler=EulerDiscreteScheduler,
    thresholds={
        "attend-and-excite": {1: 0.4, 3: 0.9},
        "conform": {1: 0.9, 3: 0.5},
        "divide-and-bind": {1: 0.1, 3: 0.9},
        "focus": {1: 0.495, 3: 0.9},
        "initno": {1: 0.6, 3: 0.9},
        "predicated": {1: 0.52, 3: 0.9},
        "self-cross": {1: 0.5, 3: 0.9},
        "syngen": {1: 0.215, 3: 0.9},
    },
    searches={
        "initno": NoiseSearch(2, 3, 0.03, 0.405, 0.1),
        "self-cross": NoiseSearch(2, 3, 0.03, 0.99, 0.0002),
    },
)


@pytest.mark.parametrize("case", [PAIR, UNEVEN], ids=["pair", "uneven"])
def test_a_sample_is_guided_as_its_paper_does_alone_and_beside_all_others(case, monkeypatch):
    pipe = small_pipeline(version=case.version).to(torch.float64)
    for name, plan in case.searches.items():
        monkeypatch.setitem(METHODS, name, replace(METHODS[name], start=plan))
    requests = case.requests()
    theirs = {request.method: case.paper(pipe, request) for request in requests}
    for slots, others in ((1, []), (4, case.neighbours())):
        engine = Engine.from_pipeline(pipe, slots=slots)
        rows = sorted([*others, *requests], key=lambda row: row.method)
        results = list(engine.generate(rows, case.config()))
        results = [result for result in results if result.request not in others]
        assert len(results) == len(requests)
        for result in results:
            latents, refinements = theirs[result.request.method]
            assert result.error is None
            assert result.attention.num_refinements == refinements, result.request.method
            assert difference(result.latents, latents) < 1e-9, result.request.method


# --- nothing goes on for ever ---


@pytest.mark.parametrize("never", [-float("inf"), float("nan"), 0.0])
def test_a_target_that_is_never_reached_ends_all_the_same(never, monkeypatch):
    """Of an objective whose loss falls without bound, as SynGen's may."""

    def falling(seen: Seen) -> tuple[Tensor, Tensor]:
        loss = -seen.maps.sum(dim=(1, 2, 3)) - seen.least_excitation
        return loss, torch.full_like(loss, never)

    search = NoiseSearch(rounds=2, steps=3)
    monkeypatch.setitem(METHODS, "falling", Method("", objective=falling, start=search))
    config = GuidanceConfig(
        method="falling",
        num_inference_steps=3,
        thresholds={0: 1.0, 2: 1.0},
        max_refinement_steps=2,
        scale_factor=1.0,
    )
    forwards = (
        2 * 3 + 2 * (2 + 1) + 1
    )  # of the search, of two steps that refine, of one that does not
    with Engine.from_pipeline(small_pipeline(), slots=1).open(config) as batch:
        batch.add(Request(PAIR.prompt, subjects=["circle"], height=64, width=64))
        results = [result for _ in range(forwards) for result in batch.step()]
    (result,) = results
    assert result.error is None
    refinements = 0 if never != never else 2 * 2  # NaN is below no threshold
    assert result.attention.num_refinements == 2 * 3 + refinements


def test_no_method_refines_more_often_than_it_may(monkeypatch):
    """With targets that no map reaches, of eight rows at once."""
    config = GuidanceConfig(
        num_inference_steps=2,
        thresholds={0: 1.0, 1: 1.0},
        max_refinement_steps=2,
    )
    search = NoiseSearch(rounds=2, steps=2, target=1.0)
    for name in GUIDED:
        if METHODS[name].start is not None:
            monkeypatch.setitem(METHODS, name, replace(METHODS[name], start=search))
    requests = [
        Request(
            PAIR.prompt, subjects=list(PAIR.subjects), method=method, height=64, width=64, seed=7
        )
        for method in GUIDED
    ]
    results = Engine.from_pipeline(small_pipeline(), slots=8).generate(requests, config)
    made = {result.request.method: result.attention.num_refinements for result in results}
    searching = {"initno", "self-cross"}
    assert made == {name: 2 * 2 + (4 if name in searching else 0) for name in GUIDED}
