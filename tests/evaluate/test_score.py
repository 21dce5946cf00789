"""The command as a whole, over real outputs of rendered shapes, on a real Ray."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from aae_batch import cli
from aae_batch.dataset import layout
from aae_batch.dataset.outcome import Outcome
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.writer import Shard, failed
from aae_batch.errors import JobError, ModelError, OutputError, SettingsError
from aae_batch.evaluate.attention import AttentionMetric
from aae_batch.evaluate.clip import ClipMetric
from aae_batch.evaluate.driver import plan_scores, score
from aae_batch.evaluate.metric import score_rows
from aae_batch.evaluate.records import begin_scores
from aae_batch.evaluate.settings import ScoreSettings, weights_of
from aae_batch.evaluate.worker import ScoreContext, ScoreWorker
from aae_batch.request import AttentionRecord, Result, SubjectAttention
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.shapes.detector import judge
from aae_batch.shapes.world import Thing
from aae_batch.store.open import open_storage
from tests.evaluate.conftest import drawn
from tests.small_output import write_dataset

PLAIN, GUIDED = "stable-diffusion", "attend-and-excite"
PAIRS = [("red circle", "blue square"), ("green star", "yellow cross")]
ROWS = [
    {
        "id": f"{method[0]}{pair}{seed}",
        "prompt": "a {} and a {}".format(*PAIRS[pair]),
        "subjects": [thing.split()[1] for thing in PAIRS[pair]],
        "seed": seed,
        "method": method,
        "set": ["animals", "objects"][pair],
    }
    for pair in range(2)
    for seed in range(2)
    for method in (PLAIN, GUIDED)
]
ROWS[3]["seed"] = "x"  # it fails: "a01", whose partner "s01" is then without a pair
SHARD = 3
SCORED = ("attention", "detector", "clip")
STEPS = 4


def shown(row: dict) -> tuple[str, ...]:
    """Guidance draws both things, plain sampling only the first."""
    pair = PAIRS[int(row["id"][1])]
    return pair if row["method"] == GUIDED else pair[:1]


def make_output(folder: Path, form: str = "files", root: str | None = None) -> str:
    """The dataset of `ROWS`, as a job would write it into `folder`, or at another root."""
    root = root or str(folder)
    guidance = GuidanceConfig(num_inference_steps=STEPS, thresholds={0: 0.1, 2: 0.5, 9: 0.8})
    manifest = folder.with_suffix(".jsonl")
    write_dataset(
        manifest, ROWS, root, guidance, partial(outcome, guidance=guidance), form, shard_size=SHARD
    )
    return root


def outcome(into: Shard, row, guidance) -> Outcome:
    if row.error is not None:
        return failed(row, guidance)
    request = row.request
    best = 0.9 if request.method == GUIDED else 0.3
    seen = AttentionRecord(
        subjects=tuple(
            SubjectAttention(
                *(name, (i,), (name,), np.linspace(0.1, best - 0.1 * i, STEPS, dtype=np.float32)),
                *[np.zeros(STEPS, np.float32)] * 4,
                *((STEPS - 1,), np.zeros((1, 4, 4), np.uint8), np.full(1, 0.1, np.float32)),
            )
            for i, name in enumerate(request.subjects)
        ),
        loss=np.zeros(STEPS, np.float32),
        num_refinements=row.index,
        final_loss=0.5,
        neglected=request.method == PLAIN,
    )
    names = shown({"id": request.id, "method": request.method})
    result = Result(request, image=drawn(*names, seed=request.seed), attention=seen, seconds=1.0)
    return into.write_image(row, result, guidance)


@pytest.fixture(scope="module")
def ray_here():
    from aae_batch.job.cluster import start_ray, stop_ray

    start_ray(num_cpus=4, num_gpus=0, log_to_driver=False)
    yield
    stop_ray()


@pytest.fixture(scope="module")
def scored(tmp_path_factory, judges, ray_here):
    """An output that three metrics have scored, and what the command printed; not to be changed."""
    root = tmp_path_factory.mktemp("scored")
    output = make_output(root / "out")
    result = run(
        *("evaluate", output, "--metric", "attention,detector", "--metric", "clip"),
        *("--clip-model", judges.clip, "--dtype", "auto"),
        *("--csv", root / "table.csv", "--latex", root / "table.tex", "--batch-size", 2),
    )
    assert result.exit_code == 0, result.output
    return Dataset(output), result.output, root


@pytest.fixture
def output(tmp_path) -> str:
    return make_output(tmp_path / "out")


@pytest.fixture
def copied(scored, tmp_path) -> Dataset:
    """The scored output again, to be changed."""
    shutil.copytree(scored[0].storage.root, tmp_path / "out")
    return Dataset(tmp_path / "out")


@pytest.fixture
def settings(judges) -> Callable[..., ScoreSettings]:
    def make(output: str, metric: str = "clip", **changes) -> ScoreSettings:
        return ScoreSettings(
            **{"output": output, "metric": metric, "clip_model": judges.clip} | changes
        )

    return make


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def all_scores(dataset: Dataset, metric: str) -> pa.Table:
    return pa.concat_tables(dataset.scores_of(metric, s) for s in dataset.scored_shards(metric))


def written(dataset: Dataset, metric: str) -> dict[int, int]:
    """When each shard's scores were written."""
    place = dataset.storage.place
    return {
        shard: Path(place(layout.metric_name(metric, shard))).stat().st_mtime_ns
        for shard in dataset.scored_shards(metric)
    }


