from __future__ import annotations

from collections import Counter

from aae_batch.dataset.status import status
from aae_batch.generate.records import progress_record
from aae_batch.job.progress import Progress, Tally

RUN = {"rows": 95, "shard_size": 10}
NOW = 1_800_000_000.0
PROGRESS = progress_record(
    Progress(
        total=95,
        before=20,
        now=Tally(done=25, refinements=40, failures=Counter(RowError=5)),
        seconds=10,
    ),
    {"PromptError": 1, "SubjectError": 4},
    NOW,
)


def test_a_running_job_is_as_far_as_it_says():
    seen = status(RUN, range(4), PROGRESS, None, NOW + 12)
    assert str(seen).splitlines() == [
        "45/95 rows done, 50 left; 4/10 shards committed (40 rows)",
        "5 failed: 4 x SubjectError, 1 x PromptError",
        "2.00 images/s, ETA 0:00:20",
    ]


def test_a_job_that_is_silent_is_as_far_as_its_commits():
    seen = status(RUN, range(5), PROGRESS, None, NOW + 3600)
    assert (seen.finished, seen.rows_done, seen.eta) == (50, 50, None)
    assert "last reported 1:00:00 ago" in seen.notes[0]
    assert "5 rows were committed after that" in seen.notes[1]


def test_a_complete_dataset_is_what_its_summary_says():
    summary = {"failures": {"PromptError": 2}, "last_session": {"images_per_second": 1.5}}
    seen = status(RUN, range(10), PROGRESS, summary, NOW + 3600)
    assert str(seen).splitlines() == [
        "95/95 rows done, 0 left; 10/10 shards committed (95 rows)",
        "2 failed: 2 x PromptError",
        "1.50 images/s",
        "complete",
    ]


def test_the_listing_is_all_there_is_without_the_job_s_word():
    seen = status(RUN, [9, 12], None, None, NOW)
    assert (seen.rows_done, seen.shards_done, seen.failures) == (5, 1, None)
    assert "There is no progress.json" in seen.notes[0]


def test_what_does_not_agree_is_said():
    other = PROGRESS | {"rows": 12}
    assert "covers 12 rows, not 95" in status(RUN, [], other, None, NOW).notes[0]
    assert "shards are missing" in status(RUN, [0], PROGRESS, {"failures": {}}, NOW).notes[0]
    assert "Only summary.json is missing" in status(RUN, range(10), PROGRESS, None, NOW).notes[0]


def test_rows_that_a_stopped_job_kept_are_told():
    seen = status(RUN, [0], PROGRESS, None, NOW + 3600, 7)
    assert seen.notes[-1].startswith("7 rows of incomplete shards are kept in partial/")
