from __future__ import annotations

from collections import Counter

from aae_batch.cli.terminal import lines
from aae_batch.job.progress import Progress, Tally, clock, reasons


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


def test_rows_that_were_dropped_are_no_images():
    progress = Progress(100, 0, Tally(done=40, refinements=60, dropped=20), seconds=10)
    assert (progress.images_per_second, progress.mean_refinements) == (2.0, 3.0)


def failed(kind: str, *rows: int) -> Tally:
    return Tally.of_failures([{"error_type": kind, "error": f"row {n}: no\ncat."} for n in rows])


def test_a_reason_is_told_once_by_its_first_row():
    written: list[str] = []
    report = lines(written.append, clock=lambda: 0.0)
    now = failed("RowError", 17)
    for tally in (Tally(1), now, now + failed("RowError", 3), now + failed("PromptError", 4)):
        report(Progress(total=9, before=0, now=tally, seconds=0))
    assert written == ["RowError: row 17: no cat", "PromptError: row 4: no cat"]


def test_reasons_are_counted_and_shown_by_an_example():
    now = failed("RowError", 17, 18) + failed("RowError", 3)
    assert reasons(now.failures, now.examples) == ["3 x RowError, e.g. row 17: no cat"]
    assert reasons({"RowError": 3}, {}) == ["3 x RowError"], "an earlier version's summary"


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