# --- what is written ---


@pytest.mark.parametrize("metric", SCORED)
def test_every_picture_has_one_row_of_scores_in_the_order_of_the_metadata(scored, metric):
    dataset = scored[0]
    pictures = dataset.metadata().filter(pa.compute.field("status") == "ok")
    assert dataset.scored_shards(metric) == dataset.shards() == [0, 1, 2]
    table = all_scores(dataset, metric)
    assert table.select(["id", "sha256"]).equals(pictures.select(["id", "sha256"]))
    assert all(b"description" in field.metadata for field in table.schema)
    assert dataset.metric_run(metric)["settings"]["output"] == dataset.run["fingerprint"]


def test_the_detector_says_what_the_embedded_one_judges(scored):
    rows = {row["id"]: row for row in ROWS}
    for one in all_scores(scored[0], "detector").to_pylist():
        row = rows[one["id"]]
        things = [Thing(*reversed(name.split())) for name in PAIRS[int(row["id"][1])]]
        verdict = judge(drawn(*shown(row), seed=row["seed"]), things)
        assert one["found"] == list(verdict.drawn) == [True, row["method"] == GUIDED]
        assert one["bound"] == list(verdict.bound)


def test_attention_is_summed_up_from_the_tables(scored):
    for one in all_scores(scored[0], "attention").to_pylist():
        guided = one["id"].startswith("a")
        assert one["min_max_attention"] == pytest.approx(0.8 if guided else 0.2)
        assert (one["thresholds_met"], one["num_thresholds"]) == (2 if guided else 1, 2)
        assert one["neglected"] is not guided


def test_clip_scores_on_actors_are_those_of_the_metric_here(scored, judges):
    metric = ClipMetric(judges.clip)
    metric.load("cpu", "float32")
    rows = [row for row in scored[0].metadata().to_pylist() if row["status"] == "ok"]
    images = [scored[0].image(row).convert("RGB") for row in rows]
    expected = metric.score(rows, images, {})
    found = all_scores(scored[0], "clip").drop(["id", "sha256"]).to_pylist()
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_the_table_compares_methods_by_set(scored):
    _, text, root = scored
    assert "Animal-Animal" in text
    assert f"{GUIDED} minus {PLAIN}" in text
    rows = list(csv.DictReader((root / "table.csv").open()))
    cells = {(r["measure"], r["method"], r["minus"], r["set"]): r for r in rows}
    difference = cells["all_found", GUIDED, PLAIN, "Object-Object"]
    assert (float(difference["mean"]), difference["pictures"]) == (1.0, "2")
    assert cells["all_found", GUIDED, PLAIN, "Animal-Animal"]["pictures"] == "1"
    assert float(cells["neglected", PLAIN, "", "Object-Object"]["mean"]) == 1.0
    assert "Animal-Animal & Object-Object" in (root / "table.tex").read_text()


