"""A row is decided once: engine, validate, dry run and writer say the same of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from aae_batch import Engine, GuidanceConfig, Request
from aae_batch.columns import OVERRIDES
from aae_batch.dataset.writer import as_used
from aae_batch.errors import RowError, SettingsError
from aae_batch.generate import dry_run
from aae_batch.generate.settings import JobSettings
from aae_batch.manifest.judge import Judge
from aae_batch.manifest.reader import open_manifest
from aae_batch.manifest.row import read_row
from aae_batch.manifest.validate import Problem, validate
from aae_batch.methods import METHODS
from aae_batch.sampling.families import SIZES
from aae_batch.sampling.resolve import as_read, resolve
from aae_batch.sampling.sample import admit
from tests.conftest import small_pipeline

PROMPT = {"prompt": "a red circle and a blue square"}
NAMED = PROMPT | {"subjects": ["circle"]}
LONG = "a red circle and a blue square and a green star and a yellow cross and a red star"

BAD = {
    "no-prompt": ({}, "RequestError", "column prompt: is empty"),
    "blank": ({"prompt": " "}, "PromptError", "column prompt: is blank"),
    "prompt-type": ({"prompt": 7}, "RequestError", "column prompt: 7 is not text"),
    "no-subject": (PROMPT, "PromptError", "no subject is named"),
    "no-subjects": (PROMPT | {"subjects": []}, "PromptError", "no subject is named"),
    "not-there": (PROMPT | {"subjects": ["star"]}, "SubjectError", "'star' is not in the prompt"),
    "twice": (PROMPT | {"subjects": ["circle"] * 2}, "SubjectError", "in the prompt only once"),
    "no-words": (PROMPT | {"subjects": [""]}, "SubjectError", "has no words"),
    "cut-off": ({"prompt": LONG, "subjects": ["cross"]}, "SubjectError", "is cut off"),
    "plain-not-there": (
        PROMPT | {"subjects": ["star"], "method": "stable-diffusion"},
        "SubjectError",
        "'star' is not in the prompt",
    ),
    "start": (PROMPT | {"token_indices": [0]}, "SubjectError", "index 0 is the start token"),
    "end": (PROMPT | {"token_indices": [8]}, "SubjectError", "index 8 is the end token"),
    "padding": (PROMPT | {"token_indices": [9]}, "SubjectError", "index 9 is padding"),
    "outside": (PROMPT | {"token_indices": [99]}, "SubjectError", "is outside the 16 positions"),
    "negative-index": (PROMPT | {"token_indices": [-1]}, "SubjectError", "is outside"),
    "empty-index": (PROMPT | {"token_indices": [[]]}, "SubjectError", "has an empty subject"),
    "disagree": (NAMED | {"token_indices": [2]}, "SubjectError", "but token_indices say"),
    "small": (NAMED | {"height": 16}, "RequestError", "height is 16; it must be"),
    "narrow": (NAMED | {"width": 24}, "RequestError", "width is 24; it must be"),
    "odd-size": (NAMED | {"height": 100}, "RequestError", "100 is not a multiple of 8"),
    "huge": (NAMED | {"width": 10**6}, "RequestError", "is too large"),
    "steps": (NAMED | {"num_inference_steps": 0}, "RequestError", "use 1 to 1000"),
    "scale": (NAMED | {"guidance_scale": -1}, "RequestError", "is not a number from 0"),
    "method": (NAMED | {"method": "magic"}, "RequestError", "is not a method"),
    "one-for-two": (NAMED | {"method": "conform"}, "SubjectError", "conform needs 2 subjects"),
    "one-mixed": (NAMED | {"method": "self-cross"}, "SubjectError", "self-cross needs 2 subjects"),
    "none-for-one": (PROMPT | {"method": "initno"}, "PromptError", "no subject is named"),
    "no-adjective": (
        PROMPT | {"subjects": ["circle", "square"], "method": "syngen"},
        "SubjectError",
        "method syngen needs a subject with an adjective",
    ),
    "index-alone": (
        PROMPT | {"token_indices": [3, 7], "method": "syngen"},
        "SubjectError",
        "method syngen needs a subject with an adjective",
    ),
    "negative-type": (NAMED | {"negative_prompt": 1}, "RequestError", "is not text"),
    "seed": (NAMED | {"seed": "x"}, "RequestError", "is not a whole number"),
    "../id": (NAMED, "RequestError", "cannot be a file name"),
    "two-wrong": (
        NAMED | {"seed": "x", "height": 3},
        "RequestError",
        "whole number; column height",
    ),
}
"""Wrong for every model, by the row's id: values, error, what the reason says."""

