"""Random kills of all that works for a command, and faults of the store, until the dataset is there.

What each round does hangs on its seed; when exactly a process meets its end also on the machine. See
docs/reliability.md for long runs of `make chaos`.
"""

from __future__ import annotations

import json
import os

import pytest

from tests.chaos.attacker import Choices, Figures


def test_whatever_is_killed_the_dataset_is_whole(raging, seed, capsys):
    place = "folder" if seed % 2 else "bucket"
    with raging(seed) as storm:
        storm.round(Choices.of(storm.random.getrandbits(32), place, kills=4, command="generate"))
    with capsys.disabled():
        print(storm.figures)


@pytest.mark.chaos
def test_chaos_for_long(raging, seed, capsys):
    engine = os.environ.get("AAE_BATCH_ENGINE", "fake")
    kills = int(os.environ.get("AAE_BATCH_KILLS", "1000" if engine == "fake" else "100"))
    one = os.environ.get("AAE_BATCH_ROUND")

    def show(figures: Figures) -> None:
        with capsys.disabled():
            print(f"\n{figures}", flush=True)

    with raging(seed, engine) as storm:
        try:
            if one is not None:
                storm.round(Choices(**json.loads(one)))
            else:
                storm.until(kills, on_progress=show)
        finally:
            show(storm.figures)