def test_outputs_with_the_same_methods_are_told_apart(scored, tmp_path, monkeypatch):
    root = scored[0].storage.root
    shutil.copytree(root, tmp_path / "again")
    text = run("evaluate", root, tmp_path / "again").output
    assert f"{PLAIN} (again)" in text
    assert f"{GUIDED} (again) minus {PLAIN} (again)" in text
    assert f"{GUIDED} (out) minus {PLAIN} (out)" in text
    monkeypatch.setenv("HOME", str(Path(root).parent))
    assert run("evaluate", root, f"{root}/", "~/out").output == run("evaluate", root).output


def test_scores_of_different_judges_are_not_put_into_one_table(scored, copied):
    run_file = Path(copied.storage.place(layout.metric_run_name("clip")))
    run_file.write_text(run_file.read_text().replace('"dtype": "float32"', '"dtype": "float16"'))
    (moved := Path(copied.storage.root)).rename(moved.with_name("other"))
    text = run("evaluate", scored[0].storage.root, moved.with_name("other")).output
    assert (
        'clip is left out, since its settings in out and other differ (dtype: "float32" ->' in text
    )
    assert "Full prompt similarity" not in text
    assert "All subjects found" in text


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_every_layout_is_read(tmp_path, scored, ray_here, settings, form):
    output = make_output(tmp_path / "out", form)
    score(settings(output, "detector"))
    expected, found = all_scores(scored[0], "detector"), all_scores(Dataset(output), "detector")
    assert found.equals(expected)


def test_data_and_judge_may_lie_in_an_object_store(
    bucket, judges, scored, tmp_path, settings, monkeypatch
):
    monkeypatch.setenv("AAE_BATCH_CACHE", str(tmp_path / "cache"))
    for file in Path(judges.clip).iterdir():
        bucket.client.upload_file(str(file), bucket.name, f"clip/{file.name}")
    output = make_output(tmp_path / "out", root=f"{bucket.url}/out")
    score(settings(output, "attention"))
    assert all_scores(Dataset(output), "attention").equals(all_scores(scored[0], "attention"))
    dataset, metric = Dataset(output), ClipMetric(f"{bucket.url}/clip")
    metric.load("cpu", "float32")
    assert score_rows(dataset, 0, range(SHARD), metric, 2) == [
        pytest.approx(row, abs=1e-5) for row in scored[0].scores_of("clip", 0).to_pylist()
    ]


@pytest.mark.parametrize(("metric", "needed"), [("captions", []), ("clip", ["id", "subject"])])
def test_only_what_a_metric_needs_of_the_attention_table_is_read(
    scored, settings, monkeypatch, metric, needed
):
    dataset, read = scored[0], []
    whole = dataset.attention_of
    monkeypatch.setattr(
        dataset,
        "attention_of",
        lambda shard, columns: read.append(columns) or whole(shard, columns),
    )
    judge = settings("out", metric).metric_of(dataset.run)
    monkeypatch.setattr(judge, "score", lambda rows, images, attention: [{} for _ in rows])
    score_rows(dataset, 0, range(SHARD), judge, SHARD)
    assert read == ([needed] if needed else [])


# --- going on ---


def test_without_a_metric_the_table_is_printed_and_nothing_is_written(scored):
    dataset = scored[0]
    before = {metric: written(dataset, metric) for metric in SCORED}
    result = run("evaluate", dataset.storage.root)
    assert result.exit_code == 0
    assert "Full prompt similarity (clip)" in result.output
    assert {metric: written(dataset, metric) for metric in SCORED} == before


