"""What a job writes down of itself, and what it is held against when it goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from aae_batch.cli import app
from aae_batch.dataset import partial
from aae_batch.dataset.layouts import shard_of
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.run_record import fingerprint
from aae_batch.dataset.verify import verify
from aae_batch.dataset.webdataset import tar_members
from aae_batch.errors import JobError, OutputError, SettingsError
from aae_batch.generate.driver import GenerateJob, run_job
from aae_batch.generate.records import (
    begin,
    earlier_failures,
    make_plan,
    progress_record,
    summarize,
)
from aae_batch.generate.settings import JobSettings
from aae_batch.job.plan import Piece
from aae_batch.job.progress import Progress, Tally
from aae_batch.job.records import Loaded, as_json, check_loaded, resolved
from aae_batch.manifest.reader import open_manifest
from aae_batch.report.write import write_report
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.store.local import LocalStorage
from aae_batch.store.open import open_storage
from tests.small_output import STEPS, edit_table


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path / "out")


@pytest.fixture
def plan(storage, tmp_path):
    """What a job comes to, given some of its settings."""
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps({"prompt": "a red circle"}) + "\n")

    def make(**changes):
        guidance = changes.pop("guidance", GuidanceConfig())
        settings = JobSettings(manifest=manifest, output=storage.root, guidance=guidance, **changes)
        with open_manifest(manifest) as opened:
            return make_plan(settings, opened, storage)

    return make


def test_pictures_are_png_files_by_default(plan):
    run = plan().run
    assert (run["layout"], run["image_format"]) == ("files", {"kind": "png", "level": 1})


def test_a_resume_takes_the_form_that_the_output_was_begun_with(plan, storage):
    begin(storage, plan(layout="webdataset", image_format="webp", image_quality=70).run)
    for again in (plan(), plan(layout="webdataset"), plan(image_format="webp")):
        assert again.begun
        assert again.run["layout"] == "webdataset"
        assert again.run["image_format"] == {"kind": "webp", "quality": 70, "lossless": False}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layout": "parquet"}, 'layout: "webdataset" -> "parquet"'),
        ({"image_format": "png"}, 'image_format.kind: "webp" -> "png"'),
        ({"image_quality": 71}, "image_format.quality: 70 -> 71"),
        ({"webp_lossless": True}, "image_format.lossless: false -> true"),
    ],
)
def test_another_form_is_refused_and_shown(plan, storage, changes, said):
    begin(storage, plan(layout="webdataset", image_format="webp", image_quality=70).run)
    with pytest.raises(OutputError) as refused:
        plan(**changes)
    assert said in str(refused.value)


def test_a_format_s_setting_of_another_format_is_refused(plan):
    with pytest.raises(SettingsError, match="png has no quality"):
        plan(image_quality=90)


def test_failures_are_counted_over_sessions(storage):
    dataset = Dataset(storage)
    assert earlier_failures(dataset) == {}
    progress = Progress(total=9, before=0, now=Tally(), seconds=0)
    record = progress_record(progress, {"PromptError": 2}, now=1_800_000_000.4)
    assert record["time"] == "2027-01-15T08:00:00+00:00"
    assert record["eta_seconds"] is None
    storage.write_bytes("progress.json", as_json(record))
    assert earlier_failures(dataset) == {"PromptError": 2}


def test_a_damaged_progress_is_no_progress(plan, storage):
    begin(storage, plan().run)
    progress = progress_record(Progress(total=9, before=0, now=Tally(), seconds=0), {}, now=1e9)
    wrong = [{"time": 17}, {"failures": {"a": "1"}}, {"eta_seconds": 1e300}, {"rows": None}]
    damages = [json.dumps({**progress, **one}).encode() for one in wrong]
    infinite = json.dumps({**progress, "eta_seconds": float("inf")}).encode()
    for damaged in (b"", b"{}", b"[]", b"null", b'{"rows": 1', b"\xff", infinite, *damages):
        storage.write_bytes("progress.json", damaged)
        assert Dataset(storage).progress is None
        assert earlier_failures(Dataset(storage)) == {}
        assert plan().begun


FOREIGN = b'{"name": "an experiment of someone else", "settings": {}}'


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"images/holiday.png": b"dear"}, "is not empty .*images.* no run made it"),
        ({"notes.txt": b""}, "is not empty .*notes.txt"),
        ({"run.json": FOREIGN, "images/holiday.png": b"dear"}, "no run of aae-batch wrote it"),
        ({"run.json": b"[]", "images/holiday.png": b"dear"}, "is not a JSON object"),
        ({"metadata/00000.parquet": b""}, "is not empty .*metadata"),
    ],
)
def test_an_output_that_is_not_ours_is_refused_and_stays_as_it_is(plan, storage, there, said):
    for name, data in there.items():
        storage.write_bytes(name, data)
    with pytest.raises(OutputError, match=said):
        plan()
    assert {name: storage.read_bytes(name) for name in there} == there


@pytest.mark.parametrize("name", ["images", "attention", "metadata", "progress.json", ".parts"])
def test_a_link_inside_an_output_is_refused_and_not_followed(plan, storage, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "holiday.png").write_bytes(b"dear")
    begin(storage, plan().run)
    Path(storage.root, name).symlink_to(elsewhere)
    with pytest.raises(OutputError, match="is a link"):
        plan()
    assert [path.name for path in elsewhere.iterdir()] == ["holiday.png"]


def test_what_the_settings_leave_open_is_what_the_first_actor_found(plan, storage):
    run = resolved(plan().run, Loaded("cuda", "bfloat16"))
    begin(storage, run)
    assert plan().begun
    assert plan(device="cuda:1", dtype="bfloat16").begun
    with pytest.raises(OutputError, match='dtype: "bfloat16" -> "float32"'):
        plan(dtype="float32")
    with pytest.raises(JobError, match='device: "cuda" -> "cpu"'):
        check_loaded(run, Loaded("cpu", "bfloat16"))


def test_what_an_earlier_version_left_open_stays_open(plan, storage):
    begin(storage, plan().run)  # it wrote down `auto`
    check_loaded(plan().run, Loaded("cuda", "bfloat16"))


def of_settings(run: dict, settings: dict) -> dict:
    """The record of a run with other settings."""
    return run | {"settings": settings, "fingerprint": fingerprint(settings)}


def test_a_run_of_a_version_with_one_guided_method_goes_on(plan, storage):
    """Its guidance had the steering of attend-and-excite in it, and nothing of other methods."""
    run = plan().run
    settings = dict(run["settings"])
    steering = settings.pop("steering")["attend-and-excite"]
    guidance = {name: v for name, v in settings["guidance"].items() if name != "by_method"}
    settings = {name: v for name, v in settings.items() if not name.startswith("plugin")}
    begin(storage, of_settings(run, settings | {"guidance": guidance | steering}))
    assert plan().begun
    assert plan(guidance=GuidanceConfig(scale_factor=20.0)).begun, "which is what it was"
    with pytest.raises(OutputError, match=r"guidance.scale_factor: 20.0 -> 5.0\)"):
        plan(guidance=GuidanceConfig(scale_factor=5.0))


def test_a_run_of_a_version_without_maps_over_time_goes_on_and_is_given_none(plan, storage):
    run = plan().run
    guidance = {
        name: v for name, v in run["settings"]["guidance"].items() if name != "attention_maps"
    }
    begin(storage, of_settings(run, run["settings"] | {"guidance": guidance}))
    assert plan().begun
    with pytest.raises(OutputError, match=r'guidance\.attention_maps: "last" -> "every:5"'):
        plan(guidance=GuidanceConfig(attention_maps="every:5"))


def test_a_method_that_only_this_version_has_changes_no_run(plan, storage):
    run = plan().run
    settings = dict(run["settings"])
    settings["steering"] = {"attend-and-excite": settings["steering"]["attend-and-excite"]}
    begin(storage, of_settings(run, settings))
    assert plan().begun


def test_another_steering_of_a_method_is_told_alone(plan, storage):
    run = plan().run
    syngen = run["settings"]["steering"]["syngen"] | {"scale_factor": 7.0}
    steering = run["settings"]["steering"] | {"syngen": syngen}
    begin(storage, of_settings(run, run["settings"] | {"steering": steering}))
    with pytest.raises(OutputError, match=r"other settings \(steering.syngen: [^;]*\): choose"):
        plan()


def test_a_run_that_another_has_begun_meanwhile_is_not_gone_on_with(plan, storage):
    run = plan().run
    begin(storage, run)
    begin(storage, run)  # the answer to a first attempt may have been lost
    with pytest.raises(OutputError, match="Another run has begun"):
        begin(storage, resolved(run, Loaded("cpu", "float32")))


def test_other_versions_are_refused_unless_they_are_accepted(plan, storage):
    run = plan().run
    begin(storage, run | {"versions": run["versions"] | {"torch": "1.0"}})
    with pytest.raises(OutputError, match=r'torch: "1.0" -> .* --other-versions'):
        plan()
    assert plan(other_versions=True).begun


@pytest.mark.parametrize(
    ("slots", "read"),
    [("auto", "auto"), ("3", 3), (3.0, 3), (2.7, None), (True, None), ("2.7", None), ("", None)],
)
def test_slots_are_a_whole_number_or_measured(slots, read):
    def given() -> JobSettings:
        return JobSettings(manifest="m", output="o", guidance=GuidanceConfig(), slots=slots)

    if read is None:
        with pytest.raises(SettingsError, match="give a number from 1, or auto"):
            given()
    else:
        assert given().slots == read


def test_every_row_says_what_it_cost(make_output):
    storage = make_output().storage
    cost = Dataset(storage).metadata(["id", "forwards"]).to_pylist()
    assert {row["id"]: row["forwards"] for row in cost} == {
        **dict.fromkeys(["a", "b", "c", "d.1"], 8),
        "bad": None,
    }
    assert summarize(Dataset(storage), None)["methods"]["stable-diffusion"]["mean_forwards"] == 8


@pytest.mark.parametrize("layout", ["files", "webdataset", "parquet"])
def test_an_output_that_does_not_say_what_rows_cost_goes_on_without(make_output, layout):
    output = make_output(layout, earlier=True)
    storage, dataset = output.storage, Dataset(output.storage)
    before = dataset.metadata()
    assert "forwards" not in before.column_names
    assert "forwards" not in dataset.metadata(shards=[]).column_names
    shard = shard_of(dataset.run, storage, 0)
    kept = shard.stored_outcomes(0)
    storage.delete("metadata/00000.parquet")
    again = [replace(one, metadata=one.metadata | {"forwards": 8}) for one in kept]
    with open_manifest(output.manifest) as manifest:
        shard.commit(again, manifest.part(0, 2).extras)
        assert verify(storage, manifest).proved
    assert dataset.metadata().equals(before)
    assert summarize(dataset, None)["methods"]["stable-diffusion"]["mean_forwards"] is None
    write_report(storage)


def settings_of(output, layout="files"):
    return JobSettings(
        manifest=output.manifest,
        output=output.storage.root,
        guidance=GuidanceConfig(num_inference_steps=STEPS),
        layout=layout,
        shard_size=2,
    )


def planned_again(output):
    with open_manifest(output.manifest) as manifest:
        return make_plan(settings_of(output), manifest, output.storage)


WITH_A_NOTE = [
    {"id": name, "prompt": "a cat", "method": "stable-diffusion", "note": name} for name in "abc"
]


def column_of(name: str, values: list, kind: pa.DataType | None = None):
    """A change: other values in a column of a table."""
    return lambda table: table.set_column(
        table.schema.get_field_index(name), name, pa.array(values, kind)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (column_of("id", ["a", "b.0"]), "row b.0: its id is 'b.0', and in the manifest 'b'"),
        (column_of("prompt", ["a cat ", "a cat"]), "row a: its prompt is 'a cat '"),
        (column_of("note", ["a", None]), "shard 0: its column note is not that of the manifest"),
        (column_of("note", ["a", "b"], pa.large_string()), "its column note is large_string, and"),
        (
            lambda table: table.append_column(" x", pa.nulls(2)),
            "its column  x is null, and in the manifest missing",
        ),
    ],
)
def test_a_run_goes_on_only_with_the_manifest_as_its_version_read_it(make_output, change, words):
    output = make_output(rows=WITH_A_NOTE, earlier=True)
    assert planned_again(output).committed == {0, 1}
    edit_table(output.storage, "metadata/00000.parquet", change)
    with pytest.raises(OutputError, match="finish it with that version") as refused:
        planned_again(output)
    assert words in str(refused.value)


def job_again(output, plan_of=lambda plan, dataset: plan):
    dataset = Dataset(output.storage)
    with open_manifest(output.manifest) as manifest:
        settings = settings_of(output, dataset.run["layout"])
        plan = plan_of(make_plan(settings, manifest, output.storage), dataset)
        return GenerateJob(settings, plan, manifest, dataset)


def test_rows_that_a_stopped_retry_has_made_again_are_left_for_the_next_one(make_output):
    output = make_output("webdataset")
    shard = shard_of(Dataset(output.storage).run, output.storage, 1)
    good, bad = shard.stored_outcomes(2)
    partial.keep(shard, [bad])
    assert job_again(output).partial_files == {}
    assert not output.storage.list("partial/"), "a row that failed again is of no use"
    partial.keep(shard, [replace(good, index=bad.index, metadata=good.metadata | {"id": "bad"})])
    found = verify(output.storage)
    assert [str(problem) for problem in found.problems] == [
        "shard 1: rows that a stopped --retry-failed has made again are in partial/: run that command again."
    ]
    (advice,) = found.advice("out")
    assert "with --retry-failed again" in advice
    job = job_again(output)
    assert (job.partial_files, job.rows_kept()) == ({}, 0)
    job = job_again(output, lambda plan, dataset: plan.retrying(dataset))
    assert (list(job.partial_files), job.rows_kept()) == ([1], 1)


def test_rows_that_two_stops_keep_count_once(make_output):
    output = make_output("webdataset")
    shard = shard_of(Dataset(output.storage).run, output.storage, 1)
    outcomes = shard.stored_outcomes(2)
    for name in ("metadata/00001.parquet", "summary.json"):
        output.storage.delete(name)
    partial.keep(shard, outcomes[:1])
    partial.keep(shard, outcomes)
    assert job_again(output).rows_kept() == 2
    done = CliRunner().invoke(app, ["status", output.storage.root])
    assert "2 rows of incomplete shards are kept" in done.output


@pytest.mark.parametrize("layout", ["files", "webdataset", "parquet"])
def test_a_run_that_does_not_count_forwards_may_have_them_in_its_manifest(
    make_output, layout, tmp_path
):
    rows = [row | {"forwards": f"{i} of mine"} for i, row in enumerate(WITH_A_NOTE)]
    output = make_output(layout, rows=rows, earlier=True)
    root = output.storage.root
    output.storage.delete("summary.json")
    assert run_job(settings_of(output, layout))["images"] == 3
    for command in (
        ["verify", root, "--manifest", str(output.manifest)],
        ["report", root],
        ["export", root, str(tmp_path / "to"), "--format", "webdataset"],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    assert Dataset(root).metadata()["forwards"].to_pylist() == [row["forwards"] for row in rows]
    if layout == "webdataset":
        members = dict(tar_members(output.storage.read_bytes("images/00000.tar")))
        assert json.loads(members["a.json"])["forwards"] == "0 of mine"


def test_what_two_versions_wrote_together_is_read_or_refused_in_a_sentence(make_output):
    output = make_output(rows=WITH_A_NOTE)
    dataset = Dataset(output.storage)
    edit_table(output.storage, "metadata/00001.parquet", lambda table: table.drop(["note"]))
    assert dataset.metadata()["note"].to_pylist() == ["a", "b", None]
    as_numbers = column_of("note", [1, 2], pa.int64())
    edit_table(output.storage, "metadata/00000.parquet", as_numbers)
    edit_table(
        output.storage,
        "metadata/00001.parquet",
        lambda table: table.append_column("note", pa.array([["c"]])),
    )
    with pytest.raises(OutputError, match="have columns of different types"):
        dataset.metadata()
    assert dataset.metadata(["id"])["id"].to_pylist() == ["a", "b", "c"]


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_ids_whose_images_would_be_one_file_on_the_disk_are_one_id(
    make_output, layout, monkeypatch
):
    rows = [{"id": name, "prompt": "a", "method": "stable-diffusion"} for name in ("A", "b", "a")]
    output = make_output(layout, rows=rows)
    guidance = GuidanceConfig(num_inference_steps=STEPS)
    settings = JobSettings(
        manifest=output.manifest, output=output.storage.root, guidance=guidance, shard_size=2
    )
    inside = LocalStorage._path
    monkeypatch.setattr(LocalStorage, "_path", lambda self, name: inside(self, name.lower()))
    with open_manifest(output.manifest) as manifest:
        plan = make_plan(settings, manifest, output.storage)
        job = GenerateJob(settings, plan, manifest, Dataset(output.storage))
        (row,) = job.task(Piece(1, 2, 3), commit=True).part.rows()
    assert (row.error is not None) == (layout == "files")
