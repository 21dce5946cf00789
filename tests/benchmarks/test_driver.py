"""The driver benchmark hands out every shard, to simulated actors."""

from __future__ import annotations

import sys

from benchmarks import driver


def test_it_hands_out_every_shard(monkeypatch, capsys):
    options = ["--actors", "5", "--shards", "20", "--shard-size", "4"]
    monkeypatch.setattr(sys, "argv", ["driver", *options])
    driver.main()
    assert capsys.readouterr().out.startswith("20 shards of 4 rows, 5 actors: ")