@pytest.mark.parametrize("metric", ["detector", "attention"])
def test_a_lost_table_is_made_again_and_nothing_else(copied, ray_here, settings, metric):
    before, times = all_scores(copied, metric), written(copied, metric)
    copied.storage.delete(layout.metric_name(metric, 1))
    done = score(settings(copied.storage.root, metric))
    assert (done.rows, done.kept) == (3, 2)
    after = written(copied, metric)
    assert {shard for shard in after if after[shard] != times[shard]} == {1}
    assert all_scores(copied, metric).equals(before)


def test_scores_of_a_picture_that_changed_are_stale_and_made_again(copied, ray_here, settings):
    name = layout.metadata_name(2)
    table = copied.table(2)
    row = table.to_pylist()[0]
    other = Path(copied.storage.place(row["file_name"]))
    drawn("red star").save(other)
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    digests = [digest, *table["sha256"].to_pylist()[1:]]
    changed = table.set_column(table.column_names.index("sha256"), "sha256", [digests])
    pa.parquet.write_table(changed, copied.storage.place(name))
    assert "scores are left out" in run("evaluate", copied.storage.root).output
    done = score(settings(copied.storage.root, "detector"))
    assert (done.rows, done.kept) == (2, 2)
    (one, *_) = copied.scores_of("detector", 2).to_pylist()
    assert (one["sha256"], one["subjects_found"]) == (digest, 1)


def test_other_settings_are_refused_unless_all_is_scored_again(copied, settings):
    root, before = copied.storage.root, all_scores(copied, "attention")
    run_file = Path(copied.storage.place(layout.metric_run_name("attention")))
    run_file.write_text(run_file.read_text().replace('"2": 0.5', '"2": 0.6'))
    with pytest.raises(OutputError, match=r"thresholds.* -> .*--again"):
        score(settings(root, "attention"))
    assert copied.metric_run("attention")["settings"]["thresholds"]["2"] == 0.6
    done = score(settings(root, "attention", again=True))
    assert (done.rows, done.kept) == (8, 0)
    assert copied.metric_run("attention")["settings"]["thresholds"]["2"] == 0.5
    assert all_scores(copied, "attention").equals(before)


def test_scoring_anew_loses_nothing_when_its_judge_cannot_be_loaded(copied, settings, judges):
    class Unloadable(ScoreWorker):
        def load(self):
            raise ModelError("it does not fit")

    root = copied.storage.root
    before, run_before = all_scores(copied, "clip"), copied.metric_run("clip")
    with pytest.raises(ModelError, match="does not fit"):
        score(settings(root, clip_model=judges.captioner, again=True), worker_class=Unloadable)
    assert all_scores(copied, "clip").equals(before)
    assert copied.metric_run("clip") == run_before
    assert score(settings(root)).kept == 3


def test_scores_of_an_earlier_run_are_left_out_until_they_are_replaced(copied, settings):
    root = copied.storage.root
    before, times = all_scores(copied, "attention"), written(copied, "attention")
    plan = plan_scores(settings(root, "attention"))
    begin_scores(copied, plan.run | {"fingerprint": "of other settings"})
    assert "7 scores are left out" in (text := run("evaluate", root).output)
    assert "Neglect rate" not in text
    assert "Full prompt similarity" in text
    assert score(settings(root, "attention")).kept == 0
    assert all(time > times[shard] for shard, time in written(copied, "attention").items())
    assert all_scores(copied, "attention").equals(before)


def test_a_damaged_table_is_named_and_made_again(copied, settings):
    root, before = copied.storage.root, all_scores(copied, "attention")
    path = Path(copied.storage.place(layout.metric_name("attention", 1)))
    path.write_bytes(path.read_bytes()[:-9])
    result = run("evaluate", root)
    assert (result.exit_code, str(path) in result.stderr) == (2, True)
    assert "--metric attention" in result.stderr
    done = score(settings(root, "attention"))
    assert (done.rows, done.kept) == (3, 2)
    assert all_scores(copied, "attention").equals(before)


