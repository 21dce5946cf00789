"""What a job writes down of itself, and what it is held against when it goes on."""

from __future__ import annotations

import json

import pytest

from aae_batch.config import GuidanceConfig
from aae_batch.dataset.reader import Dataset
from aae_batch.dataset.storage import open_storage
from aae_batch.errors import OutputError, SettingsError
from aae_batch.job.progress import Progress, Tally
from aae_batch.job.records import as_json, begin, earlier_failures, make_plan, progress_record
from aae_batch.job.settings import JobSettings
from aae_batch.manifest import open_manifest


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path / "out")


@pytest.fixture
def plan(storage, tmp_path):
    """What a job comes to, given some of its settings."""
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps({"prompt": "a red circle"}) + "\n")

    def make(**changes):
        settings = JobSettings(
            manifest=manifest, output=storage.root, guidance=GuidanceConfig(), **changes
        )
        with open_manifest(manifest) as opened:
            return make_plan(settings, opened, storage)

    return make


def test_pictures_are_png_files_by_default(plan):
    run = plan().run
    assert (run["layout"], run["image_format"]) == ("files", {"kind": "png", "level": 1})


def test_a_resume_takes_the_form_that_the_output_was_begun_with(plan, storage):
    begin(storage, plan(layout="webdataset", image_format="webp", image_quality=70))
    assert plan().layout == "files"  # nothing is committed yet
    storage.write_bytes("metadata/00000.parquet", b"")
    for again in (plan(), plan(layout="webdataset"), plan(image_format="webp")):
        assert again.begun
        assert again.layout == "webdataset"
        assert again.image_format.settings() == {"kind": "webp", "quality": 70, "lossless": False}


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
    begin(storage, plan(layout="webdataset", image_format="webp", image_quality=70))
    storage.write_bytes("metadata/00000.parquet", b"")
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


def test_an_output_begun_anew_knows_nothing_of_the_job_before(plan, storage):
    storage.write_bytes("progress.json", b"{}")
    begin(storage, plan())
    assert Dataset(storage).progress is None


def test_pictures_that_no_run_made_are_not_written_over(tmp_path):
    storage = open_storage(tmp_path / "out")
    storage.write_bytes("images/holiday.png", b"dear to someone")
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"prompt": "a cat"}\n')
    settings = JobSettings(manifest=manifest, output=storage.root, guidance=GuidanceConfig())
    with open_manifest(manifest) as opened, pytest.raises(OutputError, match="someone else's"):
        make_plan(settings, opened, storage)
    assert storage.exists("images/holiday.png")
