from __future__ import annotations

from collections import Counter

from aae_batch.cli.terminal import lines
from aae_batch.job.progress import Progress, Tally, clock


def test_one_line_says_it_all():
    progress = Progress(
        total=100,
        before=20,
        now=Tally(done=40, refinements=90, failures=Counter(RowError=10)),
        seconds=20,
    )
    assert str(progress) == (
        "60/100 rows, 1.50 images/s, 10 failed, 3.0 refinements an image, ETA 0:20"
    )


def test_before_the_first_row_there_is_no_estimate():
    progress = Progress(total=100, before=0, now=Tally(), seconds=1)
    assert progress.eta is None
    assert "ETA --:--" in str(progress)


def test_hours_are_shown_only_where_there_are_any():
    assert [clock(seconds) for seconds in (5, 65, 3665)] == ["0:05", "1:05", "1:01:05"]


def test_a_log_has_a_line_every_15_seconds_and_one_at_the_end():
    written: list[str] = []
    now = 0.0
    report = lines(written.append, clock=lambda: now)
    for second in range(40):
        now = float(second)
        report(Progress(total=39, before=0, now=Tally(done=second), seconds=second + 0.1))
    assert [line.split()[0] for line in written] == ["0/39", "15/39", "30/39", "39/39"]


def test_tries_are_told_once_a_row_is_done():
    assert "tries" not in str(Progress(9, 0, Tally(tries=5), 2.0))
    assert "2.5 tries a row" in str(Progress(9, 0, Tally(2, tries=5), 2.0))