SIZED = {"by-8": NAMED | {"height": 72, "width": 64}}
"""Wrong only where a latent is 16 pixels."""

UNKNOWN = {
    "unknown": {"prompt": "a red circle and a dog", "subjects": ["circle"]},
    "unknown-negative": NAMED | {"negative_prompt": "fog"},
}
"""Wrong only for a model that says which words it knows."""

GOOD = {
    "plain": NAMED | {"method": "stable-diffusion"},
    "unguided": PROMPT | {"method": "stable-diffusion"},
    "zero": NAMED | {"guidance_scale": 0, "negative_prompt": ""},
    "composed": PROMPT | {"method": "composable-diffusion"},
    "indexed": PROMPT | {"token_indices": [[2, 3], [7]]},
    "adjective": PROMPT | {"subjects": ["red circle", "square"], "method": "syngen"},
    "indexed-adjective": PROMPT | {"token_indices": [[2, 3], [7]], "method": "syngen"},
    "two-for-two": PROMPT | {"subjects": ["circle", "square"], "method": "focus"},
    "sized": NAMED | {"height": 64, "width": 96},
}


@dataclass(frozen=True)
class Verdicts:
    """What each says of the rows that it would fail: error and reason, by the row's id."""

    engine: dict[str, tuple[str, str]]
    validate: dict[str, tuple[str, str]]
    dry_run: dict[str, str]
    dry_run_totals: dict[str, int]


