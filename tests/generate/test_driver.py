"""The job as a whole, on a real Ray, into real folders."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from aae_batch.dataset import rewriting
from aae_batch.dataset.reader import Dataset, attention_map, attention_maps
from aae_batch.dataset.verify import verify
from aae_batch.errors import (
    JobError,
    ManifestError,
    ModelError,
    OutputError,
    RequestError,
    SettingsError,
    SubjectError,
)
from aae_batch.generate.driver import run_job
from aae_batch.generate.worker import GenerateWorker
from aae_batch.job.cluster import WorkerPlan
from aae_batch.job.records import Loaded
from aae_batch.job.worker import WorkerContext
from aae_batch.manifest.reader import open_manifest
from aae_batch.store.open import open_storage
from tests.chaos.fake import FakeWorker
from tests.small_job import (
    STEPS,
    assert_same_but_for_rounding,
    assert_same_dataset,
    assert_same_rows,
    snapshot,
)


@pytest.fixture(scope="module")
def reference(settings_in, ray_here, tmp_path_factory):
    """The dataset that nothing went wrong with, and the progress that was told of it."""
    told = []
    settings = settings_in(tmp_path_factory.mktemp("reference"))
    run_job(settings, told.append)
    return settings, told


@pytest.fixture(scope="module")
def cheap_reference(settings_in, ray_here, tmp_path_factory) -> str:
    """The dataset of `FakeWorker` that nothing went wrong with: where the model does not matter."""
    settings = settings_in(tmp_path_factory.mktemp("cheap"))
    run_job(settings, worker_class=FakeWorker)
    return settings.output


class Slow(FakeWorker):
    """So that a job is still under way when something happens to it."""

    def admit(self, batch, request):
        time.sleep(0.3)
        super().admit(batch, request)


def test_every_row_has_a_picture_its_statistics_and_one_metadata_row(reference):
    settings, _ = reference
    dataset = Dataset(settings.output)
    metadata = dataset.metadata().to_pylist()
    assert dataset.shards() == [0, 1, 2, 3]
    assert [row["id"] for row in metadata] == [f"row-{i:02}" for i in range(12)]
    assert {row["status"] for row in metadata} == {"ok"}
    assert {row["fingerprint"] for row in metadata} == {dataset.run["fingerprint"]}
    assert [row["note"]["number"] for row in metadata] == list(range(12))
    for row in metadata:
        data = dataset.storage.read_bytes(row["file_name"])
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        assert dataset.image(row).size == (row["width"], row["height"]) == (128, 128)
    attention = dataset.attention().to_pylist()
    assert len(attention) == 24
    for row in attention:
        for name in ("max_attention", "mean_attention", "entropy", "center_x", "center_y", "loss"):
            assert len(row[name]) == STEPS, name
        assert attention_map(row).shape == (8, 8)
        assert attention_map(row).max() == pytest.approx(row["map_scale"])


def test_the_summary_counts_what_is_there(reference):
    settings, _ = reference
    summary = Dataset(settings.output).summary
    assert (summary["rows"], summary["images"], summary["failed"]) == (12, 12, 0)
    assert summary["methods"]["stable-diffusion"]["images"] == 3
    assert summary["methods"]["attend-and-excite"]["mean_refinements"] > 0


def test_progress_moves_with_rows_and_ends_at_all(reference):
    _, told = reference
    done = [progress.done for progress in told]
    assert done == sorted(done)
    assert done[-1] == 12


def test_actors_tell_of_their_shards_in_rays_logs(reference):
    (node,) = ray.nodes()
    logs = Path(node["ObjectStoreSocketName"]).parent.parent / "logs"
    text = "".join(path.read_text() for path in logs.glob("worker-*.err"))
    for shard in range(4):
        assert f"INFO aae_batch.worker shard={shard} rows=3 done" in text


def test_an_actor_whose_machine_has_another_model_refuses_it(settings):
    job = settings()
    run = {
        "settings": {"weights": "0" * 64},
        "layout": "files",
        "image_format": {"kind": "png", "level": 1},
    }
    mine = WorkerContext(job.output, lease="", settings=job, run=run, threads=None)
    with pytest.raises(ModelError, match="on this machine is not the one"):
        GenerateWorker(mine).load_engine()


def test_the_same_command_changes_nothing_when_all_is_done(reference):
    settings, _ = reference
    before = snapshot(settings.output)
    run_job(settings)
    assert snapshot(settings.output) == before


def test_a_lost_shard_is_made_again_and_nothing_else(reference):
    settings, _ = reference
    before = snapshot(settings.output)
    (Path(settings.output) / "metadata/00002.parquet").unlink()
    run_job(settings)
    after = snapshot(settings.output)
    written = {name for name in after if after[name][0] != before[name][0]}
    counts = {"summary.json", "progress.json"}
    assert written - counts == {"metadata/00002.parquet"}  # its pictures were there, and are taken


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_an_actor_that_dies_between_its_commit_and_its_report_changes_nothing(
    settings, tmp_path, layout, ray_here, monkeypatch
):
    monkeypatch.setattr("aae_batch.job.pool.NODE_LOSS_SECONDS", 0.1)  # no node is lost here
    died = tmp_path / "died"

    class Hasty(FakeWorker):
        def work(self, task):
            outcomes = super().work(task)
            if not died.exists():
                committed = Path(self.storage.place(f"metadata/{task.piece.shard:05d}.parquet"))
                died.write_text(f"{committed.name} {committed.stat().st_mtime_ns}")
                os.kill(os.getpid(), signal.SIGKILL)
            return outcomes

    job = settings(layout=layout)
    summary = run_job(job, worker_class=Hasty)
    assert (summary["images"], summary["failed"]) == (12, 0)
    name, written = died.read_text().split()
    assert snapshot(job.output)[f"metadata/{name}"][0] == int(written)
    with open_manifest(job.manifest) as manifest:
        assert verify(open_storage(job.output), manifest).proved


def test_a_manifest_that_changes_under_a_job_stops_it(settings, manifest, tmp_path, ray_here):
    path = tmp_path / "manifest.parquet"
    before = manifest.read_bytes()
    path.write_bytes(before)
    job = settings(manifest=path)

    def change(progress) -> None:
        if Dataset(job.output).shards():
            rows = [
                {"id": f"row-{i:02}", "prompt": "a red star and a blue star"} for i in range(12)
            ]
            pq.write_table(pa.Table.from_pylist(rows), path)

    with pytest.raises(JobError, match="was changed while its rows were generated"):
        run_job(job, change, FakeWorker)
    assert Dataset(job.output).summary is None
    with pytest.raises(OutputError, match="manifest: "):
        run_job(job)
    path.write_bytes(before)  # the same content at another time is no change
    run_job(job, lambda progress: os.utime(path), FakeWorker)
    with open_manifest(path) as opened:
        assert verify(open_storage(job.output), opened).proved


def test_a_kill_while_failed_rows_are_rewritten_is_healed_by_the_plain_command(
    settings, tmp_path, ray_here, monkeypatch
):
    once = tmp_path / "failed"

    class Unlucky(FakeWorker):
        def admit(self, batch, request) -> None:
            if request.id in ("row-01", "row-04") and not once.exists():
                raise SubjectError(request.id, "bad luck.")
            super().admit(batch, request)

    job = settings()
    assert run_job(job, worker_class=Unlucky)["failed"] == 2
    once.touch()

    def die(*args) -> None:
        raise KeyboardInterrupt

    again = job.model_copy(update={"retry_failed": True})
    monkeypatch.setattr(rewriting, "_carry_out", die)
    with pytest.raises(KeyboardInterrupt):
        run_job(again, worker_class=FakeWorker)
    monkeypatch.undo()
    assert run_job(job, worker_class=FakeWorker)["failed"] == 1
    with open_manifest(job.manifest) as manifest:
        assert verify(open_storage(job.output), manifest).proved
    assert run_job(again, worker_class=FakeWorker)["failed"] == 0
    with open_manifest(job.manifest) as manifest:
        assert verify(open_storage(job.output), manifest).proved


def test_maps_over_time_are_kept_and_stay_when_failed_rows_are_generated_again(settings, ray_here):
    class Unlucky(GenerateWorker):
        def admit(self, batch, request, **how):
            if request.id == "row-01":
                raise RequestError(request.id, "out of luck")
            super().admit(batch, request, **how)

    job = settings(shard_size=12)
    job = job.model_copy(update={"guidance": job.guidance.updated(attention_maps="every:2")})
    assert run_job(job, worker_class=Unlucky)["failed"] == 1
    dataset = Dataset(job.output)
    before = dataset.attention().to_pylist()
    assert run_job(job.model_copy(update={"retry_failed": True}))["failed"] == 0
    seen = dataset.attention().to_pylist()
    assert [row for row in seen if row["id"] != "row-01"] == before
    for row in seen:
        steps, maps = attention_maps(row)
        assert (steps, maps.shape) == ([0, 2, STEPS - 1], (3, 8, 8))
        assert np.array_equal(maps[-1], attention_map(row))
        assert not np.array_equal(maps[0], maps[-1])
    with open_manifest(job.manifest) as manifest:
        assert verify(open_storage(job.output), manifest).proved
    with pytest.raises(OutputError, match=r'guidance\.attention_maps: "every:2" -> "last"'):
        run_job(settings(shard_size=12))


def test_nothing_is_written_before_an_actor_has_loaded_the_model(settings, ray_here):
    class Unready(GenerateWorker):
        def load(self):
            raise ModelError("it is not there.")

    job = settings()
    with pytest.raises(ModelError, match="it is not there"):
        run_job(job, worker_class=Unready)
    assert [name for name in os.listdir(job.output) if name != ".lock"] == []
    run_job(job.model_copy(update={"shard_size": 12}), worker_class=FakeWorker)


def test_a_damaged_progress_or_summary_ends_no_run(reference, settings):
    settings, _ = reference
    root = Path(settings.output)
    before = json.loads((root / "summary.json").read_bytes())
    for name in ("progress.json", "summary.json"):
        (root / name).write_bytes(b"")
    assert run_job(settings)["images"] == 12
    assert json.loads((root / "summary.json").read_bytes())["images"] == before["images"]


@pytest.mark.parametrize(
    ("worker_class", "slots", "assert_the_same"),
    [
        pytest.param(Slow, 1, assert_same_dataset, id="fake"),
        pytest.param(
            GenerateWorker, 4, assert_same_but_for_rounding, id="real", marks=pytest.mark.slow
        ),
    ],
)
def test_a_killed_actor_costs_one_shard_at_most(
    request, settings, tmp_path, worker_class, slots, assert_the_same
):
    if worker_class is GenerateWorker:
        reference = request.getfixturevalue("reference")[0].output
    else:
        reference = request.getfixturevalue("cheap_reference")
    pids = tmp_path / "pids"
    pids.mkdir()

    class Known(worker_class):
        def load(self):
            (pids / str(os.getpid())).touch()
            return super().load()

    job = settings(actors=1, slots=slots)
    killed = {}

    def kill_once(progress) -> None:
        committed = Dataset(job.output).shards()
        if not killed and committed:
            killed.update(snapshot(Path(job.output) / "metadata"))
            os.kill(int(next(pids.iterdir()).name), signal.SIGKILL)

    run_job(job, kill_once, worker_class=Known)
    assert len(list(pids.iterdir())) == 2
    after = snapshot(Path(job.output) / "metadata")
    assert killed
    assert {name: after[name] for name in killed} == killed
    fingerprints = {Dataset(root).run["fingerprint"] for root in (job.output, reference)}
    assert len(fingerprints) == 1, "slots change no picture but for rounding"
    assert_the_same(job.output, reference)


def test_a_row_that_kills_its_process_fails_alone(settings, ray_here, monkeypatch):
    monkeypatch.setattr("aae_batch.job.pool.NODE_LOSS_SECONDS", 0.1)  # no node is lost here

    class Deadly(FakeWorker):
        def admit(self, batch, request) -> None:
            if request.id == "row-04":
                os.kill(os.getpid(), signal.SIGKILL)
            super().admit(batch, request)

    job = settings()
    summary = run_job(job, worker_class=Deadly)
    assert (summary["images"], summary["failures"]) == (11, {"ActorDied": 1})
    dataset = Dataset(job.output)
    rows = {row["id"]: row for row in dataset.metadata().to_pylist()}
    assert list(rows) == [f"row-{i:02}" for i in range(12)]
    assert rows["row-04"]["file_name"] is None
    assert "its process died twice" in rows["row-04"]["error"]
    assert len(dataset.storage.list("images/")) == 11
    with open_manifest(job.manifest) as manifest:
        assert verify(open_storage(job.output), manifest).proved


def test_actors_that_only_die_stop_the_job(settings, ray_here):
    class Hopeless(GenerateWorker):
        def load(self):
            return Loaded("cpu", "float32")

        def work(self, task):
            raise ValueError("nothing works")

    with pytest.raises(JobError, match=r"3 actors died one after another.*nothing works"):
        run_job(settings(max_deaths=2), worker_class=Hopeless)


def test_an_actor_that_hangs_is_given_up_and_so_is_the_row_that_hangs_it(
    settings, tmp_path, ray_here, monkeypatch
):
    asleep = tmp_path / "asleep"

    class Sleepy(FakeWorker):
        def load(self):
            asleep.unlink(missing_ok=True)  # whoever slept has been given up
            return super().load()

        def admit(self, batch, request) -> None:
            if request.id == "row-07":
                asleep.touch()
                time.sleep(1000)
            super().admit(batch, request)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0], sleep=time.sleep)
    ahead = [0.0]
    for module in ("driver", "pool"):
        monkeypatch.setattr(f"aae_batch.job.{module}.time", clock)

    def on_progress(_) -> None:  # hours pass, but only while an actor sleeps
        ahead[0] += 1000.0 * asleep.exists()

    job = settings(row_timeout=900, shard_size=1, actors=1)
    summary = run_job(job, on_progress, worker_class=Sleepy)
    assert (summary["images"], summary["failures"]) == (11, {"ActorDied": 1})
    rows = {row["id"]: row for row in Dataset(job.output).metadata().to_pylist()}
    assert "finished no row in" in rows["row-07"]["error"]
    with open_manifest(job.manifest) as manifest:
        assert verify(open_storage(job.output), manifest).proved


@pytest.mark.parametrize("limit", [3, "50%"])
def test_a_job_that_fails_nearly_everywhere_stops(settings, tmp_path, ray_here, limit):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": ""}\n' * 399 + '{"prompt": "a star", "subjects": ["star"]}\n')
    job = settings(manifest=path, shard_size=50, max_failures=limit)
    with pytest.raises(JobError, match=r"of \d+ rows failed, more than max_failures"):
        run_job(job, worker_class=FakeWorker)
    run_job(job.model_copy(update={"max_failures": None}), worker_class=FakeWorker)
    assert Dataset(job.output).metadata().num_rows == 400


def test_a_job_of_which_no_picture_would_come_does_not_begin(settings, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": ""}\n{"prompt": "a star", "subjects": ["dog"]}\n')
    job = settings(manifest=path)
    with pytest.raises(ManifestError, match=r"No row of .*bad.jsonl can be generated .* blank"):
        run_job(job)
    assert not Path(job.output).exists()


def test_a_full_disk_stops_the_job_with_its_own_words(settings, ray_here):
    class Full(GenerateWorker):
        def load(self):
            return Loaded("cpu", "float32")

        def work(self, task):
            raise OutputError("Cannot write images/00000/a.png: No space left on device.")

    with pytest.raises(JobError, match="No space left"):
        run_job(settings(), worker_class=Full)


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (SettingsError("attn_res is 5x5."), SettingsError, "attn_res is 5x5."),
        (MemoryError("no room"), ModelError, "could not load .*MemoryError: no room"),
        (None, JobError, "died twice while they loaded"),
    ],
)
def test_an_actor_that_cannot_start_stops_the_job_at_once(settings, ray_here, error, raised, said):
    class Unready(GenerateWorker):
        def load(self):
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error

    with pytest.raises(raised, match=said):
        run_job(settings(), worker_class=Unready)


def test_bad_rows_become_failed_rows(tiny_pipeline_folder, settings, tmp_path, ray_here):
    prompt = "a red circle and a blue square"
    rows = [
        {"id": "good", "prompt": prompt, "subjects": ["circle"], "height": None},
        {"id": "size", "prompt": prompt, "subjects": ["circle"], "height": 100},
        {"id": "none", "prompt": None, "subjects": ["circle"], "height": None},
        {"id": "word", "prompt": prompt, "subjects": ["dog"], "height": None},
        {"id": "bare", "prompt": prompt, "subjects": None, "height": None},
        {"id": "good", "prompt": prompt, "subjects": ["circle"], "height": None},
    ]
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    job = settings(manifest=str(path))
    summary = run_job(job)
    assert summary["failures"] == {"RequestError": 3, "SubjectError": 1, "PromptError": 1}
    assert summary["examples"]["SubjectError"].startswith("row word: subject 'dog' is not in")
    metadata = Dataset(job.output).metadata().to_pylist()
    assert [row["status"] for row in metadata] == ["ok"] + ["failed"] * 5
    assert metadata[1]["height"] is None  # it could not be used
    assert all(row["error"].startswith(f"row {row['id']}: ") for row in metadata[1:])


def test_another_setting_is_refused_and_shown(reference):
    settings, _ = reference
    changed = settings.model_copy(
        update={"guidance": settings.guidance.updated(scale_factor=5.0, num_inference_steps=7)}
    )
    with pytest.raises(OutputError) as refused:
        run_job(changed)
    assert "guidance.scale_factor: null -> 5.0" in str(refused.value)
    assert "guidance.num_inference_steps: 4 -> 7" in str(refused.value)


def test_another_shard_size_is_refused_and_none_is_taken_over(reference):
    settings, _ = reference
    with pytest.raises(OutputError, match="shard_size: 3 -> 4"):
        run_job(settings.model_copy(update={"shard_size": 4}))
    run_job(settings.model_copy(update={"shard_size": None}))


def test_another_manifest_is_refused(reference, tmp_path):
    settings, _ = reference
    path = tmp_path / "other.parquet"
    table = pq.read_table(settings.manifest)
    pq.write_table(table.slice(1), path)
    with pytest.raises(OutputError, match="manifest: "):
        run_job(settings.model_copy(update={"manifest": str(path)}))


@pytest.mark.parametrize(
    ("wanted", "gpus", "cores", "plan"),
    [
        (None, 0, 8, WorkerPlan(1, 1, cpus=1, gpus=0, threads=8)),
        ((2, 2), 0, 8, WorkerPlan(2, 2, cpus=1, gpus=0, threads=4)),
        ((4, 4), 0, 2, WorkerPlan(4, 4, cpus=1, gpus=0, threads=1)),
        (None, 1, 64, WorkerPlan(1, None, cpus=1, gpus=1, threads=None)),
        ((2, 16), 0.5, 64, WorkerPlan(2, 16, cpus=1, gpus=0.5, threads=None)),
    ],
)
def test_actors_share_what_the_machine_has(wanted, gpus, cores, plan):
    assert WorkerPlan.of(wanted, gpus, cores) == plan


@pytest.mark.parametrize(
    ("given", "actors"), [(3, (3, 3)), ("3", (3, 3)), ("1:8", (1, 8)), (None, None)]
)
def test_actors_are_a_number_or_a_range(settings, given, actors):
    assert settings(actors=given).actors == actors


@pytest.mark.parametrize("wrong", ["8:1", "0", "many", "1:2:3"])
def test_a_wrong_range_of_actors_is_refused(settings, wrong):
    with pytest.raises(SettingsError, match="actors"):
        settings(actors=wrong)


class Noting(FakeWorker):
    """Notes the rows that it samples, in a file beside the output."""

    def admit(self, batch, request):
        with open(f"{self.context.root}-sampled", "a") as sampled:
            print(request.id, file=sampled)
        super().admit(batch, request)


class Holding(Noting):
    """Begins its fifth row, in the middle of its second shard, and goes on with it once the job is told to
    stop; without a grace period, never."""

    def admit(self, batch, request):
        sampled = Path(f"{self.context.root}-sampled")
        if sampled.exists() and len(sampled.read_text().split()) == 4:
            Path(f"{self.context.root}-begun").touch()
            while not (self._stopping and self.settings.grace):
                time.sleep(0.01)
        super().admit(batch, request)


def stop_once_begun(output: str):
    """A callback of a job that sends a signal once `Holding` has begun its row."""
    begun = Path(f"{output}-begun")

    def stop(progress) -> None:
        if begun.exists():
            begun.unlink()
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


@pytest.mark.parametrize(
    ("layout", "grace", "kept", "is_damaged"),
    [
        ("files", 60, 5, False),
        ("webdataset", 60, 5, False),
        ("parquet", 60, 5, False),
        ("files", 60, 5, True),
        ("files", 0, 4, False),
    ],
)
def test_what_a_stop_finds_finished_is_not_made_again(
    cheap_reference, settings, layout, grace, kept, is_damaged
):
    job = settings(layout=layout, grace=grace, actors=1)
    sampled = Path(f"{job.output}-sampled")
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_job(job, stop_once_begun(job.output), Holding)
    said = f"{kept} of 12 rows are kept ({kept - 3} of them in incomplete shards)"
    assert said in str(stopped.value)
    assert len(Dataset(job.output).shards()) == 1
    with open_manifest(job.manifest) as manifest:
        assert verify(open_storage(job.output), manifest).only_incomplete
    before = sampled.read_text().split()[:kept]
    sampled.unlink()
    (partial,) = Path(job.output, "partial").glob("*/*")
    if is_damaged:
        damaged = bytearray(partial.read_bytes())
        damaged[100] ^= 1
        partial.write_bytes(damaged)
        before = before[:3]
    told = []
    run_job(job, told.append, Noting)
    assert sorted(before + sampled.read_text().split()) == [f"row-{i:02}" for i in range(12)]
    assert told[-1].done == 12
    assert ("warning" in told[-1].now.examples) is is_damaged
    assert not partial.exists()
    assert_same_rows(job.output, cheap_reference)
    with open_manifest(job.manifest) as manifest:
        assert verify(open_storage(job.output), manifest).proved


def test_failed_rows_that_a_stop_finds_made_again_are_kept_too(cheap_reference, settings):
    class Unlucky(FakeWorker):
        def admit(self, batch, request) -> None:
            raise SubjectError(request.id, "bad luck.")

    job = settings(actors=1)
    assert run_job(job, worker_class=Unlucky)["failed"] == 12
    again = job.model_copy(update={"retry_failed": True})
    with pytest.raises(KeyboardInterrupt, match=r"5 of 12 rows are kept \(2 of them"):
        run_job(again, stop_once_begun(job.output), Holding)
    run_job(again, worker_class=Noting)
    sampled = Path(f"{job.output}-sampled").read_text().split()
    assert sorted(sampled) == [f"row-{i:02}" for i in range(12)]
    assert_same_dataset(job.output, cheap_reference)


@pytest.mark.parametrize(
    "how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)  # the storm of tests/chaos kills many
def test_a_killed_or_an_interrupted_driver_loses_nothing(
    cheap_reference, settings, how, monkeypatch
):
    monkeypatch.setenv("AAE_CHAOS_PACE", "0.2")
    job = settings()
    command = [
        *(sys.executable, "-m", "tests.chaos.drive", "generate", job.manifest, job.output),
        *("--model", job.model, "--slots", "1", "--shard-size", "3", "--grace", "0"),
    ]
    stopped = _stop_after(command, job.output, shards=1, how=how)
    if how == signal.SIGKILL:
        assert stopped.returncode == -signal.SIGKILL
    else:
        assert stopped.returncode == 3, stopped.stderr
        assert "of 12 rows are kept" in stopped.stderr
        assert "Run the same command again to go on" in stopped.stderr
        assert "Traceback" not in stopped.stderr
    assert not (Path(job.output) / "summary.json").exists()
    finished = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    assert "12 images, 0 failed rows" in finished.stdout
    assert_same_dataset(job.output, cheap_reference)


def _stop_after(command, output, shards: int, how: signal.Signals) -> subprocess.CompletedProcess:
    """Start `command`, and send it a signal once so many shards are committed."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while len(Dataset(output).shards()) < shards and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)
