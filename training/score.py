"""Does guidance work on the embedded model? `python -m training.score --help`.

Four ways from the same noise: a single thing; two things by plain sampling; by Attend-and-Excite;
and the control, which makes as many latent updates of the same lengths at the same steps, but in
random directions. Whether a thing is drawn, the detector says.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from aae_batch import Engine, GuidanceConfig, Request, Result
from aae_batch.methods import DEFAULT, METHODS
from aae_batch.sampling.engine import Batch
from aae_batch.sampling.sample import Sample
from aae_batch.shapes.detector import judge
from aae_batch.shapes.splits import SPLITS, Split
from aae_batch.shapes.world import THINGS, Thing, caption

SINGLES = tuple((thing,) for thing in THINGS)


@dataclass(frozen=True)
class Score:
    """One picture, judged. `drawn` and `bound`: all of its things are there, and in their colours. `met`:
    at every threshold's step the attention of every subject had reached it."""

    prompt: str
    seed: int
    drawn: bool
    bound: bool
    some: bool
    junk: int
    refinements: int
    met: bool


class _Recording(Batch):
    """Notes the length of every latent update that guidance makes."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.lengths: dict[tuple[str | None, int], list[float]] = defaultdict(list)

    def excite(self, samples: list[Sample]) -> list[Result]:
        before = [sample.latents for sample in samples]
        failed = super().excite(samples)
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

    def excite(self, samples: list[Sample]) -> list[Result]:
        for sample in samples:
            for length in self.lengths[sample.request.id, sample.step]:
                direction = torch.randn(sample.latents.shape, generator=self.random)
                direction *= length / direction.norm()
                sample.latents = sample.latents + direction.to(sample.latents)
            sample.progress.done = True
        return []


def requests_for(wanted: Iterable[tuple[Sequence[Thing], Iterable[int]]]) -> list[Request]:
    """A request for each of the things that a picture should show, and each of their seeds."""
    return [
        Request(
            caption(named),
            subjects=[str(thing) for thing in named],
            seed=seed,
            id=f"{caption(named)}/{seed}",
        )
        for named, seeds in wanted
        for seed in seeds
    ]


def requests_of(split: Split) -> list[Request]:
    return requests_for((pair, split.seeds_of(i)) for i, pair in enumerate(split.pairs))


def score_results(
    results: Iterator[Result], things: dict[str, Sequence[Thing]], thresholds: Mapping[int, float]
) -> list[Score]:
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
                met=all(
                    subject.max_attention[step] >= threshold
                    for subject in result.attention.subjects
                    for step, threshold in thresholds.items()
                ),
            )
        )
    return sorted(scores, key=lambda score: (score.prompt, score.seed))


def compare(
    engine: Engine, config: GuidanceConfig, split: Split, ways: Sequence[str]
) -> dict[str, list[Score]]:
    """Score each of `ways` on the same prompts and seeds: plain, guided, control, or a method's name."""
    things: dict[str, Sequence[Thing]] = {caption(pair): pair for pair in split.pairs}
    requests = requests_of(split)
    goals = config.steering(DEFAULT).thresholds
    scores = {}
    if "plain" in ways:
        plain = config.updated(method="stable-diffusion")
        scores["plain"] = score_results(engine.generate(requests, plain), things, goals)
    for method in [way for way in ways if way in METHODS]:
        named = config.updated(method=method)
        scores[method] = score_results(engine.generate(requests, named), things, goals)
    if "guided" in ways or "control" in ways:
        with engine.model.recording_maps(config):
            recording = _Recording(engine.model, config, engine.slots)
            scores["guided"] = score_results(recording.run(requests), things, goals)
            if "control" in ways:
                control = _Control(recording.lengths, engine.model, config, engine.slots)
                scores["control"] = score_results(control.run(requests), things, goals)
    return scores


def score_singles(engine: Engine, config: GuidanceConfig, split: Split) -> list[Score]:
    """Every thing alone, by plain sampling, with as many seeds as a pair of the split has."""
    things: dict[str, Sequence[Thing]] = {caption(named): named for named in SINGLES}
    requests = requests_for((named, split.seeds_of(i)) for i, named in enumerate(SINGLES))
    plain = config.updated(method="stable-diffusion")
    return score_results(engine.generate(requests, plain), things, {})


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
        "| | images | both shapes | both, colours right | at least one | junk per image | refinements | thresholds met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, some in scores.items():
        cells = [_percent(interval(some, None, field)) for field in ("drawn", "bound", "some")]
        junk = np.mean([score.junk for score in some])
        refinements = met = ""
        if way == "guided" or (way in METHODS and METHODS[way].is_guided):
            refinements = f"{np.mean([score.refinements for score in some]):.1f}"
            met = f"{100 * np.mean([score.met for score in some]):.1f} %"
        lines.append(
            f"| {way} | {len(some)} | {' | '.join(cells)} | {junk:.3f} | {refinements} | {met} |"
        )
    for way, base in (("guided", "plain"), ("guided", "control"), ("control", "plain")):
        if way in scores and base in scores:
            cells = [
                _percent(interval(scores[way], scores[base], field), sign="+")
                for field in ("drawn", "bound", "some")
            ]
            more, low, high = interval(scores[way], scores[base], "junk")
            lines.append(
                f"| {way} minus {base} | | {' | '.join(cells)} | {more:+.3f} ({low:.3f} to {high:.3f}) | | |"
            )
    return "\n".join(lines)


def _percent(values: tuple[float, float, float], sign: str = "") -> str:
    mean, low, high = (100 * value for value in values)
    return f"{mean:{sign}.1f} % ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.score",
        description="Measure how often the embedded model draws what its prompt names.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", default="shapes", help="'shapes', or the folder of another training run"
    )
    parser.add_argument(
        "--split", default="report", choices=list(SPLITS), help="which prompts and seeds"
    )
    parser.add_argument(
        "--ways",
        default="single,plain,guided,control",
        help=f"what to measure, also by method: {', '.join(METHODS)}",
    )
    parser.add_argument("--prompts", type=int, help="only so many prompts of the split")
    parser.add_argument("--slots", type=int, default=16, help="pictures at a time")
    parser.add_argument(
        "--set", default="{}", help="settings to change, as JSON, e.g. '{\"scale_factor\": 5}'"
    )
    options = parser.parse_args()

    engine = Engine.from_pretrained(options.model, slots=options.slots)
    config = engine.defaults.updated(**json.loads(options.set))
    ways, split = options.ways.split(","), SPLITS[options.split]
    scores = {}
    if "single" in ways:
        scores["single"] = score_singles(engine, config, split)
    scores |= compare(engine, config, replace(split, pairs=split.pairs[: options.prompts]), ways)
    print(table(scores))


if __name__ == "__main__":
    main()
