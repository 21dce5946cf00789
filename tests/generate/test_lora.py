"""Jobs with LoRAs and variants: what identifies the run, and what its workers load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from aae_batch import cli
from aae_batch.dataset.run_record import fingerprint
from aae_batch.errors import ModelError, OutputError, SettingsError
from aae_batch.generate.driver import run_job
from aae_batch.generate.records import begin, make_plan
from aae_batch.generate.settings import JobSettings
from aae_batch.generate.worker import GenerateWorker
from aae_batch.job.worker import WorkerContext
from aae_batch.manifest.reader import open_manifest
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.model.loading import load_pipeline
from aae_batch.store.open import open_storage
from tests.loras import changes, save_lora


@pytest.fixture
def lora(tiny_pipeline_folder, tmp_path) -> Path:
    pipe = load_pipeline(str(tiny_pipeline_folder))
    return save_lora(pipe, tmp_path / "lora").parent


@pytest.fixture
def file(tmp_path) -> Path:
    """A LoRA as far as it is read before a model is loaded."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"weights")
    return path


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


def test_the_images_depend_on_the_variant_and_on_loras_scales_and_files(plan, file):
    def of(**changes) -> str:
        return plan(**changes).run["fingerprint"]

    plain, added = of(), of(lora=[str(file)])
    assert added == of(lora=f"{file}:1") == of(lora=[f"{file}:1.0"])
    others = {plain, added, of(lora=[f"{file}:0.5"]), of(variant="fp16")}
    file.write_bytes(b"others")
    others.add(of(lora=[str(file)]))
    assert len(others) == 5


def test_a_resume_with_another_lora_is_refused_and_shown(plan, storage, file):
    begin(storage, plan(lora=[f"{file}:0.5"]).run)
    assert plan(lora=[f"{file}:0.5"]).begun
    with pytest.raises(OutputError, match=rf'lora: \["{file}:0.5"\] -> \["{file}:0.7"\]\): choose'):
        plan(lora=[f"{file}:0.7"])
    with pytest.raises(OutputError, match=r"lora: .* -> \[\]"):
        plan()
    with pytest.raises(OutputError, match='variant: null -> "fp16"'):
        plan(lora=[f"{file}:0.5"], variant="fp16")
    file.write_bytes(b"others")
    with pytest.raises(OutputError, match=r"other settings \(lora_weights: "):
        plan(lora=[f"{file}:0.5"])


def test_a_run_of_a_version_without_loras_goes_on(plan, storage, file):
    run = plan().run
    new = ("variant", "lora", "lora_weights")
    settings = {name: value for name, value in run["settings"].items() if name not in new}
    assert len(settings) == len(run["settings"]) - len(new)
    begin(storage, run | {"settings": settings, "fingerprint": fingerprint(settings)})
    assert plan().begun
    with pytest.raises(OutputError, match=r"lora: \[\] -> "):
        plan(lora=[str(file)])


def test_a_malformed_or_missing_lora_is_refused_before_anything_is_written(plan, storage):
    with pytest.raises(SettingsError, match="finite number"):
        plan(lora=["owner/name:strong"])
    with pytest.raises(ModelError, match="does not exist; check the path"):
        plan(lora=["/nowhere/a.safetensors"])
    assert storage.anything() is None


def test_the_option_is_repeated_for_several(file, tmp_path):
    other = shutil.copy(file, tmp_path / "b.safetensors")
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps({"prompt": "a red circle", "subjects": ["circle"]}) + "\n")
    base = ["generate", str(manifest), str(tmp_path / "out"), "--dry-run"]

    def run(*given: str):
        return CliRunner().invoke(cli.app, [*base, *given])

    good = run("--lora", f"{file}:0.5", "--lora", str(other))
    assert good.exit_code == 0, good.output
    assert "no row would fail" in good.output
    bad = run("--lora", f"{file}:0.5", "--lora", f"{file}:0.7")
    assert bad.exit_code == 2
    assert "is named twice" in bad.output


def worker(job: JobSettings, run_settings: dict) -> GenerateWorker:
    run = {
        "settings": run_settings,
        "layout": "files",
        "image_format": {"kind": "png", "level": 1},
    }
    context = WorkerContext(job.output, lease="", settings=job, run=run, threads=None)
    return GenerateWorker(context)


def test_a_worker_loads_the_runs_loras_and_no_others(settings, lora, tiny_pipeline_folder):
    job = settings(lora=[f"{lora}:0.5"])
    found = worker(job, job.pixels("")).load_engine().model.pipe.unet.state_dict()
    plain = load_pipeline(str(tiny_pipeline_folder)).unet.state_dict()
    added = changes(lora / "pytorch_lora_weights.safetensors", "unet")
    for name, change in added.items():
        torch.testing.assert_close(found[name], plain[name] + 0.5 * change)
    begun_with = {**job.pixels(""), "lora_weights": {str(lora): "0" * 64}}
    with pytest.raises(ModelError, match=f"{lora} on this machine is not the one"):
        worker(job, begun_with).load_engine()


def test_a_worker_loads_the_runs_variant(settings, tiny_pipeline_folder, tmp_path):
    folder = tmp_path / "variant"
    shutil.copytree(tiny_pipeline_folder, folder)
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    job = settings(model=str(folder), variant="fp16")
    assert worker(job, job.pixels("")).load_engine().model.pipe.unet


@pytest.mark.slow
def test_a_job_with_a_lora_makes_other_images(settings, lora, ray_here):
    """And is resumed by the same command."""
    job = settings(lora=[f"{lora}:2"])
    assert run_job(job)["images"] == 12
    plain = settings(output=f"{job.output}-plain")
    assert run_job(plain)["images"] == 12
    images = [
        open_storage(one.output).read_bytes("images/00000/row-00.png") for one in (job, plain)
    ]
    assert images[0] != images[1]
    run_job(job)
