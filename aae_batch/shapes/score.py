"""Does guidance work on the embedded model? `python -m aae_batch.shapes.score --help`.

Four ways from the same noise: a single thing; two things by plain sampling; by Attend-and-Excite;
and the control, which makes as many latent updates of the same lengths at the same steps, but in
random directions. Whether a thing is drawn, the detector says.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from aae_batch import Engine, GuidanceConfig, Request, Result
from aae_batch.engine import Batch
from aae_batch.sample import Sample
from aae_batch.shapes.detector import judge
from aae_batch.shapes.world import PAIRS, THINGS, Thing, caption

Pair = tuple[Thing, Thing]


def prompts(split: str) -> list[Pair]:
    """Pairs of things, shuffled by a fixed seed: 60 to report on, and 40 others to choose settings with."""
    shuffled = list(PAIRS)
    Random("aae_batch prompts").shuffle(shuffled)
    return {"report": shuffled[:60], "tuning": shuffled[60:100]}[split]


SEEDS = {"report": range(1000, 1008), "tuning": range(4)}


@dataclass(frozen=True)
class Score:
    """One picture, judged. `drawn` and `bound`: all of its things are there, and in their colours."""

    prompt: str
    seed: int
    drawn: bool
    bound: bool
    some: bool
    junk: int
    refinements: int


class _Recording(Batch):
    """Notes the length of every latent update that guidance makes."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.lengths: dict[tuple[str | None, int], list[float]] = defaultdict(list)

    def _excite(self, samples: list[Sample]) -> list[Result]:
        before = [sample.latents for sample in samples]
        failed = super()._excite(samples)
        for sample, old in zip(samples, before, strict=True):
            length = float((sample.latents - old).norm())
            if length:
                self.lengths[sample.request.id, sample.step].append(length)
        return failed


class _Control(Batch):
    """Makes the updates of a recorded run in random directions."""

    def __init__(self, lengths: dict[tuple[str | None, int], list[float]], *arguments) -> None:
        super().__init__(*arguments)
        self.lengths = lengths
        self.random = torch.Generator().manual_seed(0)

    def _excite(self, samples: list[Sample]) -> list[Result]:
        for sample in samples:
            for length in self.lengths[sample.request.id, sample.step]:
                direction = torch.randn(sample.latents.shape, generator=self.random)
                direction *= length / direction.norm()
                sample.latents = sample.latents + direction.to(sample.latents)
            sample.progress.done = True
        return []


def requests_for(things: Iterable[Sequence[Thing]], seeds: Iterable[int]) -> list[Request]:
    return [
        Request(
            caption(named),
            subjects=[str(thing) for thing in named],
            seed=seed,
            id=f"{caption(named)}/{seed}",
        )
        for named in things
        for seed in seeds
    ]


def score_results(results: Iterator[Result], things: dict[str, Sequence[Thing]]) -> list[Score]:
    scores = []
    for result in results:
        if result.error:
            raise result.error
        assert result.image
        assert result.attention
        verdict = judge(result.image, things[result.request.prompt])
        scores.append(
            Score(
                prompt=result.request.prompt,
                seed=result.request.seed,
                drawn=all(verdict.drawn),
                bound=all(verdict.bound),
                some=any(verdict.drawn),
                junk=verdict.junk,
                refinements=result.attention.num_refinements,
            )
        )
    return sorted(scores, key=lambda score: (score.prompt, score.seed))


def compare(
    engine: Engine,
    config: GuidanceConfig,
    pairs: Sequence[Pair],
    seeds: Sequence[int],
    ways: Sequence[str],
) -> dict[str, list[Score]]:
    """Score each of `ways`, out of plain, guided and control, on the same prompts and seeds."""
    things: dict[str, Sequence[Thing]] = {caption(pair): pair for pair in pairs}
    requests = requests_for(pairs, seeds)
    scores = {}
    if "plain" in ways:
        plain = config.updated(method="stable-diffusion")
        scores["plain"] = score_results(engine.generate(requests, plain), things)
    if "guided" in ways or "control" in ways:
        with engine.model.recording_maps(config.attn_res):
            recording = _Recording(engine.model, config, engine.slots)
            scores["guided"] = score_results(recording.run(requests), things)
            if "control" in ways:
                control = _Control(recording.lengths, engine.model, config, engine.slots)
                scores["control"] = score_results(control.run(requests), things)
    return scores


def interval(
    scores: list[Score], baseline: list[Score] | None, field: str
) -> tuple[float, float, float]:
    """Mean of a field, or of its paired difference to a baseline, with its 95 % interval.

    The interval is a bootstrap over prompts, since pictures of one prompt are alike.
    """
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for i, score in enumerate(scores):
        value = float(getattr(score, field))
        by_prompt[score.prompt].append(
            value - float(getattr(baseline[i], field)) if baseline else value
        )
    means = np.array([np.mean(values) for values in by_prompt.values()])
    draws = np.random.default_rng(0).choice(means, size=(4000, len(means))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(means.mean()), float(low), float(high)


def table(scores: dict[str, list[Score]]) -> str:
    """The comparison as Markdown."""
    lines = [
        "| | pictures | both shapes | both, colours right | at least one | junk a picture | refinements |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, some in scores.items():
        cells = [_percent(interval(some, None, field)) for field in ("drawn", "bound", "some")]
        junk = np.mean([score.junk for score in some])
        refinements = np.mean([score.refinements for score in some])
        lines.append(
            f"| {way} | {len(some)} | {' | '.join(cells)} | {junk:.2f} | {refinements:.1f} |"
        )
    for way in ("plain", "control"):
        if way in scores and "guided" in scores:
            cells = [
                _percent(interval(scores["guided"], scores[way], field), sign="+")
                for field in ("drawn", "bound", "some")
            ]
            more, *_ = interval(scores["guided"], scores[way], "junk")
            lines.append(f"| guided minus {way} | | {' | '.join(cells)} | {more:+.2f} | |")
    return "\n".join(lines)


def _percent(values: tuple[float, float, float], sign: str = "") -> str:
    mean, low, high = (100 * value for value in values)
    return f"{mean:{sign}.1f} % ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m aae_batch.shapes.score",
        description="Measure how often the embedded model draws what its prompt names.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", default="shapes", help="'shapes', or the folder of another training run"
    )
    parser.add_argument(
        "--split", default="report", choices=["report", "tuning"], help="which prompts and seeds"
    )
    parser.add_argument("--ways", default="single,plain,guided,control", help="what to measure")
    parser.add_argument("--prompts", type=int, help="only so many prompts of the split")
    parser.add_argument("--slots", type=int, default=16, help="pictures at a time")
    parser.add_argument(
        "--set", default="{}", help="settings to change, as JSON, e.g. '{\"scale_factor\": 5}'"
    )
    options = parser.parse_args()

    engine = Engine.from_pretrained(options.model, slots=options.slots)
    config = engine.defaults.updated(**json.loads(options.set))
    ways, seeds = options.ways.split(","), SEEDS[options.split]
    scores = {}
    if "single" in ways:
        things: dict[str, Sequence[Thing]] = {caption([thing]): [thing] for thing in THINGS}
        requests = requests_for([[thing] for thing in THINGS], seeds)
        plain = config.updated(method="stable-diffusion")
        scores["single"] = score_results(engine.generate(requests, plain), things)
    pairs = prompts(options.split)[: options.prompts]
    scores |= compare(engine, config, pairs, list(seeds), ways)
    print(table(scores))


if __name__ == "__main__":
    main()