def test_another_detector_is_refused_before_it_is_loaded(scored, settings, judges):
    with pytest.raises(OutputError, match='detector: "shapes" -> '):
        plan_scores(settings(scored[0].storage.root, "detector", detector=judges.detector))


def test_other_weights_under_the_same_name_are_refused(copied, settings, judges, tmp_path):
    model = tmp_path / "clip"
    shutil.copytree(judges.clip, model)
    run_file = Path(copied.storage.place(layout.metric_run_name("clip")))
    run_file.write_text(run_file.read_text().replace(judges.clip, str(model)))
    assert score(settings(copied.storage.root, clip_model=str(model))).kept == 3
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(OutputError, match="weights"):
        score(settings(copied.storage.root, clip_model=str(model)))


def test_pickled_weights_count_among_a_judges(judges, tmp_path):
    model = tmp_path / "clip"
    shutil.copytree(judges.clip, model)
    metric = ClipMetric(str(model))
    before = weights_of(metric, None)
    (model / "pytorch_model.bin").write_bytes(b"weights")
    assert weights_of(metric, None) != before


def test_an_actor_refuses_another_model_than_the_run_was_begun_with(output, judges):
    metric = ClipMetric(judges.clip)
    run = {"settings": {f"weights of {judges.clip}": "0" * 64}}
    job = ScoreSettings(output=output, metric="clip", clip_model=judges.clip)
    told = ScoreContext(output, lease="", settings=job, run=run, threads=None, metric=metric)
    with pytest.raises(ModelError, match="on this machine is not the one"):
        ScoreWorker(told).load()


def test_automatic_precision_is_recorded_as_it_was_found(scored, settings):
    run_record = scored[0].metric_run("clip")
    assert (run_record["settings"]["dtype"], run_record["device"]) == ("float32", "cpu")
    for dtype in ("auto", "float32"):
        plan = plan_scores(settings(scored[0].storage.root, dtype=dtype))
        assert plan.kept == {0, 1, 2}
        assert plan.run == run_record
    with pytest.raises(OutputError, match="dtype"):
        plan_scores(settings(scored[0].storage.root, dtype="float16"))


def test_actors_are_told_the_endpoint_of_this_machines_environment(monkeypatch, scored, settings):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://store:9000")
    metric = settings("out").metric_of(scored[0].run)
    assert metric.s3_endpoint == "http://store:9000"


def test_an_incomplete_output_is_scored_as_far_as_it_is(output, ray_here):
    Path(output, layout.metadata_name(1)).unlink()
    result = run("evaluate", output, "--metric", "attention")
    assert result.exit_code == 0
    assert "1 shard still to be generated" in result.stderr
    assert Dataset(output).scored_shards("attention") == [0, 2]