@pytest.fixture(scope="module")
def models(tiny_pipeline_folder, tmp_path_factory) -> dict[str, str]:
    """One with 8 pixels to a latent, one with 16, and one that knows only some words."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, safety_checker=None)
    pipe.vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(8,) * 5,
        layers_per_block=1,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("model") / "coarse"
    pipe.save_pretrained(folder)
    return {"tiny": str(tiny_pipeline_folder), "coarse": str(folder), "shapes": "shapes"}


@pytest.fixture(scope="module", params=["tiny", "coarse", "shapes"])
def judged(request, models, tmp_path_factory) -> tuple[str, Verdicts]:
    folder = tmp_path_factory.mktemp(request.param)
    rows = {name: values for name, (values, _, _) in BAD.items()} | SIZED | UNKNOWN | GOOD
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps({"id": name} | rows[name]) + "\n" for name in rows))
    config = GuidanceConfig(num_inference_steps=1, thresholds={}, attn_res=(8, 8))
    return request.param, verdicts(models[request.param], config, path)


def verdicts(model: str, config: GuidanceConfig, path: Path) -> Verdicts:
    engine = Engine.from_pretrained(model, slots=1, device="cpu")
    problems: list[Problem] = []
    with open_manifest(path) as manifest:
        rows = list(manifest.rows())
        validate(manifest, Judge.load(model, config), problems.append)
    errors = [row.error for row in rows]  # a job never hands such rows to the engine
    good = (row.request for row in rows if row.error is None)
    errors += [result.error for result in engine.generate(good, config)]
    reasons = {error.row: error.reason for error in errors if error}
    said: list[str] = []
    out = str(path.parent / "out")
    dry_run.dry_run(
        JobSettings(manifest=str(path), output=out, model=model, guidance=config), said.append
    )
    lines = [line.removeprefix("would fail: row ") for line in said if "would fail: row" in line]
    totals = [line.split(" rows would fail with ") for line in said if " rows would fail" in line]
    return Verdicts(
        engine={error.row: (type(error).__name__, error.reason) for error in errors if error},
        validate={p.id: (p.kind, whole_reason(p, reasons[p.id])) for p in problems if p.fails},
        dry_run=dict(line.split(": ", 1) for line in lines),
        dry_run_totals={kind: int(count) for count, kind in totals},
    )


def whole_reason(problem: Problem, expected: str) -> str:
    """What validate says, with the column that it may say in a field of its own."""
    is_split = expected.startswith("column ")
    return f"column {problem.column}: {problem.problem}" if is_split else problem.problem


@pytest.fixture(autouse=True, scope="module")
def every_failure_shown():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "FAILURES_SHOWN", 1_000)
        yield


def test_engine_validate_and_dry_run_agree_row_by_row_and_reason_by_reason(judged):
    _, said = judged
    assert said.validate == said.engine
    assert said.dry_run == {name: reason for name, (_, reason) in said.engine.items()}
    assert said.dry_run_totals == Counter(kind for kind, _ in said.engine.values())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_gets_its_reason(judged, name):
    _, kind, reason = BAD[name]
    got_kind, got_reason = judged[1].engine[name]
    assert got_kind == kind
    assert reason in got_reason


def test_what_depends_on_the_model_is_wrong_for_that_model_alone(judged):
    model, said = judged
    own = {"tiny": {}, "coarse": SIZED, "shapes": UNKNOWN}[model]
    assert said.engine.keys() == {*BAD, *own}
    for name in own:
        assert any(text in said.engine[name][1] for text in ("multiple of 16", "does not know"))


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"guidance_scale": 0, "negative_prompt": ""},
        {"method": "stable-diffusion", "num_inference_steps": 7, "height": 64, "width": 96},
    ],
)
def test_what_a_row_says_overrides_the_run_for_all_alike_though_it_be_0_or_empty(models, own):
    run = GuidanceConfig(guidance_scale=3, negative_prompt="blue", height=128)
    row = read_row(0, NAMED | own)
    engine = Engine.from_pretrained(models["tiny"], slots=1, device="cpu")
    expected = {name: own.get(name, getattr(run, name)) for name in OVERRIDES}
    judged, subjects = Judge.load(models["tiny"], run).resolve(row)
    sampled = admit(engine.model, row.request, run).config
    written = as_used(row, run)
    assert {name: getattr(judged, name) for name in OVERRIDES} == expected
    assert {name: getattr(sampled, name) for name in OVERRIDES} == expected
    assert {name: written[name] for name in OVERRIDES} == expected
    assert subjects == 1


@pytest.mark.parametrize(("maps", "least"), [(None, 40), ((8, 8), 32)])
def test_an_image_is_large_enough_for_maps_of_two_cells_a_side(tmp_path, maps, least):
    small_pipeline().save_pretrained(tmp_path)
    config = GuidanceConfig(
        num_inference_steps=1, max_iter_to_alter=1, thresholds={}, attn_res=maps
    )
    engine = Engine.from_pretrained(str(tmp_path), slots=20, device="cpu")
    judge = Judge.load(str(tmp_path), config)
    named = {"prompt": "a red circle and a blue square", "subjects": ["red circle", "square"]}
    for height, width in ((least, least), (least - 8, 64), (64, least - 8)):
        sides = {"height": height, "width": width}
        rows = [read_row(i, named | sides | {"method": name}) for i, name in enumerate(METHODS)]
        errors = [result.error for result in engine.generate([row.request for row in rows], config)]
        said = Counter(map(str, errors))
        assert Counter(str(judge.error_of(row)) for row in rows) == said
        if min(height, width) < least:
            assert all(
                f"is {least - 8}; it must be a multiple of 8, and at least {least}" in text
                for text in said
            )
        else:
            assert set(errors) == {None}


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"height": 0}, "height"),
        ({"height": "tall"}, "height"),
        ({"method": "magic"}, "method"),
        ({"prompt": None}, "prompt: is None; write what the image shows"),
        ({"prompt": math.nan}, "prompt: is nan; write what the image shows"),
    ],
)
def test_a_request_from_python_is_checked_as_strictly(models, own, said):
    request = Request(**{"prompt": "a circle", "subjects": ["circle"], "id": "x", **own})
    judge = Judge.load(models["tiny"], GuidanceConfig())
    with pytest.raises(RowError, match=said) as caught:
        resolve(as_read(request), GuidanceConfig(), judge.streams, judge.family, SIZES)
    assert caught.value.row == "x"


def test_a_run_s_setting_that_no_row_could_use_is_refused_by_both(models):
    config = GuidanceConfig(negative_prompt="fog")
    engine = Engine.from_pretrained("shapes", slots=1, device="cpu")
    with pytest.raises(SettingsError, match="does not know") as by_engine:
        list(engine.generate([], config))
    with pytest.raises(SettingsError) as by_judge:
        Judge.load("shapes", config)
    assert str(by_engine.value) == str(by_judge.value)


def test_a_sequence_length_is_refused_by_both_where_prompts_have_a_fixed_length(models):
    config = GuidanceConfig(max_sequence_length=12)
    engine = Engine.from_pretrained("shapes", slots=1, device="cpu")
    with pytest.raises(
        SettingsError, match=r"max_sequence_length is 12, .* leave it out"
    ) as by_engine:
        list(engine.generate([], config))
    with pytest.raises(SettingsError) as by_judge:
        Judge.load("shapes", config)
    assert str(by_engine.value) == str(by_judge.value)
