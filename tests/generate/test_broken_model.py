"""A model that cannot be loaded stops a job before it begins."""

from __future__ import annotations

import shutil

import pytest

from aae_batch.errors import ModelError
from aae_batch.generate.driver import run_job
from aae_batch.generate.dry_run import dry_run


@pytest.mark.parametrize("start", [run_job, lambda job: dry_run(job, print)])
@pytest.mark.parametrize("part", ["tokenizer", "vae"])
def test_a_job_with_an_incomplete_model_does_not_begin(
    settings, tiny_pipeline_folder, tmp_path, start, part
):
    model = shutil.copytree(tiny_pipeline_folder, tmp_path / "model")
    shutil.rmtree(model / part)
    with pytest.raises(ModelError, match=f"has no .*{part}"):
        start(settings(model=str(model)))
    assert not (tmp_path / "out").exists()