def test_after_sigterm_the_same_command_completes(output, scored, monkeypatch):
    judge, calls, cancelled = AttentionMetric.score, [], threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            cancelled.set()
            super().shutdown(wait)

    def told_to_stop(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            assert cancelled.wait(60)  # so that the third shard is not begun
        return judge(*arguments)

    monkeypatch.setattr("aae_batch.evaluate.driver.ThreadPoolExecutor", Pool)

    monkeypatch.setattr("aae_batch.evaluate.driver.READERS", 1)
    monkeypatch.setattr(AttentionMetric, "score", told_to_stop)
    stopped = run("evaluate", output, "--metric", "attention")
    assert (stopped.exit_code, "same command again" in stopped.stderr) == (3, True)
    assert Dataset(output).scored_shards("attention") == [0, 1]
    monkeypatch.undo()
    assert run("evaluate", output, "--metric", "attention").exit_code == 0
    assert all_scores(Dataset(output), "attention").equals(all_scores(scored[0], "attention"))


def test_a_dry_run_says_what_would_be_scored_and_writes_nothing(output):
    result = run("evaluate", output, "--metric", "detector", "--dry-run")
    assert result.exit_code == 0
    assert "3 shards (8 rows) to score, 0 scored already, 0 not generated yet" in result.output
    assert not Path(output, "metrics").exists()


# --- what goes wrong ---


def test_a_picture_that_kills_its_judge_has_no_score_and_costs_no_other(
    scored, output, ray_here, settings, monkeypatch
):
    monkeypatch.setattr("aae_batch.job.pool.NODE_LOSS_SECONDS", 0.1)  # no node is lost here

    class Deadly(ScoreWorker):
        def load(self) -> str:
            where = super().load()
            judge_all = self.context.metric.score

            def judge_some(rows, images, attention):
                if any(row["id"] == "a11" for row in rows):
                    os.kill(os.getpid(), signal.SIGKILL)
                return judge_all(rows, images, attention)

            self.context.metric.score = judge_some
            return where

    done = score(settings(output, "detector", batch_size=1, actors=2), worker_class=Deadly)
    assert done.unscored == 1
    expected = all_scores(scored[0], "detector").to_pylist()
    for one, other in zip(
        all_scores(Dataset(output), "detector").to_pylist(), expected, strict=True
    ):
        if one["id"] == "a11":
            assert {v for k, v in one.items() if k not in ("id", "sha256")} == {None}
        else:
            assert one == other

    later = run("evaluate", output, "--metric", "detector")
    assert (later.exit_code, "1 images could not be scored" in later.stderr) == (1, True)
    retried = score(settings(output, "detector", retry_failed=True))
    assert (retried.rows, retried.kept, retried.unscored) == (1, 3, 0)
    assert all_scores(Dataset(output), "detector").to_pylist() == expected
    assert run("evaluate", output, "--metric", "detector").exit_code == 0


def test_scores_depend_on_the_weights_of_every_model_that_is_used(scored, settings, judges):
    plan = plan_scores(settings(scored[0].storage.root, "captions", caption_model=judges.captioner))
    depends_on = plan.run["settings"]
    digests = {depends_on[f"weights of {model}"] for model in (judges.clip, judges.captioner)}
    assert len(digests) == 2
    assert None not in digests
    assert [piece.shard for piece in plan.todo] == [0, 1, 2]


def test_a_damaged_picture_stops_the_job_and_is_named(output, ray_here, settings):
    next(Path(output, "images/00001").glob("*.png")).write_bytes(b"no picture")
    with pytest.raises(JobError, match=r"row .* does not match the SHA-256 in its metadata"):
        score(settings(output, "detector"))


def test_a_model_that_cannot_be_had_stops_the_command_at_once(output):
    result = run("evaluate", output, "--metric", "clip", "--clip-model", "/no/such/folder")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


def test_a_wrong_command_is_told_in_a_sentence(output, tmp_path):
    wrong = run("evaluate", output, "--metric", "beauty")
    assert (wrong.exit_code, "metric" in wrong.stderr) == (2, True)
    dry = run("evaluate", output, "--dry-run")
    assert (dry.exit_code, "name a --metric" in dry.stderr) == (2, True)
    nothing = run("evaluate", output)
    assert (nothing.exit_code, "name a --metric" in nothing.stderr) == (2, True)
    nowhere = run("evaluate", tmp_path / "none", "--metric", "attention")
    assert (nowhere.exit_code, "There is no dataset" in nowhere.stderr) == (2, True)
    assert not (tmp_path / "none").exists()


def test_nothing_is_scored_while_another_job_writes(output, settings):
    with (
        open_storage(output).writing(),
        pytest.raises(OutputError, match="another"),
    ):
        score(settings(output, "attention"))


def test_a_threshold_is_a_share(settings):
    with pytest.raises(SettingsError, match="detector_threshold"):
        settings("out", detector_threshold=2)
