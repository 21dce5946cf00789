"""`aae-batch`, with other actors: `python -m tests.chaos.drive generate MANIFEST OUTPUT ...`.

The command line, its exit codes, locks and signals are the package's own.

AAE_BATCH_ENGINE: `fake` (no model, pictures cost nothing) or `real`.
AAE_CHAOS_MINES: a folder of mines, see `mines.py`.
AAE_CHAOS_PACE: seconds of a step of the fake engine.
AAE_CHAOS_CLOCK: seconds that this process's clock is off by.
AAE_CHAOS_SEEING: the metric `attention` is computed by actors.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial

from tests.chaos import mines


def main() -> None:
    _shift_clock(float(os.environ.get("AAE_CHAOS_CLOCK", 0)))
    command = sys.argv[1]
    mines.watch("driver", *(["s3://a/b"] if any("s3://" in a for a in sys.argv) else []), "/a/b")
    if os.environ.get("AAE_BATCH_ENGINE", "fake") == "fake":
        _spare_the_driver_models()
    if command == "generate":
        _hire_for_generate()
    elif command == "evaluate":
        _hire_for_evaluate()
    from aae_batch.cli import app

    app()


def _hire_for_generate() -> None:
    from aae_batch.generate import driver
    from tests.chaos.fake import FakeWorker, MinedWorker

    fake = os.environ.get("AAE_BATCH_ENGINE", "fake") == "fake"
    driver.run_job = partial(driver.run_job, worker_class=FakeWorker if fake else MinedWorker)


def _hire_for_evaluate() -> None:
    if "AAE_CHAOS_SEEING" not in os.environ:
        return
    from aae_batch.evaluate import driver as score
    from aae_batch.evaluate.settings import ScoreSettings
    from tests.chaos.fake_scorer import MinedScoreWorker, SeeingMetric

    score.score = partial(score.score, worker_class=MinedScoreWorker)
    named = ScoreSettings.metric_of

    def metric_of(self, run):
        return SeeingMetric(**vars(named(self, run)))

    ScoreSettings.metric_of = metric_of  # type: ignore[method-assign]


def _spare_the_driver_models() -> None:
    """As where the model is on the actors' machines alone. Saves seconds of importing."""
    from aae_batch.errors import ModelError
    from aae_batch.generate import driver

    def nowhere(*_, **__):
        raise ModelError("It is on the actors' machines alone.")

    driver.index_of = nowhere


def _shift_clock(seconds: float) -> None:
    if not seconds:
        return
    now, gmtime = time.time, time.gmtime
    time.time = lambda: now() + seconds
    time.gmtime = lambda at=None: gmtime(time.time() if at is None else at)


if __name__ == "__main__":
    main()
