"""The benchmark of a slow store runs real actors into a real S3, and sees what they do."""

from __future__ import annotations

import sys

from aae_batch.generate.writers import LEAST, MOST
from benchmarks import worker

SLOTS = 4


def test_more_writers_start_for_a_slow_store_and_few_images_wait(monkeypatch, capsys):
    options = ["--workers", "1", "--shards", "3", "--shard-size", "16", "--slots", str(SLOTS)]
    options += ["--rate", "100", "--side", "16", "--put-ms", "100", "--layouts", "files"]
    monkeypatch.setattr(sys, "argv", ["worker", *options])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
    worker.main()
    titles, _, *lines = (line.split(" | ") for line in capsys.readouterr().out.splitlines())
    (files,) = (dict(zip(titles, line, strict=True)) for line in lines)
    assert int(files["writers"]) > LEAST
    assert int(files["images waiting"]) <= MOST + SLOTS
