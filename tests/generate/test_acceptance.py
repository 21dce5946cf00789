"""Rows that are tried until a judge accepts a picture, through the real job."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from aae_batch.dataset.image_format import PNG
from aae_batch.dataset.layout import tries_name
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.verify import verify
from aae_batch.errors import GivenUpError, NonFiniteError, OutputError, SettingsError, SubjectError
from aae_batch.generate.driver import run_job
from aae_batch.generate.dry_run import dry_run
from aae_batch.generate.jury import Trial, Verdict
from aae_batch.generate.settings import JobSettings
from aae_batch.generate.worker import GenerateWorker
from aae_batch.job.worker import WorkerContext
from aae_batch.ladder import STRIDE
from aae_batch.manifest.reader import open_manifest
from aae_batch.manifest.row import read_row
from aae_batch.request import Request, Result
from aae_batch.sampling.engine import Engine
from aae_batch.store.open import open_storage
from tests.chaos.fake import SIDE, FakeWorker
from tests.small_job import assert_same_dataset

DIVISIBLE = f"(seed - seed // {STRIDE} * {STRIDE - 1}) % 3 = 0"
"""Accepts a third of the noises, were their seeds in sequence: a row is tried one to three times."""

TRIED = ("id", "try", "method", "seed", "verdict", "kept")


def tries_of(root: str) -> list[dict]:
    return Dataset(root).tries().select(TRIED).to_pylist()


def proved(job) -> bool:
    with open_manifest(job.manifest) as manifest:
        return verify(open_storage(job.output), manifest).proved


@pytest.mark.parametrize("layout", ["files", "webdataset", "parquet"])
def test_a_row_is_tried_until_it_is_accepted(layout, settings, ray_here):
    job = settings(accept=DIVISIBLE, tries=3, layout=layout)
    summary = run_job(job, worker_class=FakeWorker)
    rows = Dataset(job.output).metadata().to_pylist()
    # The manifest's seeds are 0 to 11.
    assert [row["tries"] for row in rows] == [1, 3, 2, 1, 3, 2, 1, 3, 2, 1, 3, 2]
    further = [STRIDE * (row["tries"] - 1) for row in rows]
    assert [row["seed"] for row in rows] == [i + more for i, more in enumerate(further)]
    assert [row["first_seed"] for row in rows] == list(range(12))
    assert [row["kept_try"] for row in rows] == [row["tries"] - 1 for row in rows]
    assert all(row["accepted"] for row in rows)
    made = tries_of(job.output)
    assert [one["verdict"] for one in made if one["id"] == "row-01"] == [
        "rejected",
        "rejected",
        "accepted",
    ]
    assert [one["seed"] for one in made if one["id"] == "row-01"] == [1, 1 + STRIDE, 1 + 2 * STRIDE]
    assert proved(job)
    assert summary["acceptance"]["accepted"] == 12
    assert summary["acceptance"]["tries"] == 24
    before = tries_of(job.output)
    run_job(job, worker_class=FakeWorker)
    assert tries_of(job.output) == before


def test_a_ladder_settles_rows_on_their_first_good_rung(settings, ray_here):
    ladder = ("stable-diffusion", "attend-and-excite")
    job = settings(accept="method = 'attend-and-excite' OR seed < 2", tries=3, ladder=ladder)
    summary = run_job(job, worker_class=FakeWorker)
    rows = Dataset(job.output).metadata().to_pylist()
    assert [row["method"] for row in rows[:3]] == [ladder[0], ladder[0], ladder[1]]
    own = rows[3]  # names stable-diffusion, and stays with it
    assert (own["method"], own["tries"], own["accepted"]) == (ladder[0], 3, False)
    assert own["kept_try"] == 0
    rungs = summary["acceptance"]["rungs"]
    assert {method: rung["settled"] for method, rung in rungs.items()} == {
        ladder[0]: 2,
        ladder[1]: 7,
    }
    assert proved(job)


def test_without_an_accepted_picture_a_row_keeps_its_best_fails_or_is_dropped(
    settings, tmp_path, ray_here
):
    never = {"accept": "seed < 0", "by": f"-abs(seed - {2 * STRIDE})", "tries": 3}

    def rows_of(kind: str) -> tuple[dict, list[dict]]:
        job = settings(**never, unaccepted=kind, output=str(tmp_path / kind))
        summary = run_job(job, worker_class=FakeWorker)
        assert proved(job)
        return summary, Dataset(job.output).metadata().to_pylist()

    summary, kept = rows_of("keep")
    assert [row["seed"] - 2 * STRIDE for row in kept] == list(range(12))
    assert {row["accepted"] for row in kept} == {False}
    assert summary["failed"] == 0
    summary, failed = rows_of("fail")
    assert summary["failures"] == {"NotAcceptedError": 12}
    assert "none of 3 tries meets seed < 0; the best, try 2" in failed[0]["error"]
    assert [row["seed"] for row in failed] == list(range(12))
    summary, _ = rows_of("drop")
    assert summary["acceptance"]["dropped"] == 12
    assert Dataset(tmp_path / "drop").failed_rows() == {}
    assert sum(map(len, Dataset(tmp_path / "fail").failed_rows().values())) == 12


def test_dropped_rows_do_not_count_as_too_many_failures(settings, ray_here):
    job = settings(accept="seed < 0", tries=1, unaccepted="drop", max_failures=0)
    assert run_job(job, worker_class=FakeWorker)["acceptance"]["dropped"] == 12


def test_the_best_of_several_is_found_by_any_score(settings, ray_here):
    job = settings(best_of=4, by=f"seed // {STRIDE} % 3", keep_rejected=True)
    run_job(job, worker_class=FakeWorker)
    dataset = Dataset(job.output)
    rows = dataset.metadata().to_pylist()
    assert [row["seed"] for row in rows] == [i + 2 * STRIDE for i in range(12)]
    assert {row["accepted"] for row in rows} == {None}  # nobody was asked
    assert {row["tries"] for row in rows} == {4}
    made = dataset.tries().to_pylist()
    assert [one["picture"] is None for one in made] == [one["kept"] for one in made]
    assert proved(job)


def test_what_judges_cannot_judge_is_kept_after_one_try(settings, ray_here):
    job = settings(accept="CASE WHEN seed < 6 THEN NULL ELSE true END", tries=3)
    run_job(job, worker_class=FakeWorker)
    rows = Dataset(job.output).metadata().to_pylist()
    assert [row["accepted"] for row in rows] == [None] * 6 + [True] * 6
    assert {row["tries"] for row in rows} == {1}


def test_the_same_tries_after_a_kill_at_any_of_them(settings, tmp_path, ray_here):
    job = settings(accept=DIVISIBLE, tries=3)
    once = tmp_path / "killed"

    class Killed(FakeWorker):
        def admit(self, batch, request, **how) -> None:
            if (request.id, request.seed) == ("row-04", 4 + STRIDE) and not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            super().admit(batch, request, **how)

    run_job(job, worker_class=Killed)
    assert once.exists()
    whole = settings(accept=DIVISIBLE, tries=3, output=str(tmp_path / "whole"))
    run_job(whole, worker_class=FakeWorker)
    assert tries_of(job.output) == tries_of(whole.output)
    assert_same_dataset(job.output, whole.output)
    assert proved(job)


def test_a_picture_that_an_earlier_attempt_kept_of_another_try_is_replaced(
    settings, tmp_path, ray_here
):
    job = settings(accept=DIVISIBLE, tries=3)
    name = Path(job.output) / "images/00000/row-01.png"

    class Before(FakeWorker):
        """As if an attempt that died before its commit had kept another picture."""

        def admit(self, batch, request, **how) -> None:
            if (request.id, request.seed) == ("row-01", 1):
                name.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (SIDE, SIDE), "red").save(name)
            super().admit(batch, request, **how)

    run_job(job, worker_class=Before)
    whole = settings(accept=DIVISIBLE, tries=3, output=str(tmp_path / "whole"))
    run_job(whole, worker_class=FakeWorker)
    assert_same_dataset(job.output, whole.output)
    assert proved(job)


def test_verify_tells_of_a_table_of_tries_that_is_not_the_rows(settings, ray_here):
    job = settings(accept=DIVISIBLE, tries=3)
    run_job(job, worker_class=FakeWorker)
    storage = open_storage(job.output)
    storage.write_bytes(tries_name(1), storage.read_bytes(tries_name(0)))
    told = " ".join(str(problem) for problem in verify(storage).problems)
    assert "has tries of it, and the metadata none" in told
    storage.delete(tries_name(1))
    assert any("is missing" in str(problem) for problem in verify(storage).problems)


def test_a_run_is_not_resumed_with_another_judge(settings, ray_here):
    run_job(settings(accept=DIVISIBLE, tries=3), worker_class=FakeWorker)
    with pytest.raises(OutputError, match=r"acceptance\.tries: 3 -> 4"):
        run_job(settings(accept=DIVISIBLE, tries=4), worker_class=FakeWorker)
    with pytest.raises(OutputError, match="acceptance"):
        run_job(settings(), worker_class=FakeWorker)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tries": 3}, "--tries is for rows"),
        ({"ladder": "conform"}, "--ladder is for rows"),
        ({"accept": "detecter.all_found"}, "did you mean detector"),
        ({"accept": "detector.al"}, "all_found"),
        ({"accept": "clip.min_subject"}, "it is FLOAT"),
        ({"accept": "detector.all_found", "by": "detector.found"}, "it is BOOLEAN\\[\\]"),
        ({"accept": "seed = 1", "best_of": 3, "tries": 3}, "leave out --tries"),
        ({"accept": "?"}, "a list of columns"),
        ({"accept": "id = 'a'"}, "id"),
        ({"unaccepted": "drop"}, "--unaccepted is for rows"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_a_sentence(given, said, settings):
    with pytest.raises(SettingsError, match=said):
        settings(**given, detector="shapes").acceptance  # noqa: B018


def test_scores_go_by_their_metric_and_by_short_names(settings):
    rule = settings(accept="clip.min_subject > 0.2 AND captions.similarity > 0.5").acceptance
    scores = {
        "clip": [{"clip_full": 0.3, "clip_min_subject": m} for m in (0.1, 0.3, None)],
        "captions": [{"caption": "a cat", "clip_caption": 0.6}] * 3,
    }
    truths, values = rule.judged([{"id": "a"}] * 3, scores)
    assert truths[:2].tolist() == [0, 1]
    assert values[:2].tolist() == pytest.approx([0.1, 0.3])
    assert str(truths[2]) == str(values[2]) == "nan"


# --- one row ---


def trial_of(settings, **rule) -> Trial:
    values = {"id": "a", "prompt": "a cat", "subjects": ["cat"], "seed": 1}
    return Trial(settings(**{"accept": "seed = 0", **rule}).acceptance, read_row(0, values))


def ended(trial: Trial, word: str | None, value: float | None = None, error=None) -> bool:
    verdict = None if word is None else Verdict(word, value, {})
    image = None if word is None else Image.new("RGB", (8, 8))
    return trial.end(Result(trial.request, image=image, error=error), verdict, PNG)


def test_the_best_is_accepted_then_valued_then_first(settings):
    trial = trial_of(settings, best_of=5)
    for word, value in [("rejected", 9), ("accepted", 1), ("accepted", 2), ("accepted", 2)]:
        assert not ended(trial, word, value)
    assert ended(trial, "rejected", 10)
    row, result = trial.verdict()
    assert result.request.seed == row.request.seed == 1 + 2 * STRIDE
    assert [made["kept"] for made in trial.tries] == [False, False, True, False, False]


def test_bad_noise_is_tried_again_and_a_method_that_cannot_is_left(settings):
    trial = trial_of(settings, tries=4, ladder="stable-diffusion:2,conform")
    assert not ended(trial, None, error=NonFiniteError("a", "noise"))
    assert trial.number == 1
    assert not ended(trial, None, error=SubjectError("a", "two are needed"))
    assert trial.number == 2
    assert ended(
        trial, None, error=SubjectError("a", "two are needed")
    )  # conform's other try is left out
    row, result = trial.verdict()
    assert isinstance(result.error, NonFiniteError)
    assert row.request.method is None


def test_the_last_try_is_not_given_up_unless_there_is_a_picture(settings):
    trial = trial_of(settings, tries=2, give_up_below=0.5)
    assert trial.give_up_below == 0.5
    ended(trial, None, error=GivenUpError("a", "neglected"))
    assert trial.give_up_below is None
    trial = trial_of(settings, tries=2, give_up_below=0.5)
    ended(trial, "rejected", 0)
    assert trial.give_up_below == 0.5


def test_a_row_whose_last_method_cannot_sample_it_ends_with_a_try_that_was_given_up(settings):
    trial = trial_of(settings, tries=2, ladder="attend-and-excite,conform", give_up_below=0.5)
    error = GivenUpError("a", "neglected")
    trial.end(Result(trial.request, error=error, guided=2, denoised=4), None, PNG)
    assert not ended(trial, None, error=SubjectError("a", "two are needed"))
    assert (trial.number, trial.give_up_below) == (0, None)
    image = Image.new("RGB", (8, 8))
    result = Result(trial.request, image=image, guided=2, denoised=8)
    assert trial.end(result, Verdict("rejected", 0.0, {}), PNG)
    assert trial.verdict()[1].image is image
    (made,) = [one for one in trial.tries if one["kept"]]
    assert (made["guided"], made["denoised"]) == (4, 12)


def test_a_worker_knows_the_methods_of_plugins_before_it_reads_the_ladder(
    settings, tmp_path, monkeypatch
):
    job = settings(accept=DIVISIBLE)
    monkeypatch.setattr(JobSettings, "acceptance", property(lambda job: pytest.fail("too early")))
    run = {"settings": {}, "image_format": {"kind": "png", "level": 1}}
    GenerateWorker(WorkerContext(str(tmp_path), "", job, run, None))


def test_a_row_is_good_if_any_method_of_the_ladder_can_sample_it(settings, tmp_path, capsys):
    manifest = tmp_path / "single.csv"
    manifest.write_text("prompt,subjects\na red circle,circle\n")
    rungs = ["conform", "attend-and-excite"]
    job = settings(accept=DIVISIBLE, ladder=rungs, manifest=str(manifest))
    assert dry_run(job, print) == 0
    assert dry_run(settings(accept=DIVISIBLE, ladder=rungs[:1], manifest=str(manifest)), print) == 1


# --- early verdicts ---


@pytest.fixture(scope="module")
def engine(tiny_pipeline_folder):
    return Engine.from_pretrained(str(tiny_pipeline_folder), slots=3, dtype="float64")


def test_a_sample_is_given_up_by_its_attention_in_the_first_step_after_guidance(engine):
    request = Request("a red circle and a blue square", ["circle", "square"], seed=3, id="a")
    (whole,) = engine.generate([request])
    first = engine.defaults.steering().max_iter_to_alter
    worst = min(subject.max_attention[first] for subject in whole.attention.subjects)

    def sampled(give_up_below: float) -> Result:
        with engine.open() as batch:
            batch.add(request, give_up_below)
            results = []
            while not results:
                results = batch.step()
            assert len(batch) == 0
            return results[0]

    spared = sampled(worst + 1e-6)
    assert isinstance(spared.error, GivenUpError)
    assert spared.image is None
    assert spared.denoised == 2 * (first + 1) < whole.denoised
    assert spared.guided == whole.guided
    assert sampled(worst - 1e-6).image.tobytes() == whole.image.tobytes()


def test_forwards_are_counted(engine):
    plain = Request("a red circle", ["circle"], id="a", method="stable-diffusion")
    free = Request("a red circle", ["circle"], id="b", method="stable-diffusion", guidance_scale=1)
    results = {result.request.id: result for result in engine.generate([plain, free])}
    steps = engine.defaults.num_inference_steps
    assert (results["a"].guided, results["a"].denoised) == (0, 2 * steps)
    assert (results["b"].guided, results["b"].denoised) == (0, steps)
