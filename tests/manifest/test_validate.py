"""Every row is judged as the engine will judge it, and faster."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from aae_batch.errors import ManifestError, RowError
from aae_batch.manifest.judge import Judge
from aae_batch.manifest.reader import open_manifest
from aae_batch.manifest.row import Row
from aae_batch.manifest.validate import Problem, Summary, Work, validate
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.families import FLUX, STABLE_DIFFUSION, Family
from aae_batch.sampling.model.unet import StableDiffusion
from aae_batch.sampling.sample import admit
from tests.manifest.test_hostile_manifests import (
    ODD_IDS,
    UNSAFE_IDS,
    WRONG_VALUES,
    jsonl,
    some_parquet,
)
from training.networks import tokenizer

CONFIG = GuidanceConfig()
TOKENIZER = tokenizer()  # 16 positions
LONG = "a red circle and a blue square and a green star and a yellow cross and a red star"

TROUBLED = [
    {"prompt": "a red circle", "subjects": ["circle"]},
    {"prompt": "a red circle", "subjects": ["dog"]},
    {"prompt": "a red circle", "subjects": ["circle", "circle"]},
    {"prompt": "a red circle", "subjects": [""]},
    {"prompt": "a red circle", "subjects": []},
    {"prompt": "a red circle"},
    {"prompt": "a red circle", "method": "stable-diffusion"},
    {"prompt": "a red circle", "method": "stable-diffusion", "subjects": ["dog"]},
    {"prompt": LONG, "subjects": ["circle"]},
    {"prompt": LONG, "subjects": ["cross"]},
    {"prompt": "red " * 40 + "circle", "subjects": ["circle"]},
    {"prompt": "a red circle", "token_indices": [3]},
    {"prompt": "a red circle", "token_indices": [0]},
    {"prompt": "a red circle", "token_indices": [4]},
    {"prompt": "a red circle", "token_indices": [9]},
    {"prompt": "a red circle", "token_indices": [-1]},
    {"prompt": "a red circle", "token_indices": [99]},
    {"prompt": "a red circle", "token_indices": [[]]},
    {"prompt": "a red circle", "subjects": ["circle"], "token_indices": [3]},
    {"prompt": "a red circle", "subjects": ["circle"], "token_indices": [2]},
    {"prompt": "a red circle", "subjects": ["circle"], "height": 16},
    {"prompt": "a red circle", "subjects": ["circle"], "width": 24, "height": 72},
    {"prompt": "a <|endoftext|> circle", "subjects": ["circle"]},
    {"prompt": "<|startoftext|>a circle", "subjects": ["circle"]},
    {"prompt": "a circle <|endoftext|>", "subjects": ["<|endoftext|>"]},
    {"prompt": "A RED\u00a0CIRCLE\u200b", "subjects": ["Circle"]},
    {"prompt": "caf\u00e9 \U0001f438 \u732b a\u0301", "subjects": ["\U0001f438", "\u732b"]},
    {"prompt": "a circle", "subjects": ["circle"], "negative_prompt": "blue " * 40},
]


def judged(
    path, processes: int = 1, family: Family = STABLE_DIFFUSION, **settings
) -> tuple[list[Problem], Summary]:
    judge = Judge(TOKENIZER, CONFIG.updated(**settings), family=family)
    problems: list[Problem] = []
    with open_manifest(path) as manifest:
        return problems, validate(manifest, judge, problems.append, processes=processes)


def engine_s_verdict(model: StableDiffusion, row: Row) -> RowError | None:
    if row.error is not None:  # the job never hands such a row to the engine
        return row.error
    try:
        admit(model, row.request, CONFIG)
    except RowError as error:
        return error
    return None


def test_every_verdict_is_the_engine_s_on_the_most_hostile_manifests(tmp_path, sd1_pipeline):
    base = {"prompt": "a circle", "subjects": ["circle"]}
    records = TROUBLED + [base | {"id": name} for name in (*UNSAFE_IDS, *ODD_IDS, "CON")]
    records += [base | values for values in WRONG_VALUES]
    path = jsonl(tmp_path, *records)
    problems, summary = judged(path)
    model = StableDiffusion(sd1_pipeline)
    assert len(TOKENIZER) == len(sd1_pipeline.tokenizer)
    with open_manifest(path) as manifest:
        expected = {
            row.index + 1: (row.id, type(error).__name__, error.reason)
            for row in manifest.rows()
            if (error := engine_s_verdict(model, row)) is not None
        }
    found = {p.row: p for p in problems if p.fails}
    assert found.keys() == expected.keys()
    for row, (name, kind, reason) in expected.items():
        assert (found[row].id, found[row].kind) == (name, kind)
        assert reason.endswith(found[row].problem)
    assert summary.rows == len(records)
    assert summary.failing == len(expected)
    assert len(expected) > len(WRONG_VALUES) + len(UNSAFE_IDS)


def test_a_problem_says_in_which_column_it_is(tmp_path):
    path = jsonl(
        tmp_path,
        {"prompt": "a circle", "subjects": ["dog"]},
        {"prompt": "a circle", "token_indices": [0]},
        {"prompt": "a circle", "seed": "x"},
        {"prompt": "a circle", "height": 16, "subjects": ["circle"]},
        {"prompt": ""},
        {"prompt": "a circle"},
    )
    problems, _ = judged(path)
    assert [problem.row for problem in problems] == [1, 2, 3, 4, 5, 6]
    assert [problem.column for problem in problems] == [
        "subjects",
        "token_indices",
        "seed",
        "height",
        "prompt",
        "subjects",
    ]


@pytest.mark.parametrize(
    ("settings", "values", "column"),
    [
        ({}, {"method": "conform"}, "method"),
        ({}, {"token_indices": [2]}, "subjects"),
        ({"update": "velocity"}, {}, "update"),
        ({"negative_prompt": "red"}, {"width": 24}, "width"),
    ],
)
def test_a_problem_of_a_setting_is_no_problem_of_the_subjects(tmp_path, settings, values, column):
    path = jsonl(tmp_path, {"prompt": "a red circle", "subjects": ["circle"]} | values)
    (problem,) = judged(path, **settings)[0]
    assert problem.column == column


def test_prompts_that_are_cut_off_are_warnings(tmp_path):
    path = jsonl(
        tmp_path,
        {"prompt": LONG, "subjects": ["circle"]},
        {"prompt": "a circle", "subjects": ["circle"], "negative_prompt": LONG},
    )
    problems, summary = judged(path)
    assert [(p.kind, p.column, p.fails) for p in problems] == [
        ("TruncatedPrompt", "prompt", False),
        ("TruncatedNegative", "negative_prompt", False),
    ]
    assert "and the text encoder sees 14; shorten it" in problems[0].problem
    assert summary.failing == 0


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        (FLUX, {}, "set true_cfg_scale above 1"),
        (FLUX, {"true_cfg_scale": 2.0}, None),
        (STABLE_DIFFUSION, {"guidance_scale": 1.0}, "set guidance_scale above 1"),
        (STABLE_DIFFUSION, {}, None),
    ],
)
def test_a_negative_prompt_that_is_ignored_is_a_warning(tmp_path, family, settings, says):
    """And tells no pictures apart."""
    base = {"prompt": "a circle and a star", "method": "stable-diffusion", "seed": 1}
    composed = {"method": "composable-diffusion"}
    path = jsonl(
        tmp_path,
        base,
        base | {"negative_prompt": "red"},
        base | composed,
        base | composed | {"negative_prompt": "red"},
    )
    problems, _ = judged(path, family=family, **settings)
    if says is None:
        assert problems == []
        return
    ignored, repeated = problems
    assert (ignored.row, ignored.column, ignored.fails) == (2, "negative_prompt", False)
    assert says in ignored.problem
    assert (repeated.row, repeated.kind) == (2, "RepeatedRow")


def test_rows_that_ask_for_the_same_picture_are_warnings(tmp_path):
    base = {"prompt": "a circle", "subjects": ["circle"]}
    path = jsonl(
        tmp_path,
        base | {"seed": 1},
        base | {"seed": 2},
        base | {"seed": 1, "method": "stable-diffusion"},
        base | {"seed": 1, "height": 64},
        base | {"seed": 1, "method": "attend-and-excite"},
        base,  # of no seed: each has its own, from its id
        base,
        {"prompt": ""},
        {"prompt": ""},
    )
    problems, summary = judged(path)
    (again,) = [problem for problem in problems if not problem.fails]
    assert (again.row, again.id, again.kind) == (5, "00000004", "RepeatedRow")
    assert "the same image as row 1" in again.problem
    assert summary.totals == {"PromptError": 2, "RepeatedRow": 1}


def test_what_a_row_says_as_the_run_does_tells_no_pictures_apart(tmp_path):
    base = {"prompt": "a circle", "subjects": ["circle"], "seed": 1}
    said = {"num_inference_steps": 30, "guidance_scale": 4, "height": 64, "negative_prompt": ""}
    path = jsonl(tmp_path, base, base | said, base | {"num_inference_steps": 31})
    settings = {"num_inference_steps": 30, "guidance_scale": 4.0, "height": 64}
    assert [problem.row for problem in judged(path, **settings)[0]] == [2]


def test_subjects_tell_pictures_apart_only_where_the_method_looks_at_them(tmp_path):
    named = [{}, {"subjects": ["circle"]}, {"token_indices": [2]}]
    base = {"prompt": "a circle and a star", "seed": 1}
    path = jsonl(
        tmp_path,
        *(base | some | {"method": "stable-diffusion"} for some in named),
        *(base | some | {"method": "structure-diffusion"} for some in named),
    )
    assert [(p.row, p.kind) for p in judged(path)[0]] == [(2, "RepeatedRow"), (3, "RepeatedRow")]


def test_the_run_s_method_counts_for_rows_that_name_none(tmp_path):
    path = jsonl(
        tmp_path, {"prompt": "a circle"}, {"prompt": "a star", "method": "stable-diffusion"}
    )
    assert judged(path)[1].failing == 1
    assert judged(path, method="stable-diffusion")[1].failing == 0


def test_good_rows_are_counted_by_what_their_price_depends_on(tmp_path):
    guided = {"prompt": "a circle", "subjects": ["circle"]}
    path = jsonl(
        tmp_path,
        guided,
        guided,
        {"prompt": "a circle", "method": "stable-diffusion", "guidance_scale": 1, "height": 64},
        {"prompt": "a circle", "subjects": ["dog"]},
        {"prompt": "a circle and a star", "method": "composable-diffusion"},
    )
    assert judged(path)[1].work == Counter(
        {
            Work("attend-and-excite", 50, True, None, None, 1): 2,
            Work("stable-diffusion", 50, False, 64, None, 0): 1,
            Work("composable-diffusion", 50, True, None, None, 0, conjuncts=2): 1,
        }
    )


def test_several_processes_find_the_same_in_the_same_order(tmp_path):
    some = [dict(TROUBLED[i % len(TROUBLED)], seed=i % (150 * len(TROUBLED))) for i in range(5_100)]
    path = jsonl(tmp_path, *some)
    alone, together = judged(path), judged(path, processes=2)
    assert alone[0] == together[0]
    assert alone[1] == together[1]
    assert alone[1].totals["RepeatedRow"] > 0


def test_a_manifest_whose_pages_are_damaged_cannot_be_judged(tmp_path):
    content = bytearray(some_parquet())
    content[40:20_000] = b"\xff" * 19_960
    path = tmp_path / "m.parquet"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match="cannot be read"):
        judged(path)


def test_progress_is_told(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a"}) + "\n" for _ in range(4_100)))
    told = []
    with open_manifest(path) as manifest:
        judge = Judge(TOKENIZER, CONFIG)
        validate(manifest, judge, lambda problem: None, lambda *s: told.append(s), processes=1)
    assert told == [(2_000, 4_100), (4_000, 4_100), (4_100, 4_100)]
