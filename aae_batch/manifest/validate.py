"""Validates every row of a manifest before the job: rows that will fail, and warnings on likely mistakes.

It uses the same code as the job, in several processes, and tokenizes prompts in batches.
"""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np

from aae_batch.columns import NAMES
from aae_batch.errors import JobError, RowError
from aae_batch.manifest.judge import Judge
from aae_batch.manifest.reader import Manifest, Part
from aae_batch.manifest.repeats import repeated
from aae_batch.manifest.row import Row
from aae_batch.methods import BASELINE, METHODS, load_plugins
from aae_batch.request import Request
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.phrases import conjuncts
from aae_batch.sampling.resolve import why_ignored
from aae_batch.sampling.words import Stream, resolve_subjects

PART_ROWS = 2_000
_ALONE = 4 * PART_ROWS
"""Manifests of up to this many rows are checked in this process, as starting others takes a while."""

TRUNCATED, TRUNCATED_NEGATIVE, REPEATED = "TruncatedPrompt", "TruncatedNegative", "RepeatedRow"
IGNORED_NEGATIVE = "IgnoredNegative"
_COLUMN = re.compile(r"column (\w+): ")
_FIRST = re.compile(r"(?:Invalid setting: )?(\w*)")
_SETTINGS = {*NAMES, *GuidanceConfig.model_fields}
_BEGINNINGS = {"token": "token_indices", "the": "prompt"}
"""What reasons begin with: the column or setting that they are about, or these; others are about
subjects."""


class Problem(NamedTuple):
    """An error or a warning about one row.

    `row` counts from 1. `kind` is the class of the error or the name of the warning. `fails` means that the
    row gets no image; otherwise the problem is a warning.
    """

    row: int
    id: str
    column: str
    kind: str
    fails: bool
    problem: str


class Work(NamedTuple):
    """What the cost of an image depends on. `height` and `width` in pixels are None for the model's default;
    `conjuncts` is the number of conjuncts that the method denoises separately."""

    method: str
    num_inference_steps: int
    classifier_free: bool
    height: int | None
    width: int | None
    subjects: int
    conjuncts: int = 1


@dataclass
class Summary:
    """Totals over the manifest.

    Attributes:
        rows: rows of the manifest.
        totals: problems by kind.
        failing: rows that will get no image.
        work: the other rows, grouped by what their cost depends on.
    """

    rows: int
    totals: Counter[str] = field(default_factory=Counter)
    failing: int = 0
    work: Counter[Work] = field(default_factory=Counter)


def validate(
    manifest: Manifest,
    judge: Judge,
    on_problem: Callable[[Problem], None],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    processes: int | None = None,
) -> Summary:
    """Validate every row.

    Args:
        on_problem: called with every problem in row order, and finally with the rows that repeat another.
        on_progress: called with the number of rows done and the total.
        processes: defaults to one per core, or to this process alone for a small manifest.

    Raises:
        ManifestError: the manifest cannot be read to its end.
        JobError: a process was killed.
    """
    summary = Summary(len(manifest))
    digests = []
    done = 0
    starts = range(0, len(manifest), PART_ROWS)
    parts = (manifest.part(start, min(start + PART_ROWS, len(manifest))) for start in starts)
    for findings in _all_findings(parts, judge, processes or _processes(len(manifest))):
        for problem in findings.problems:
            summary.totals[problem.kind] += 1
            summary.failing += problem.fails
            on_problem(problem)
        summary.work += findings.work
        digests.append(np.frombuffer(findings.digests, np.uint64).reshape(-1, 2))
        done += findings.rows
        on_progress(done, len(manifest))
    for problem in _repeated_rows(manifest, np.concatenate(digests)):
        summary.totals[REPEATED] += 1
        on_problem(problem)
    return summary


# --- many processes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Findings:
    """The results of one part. `digests` has 16 bytes per row: a hash of everything that the image depends
    on, or of the row's position if it fails."""

    rows: int
    problems: list[Problem]
    digests: bytes
    work: Counter[Work]


def _processes(rows: int) -> int:
    if rows <= _ALONE:
        return 1
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def _all_findings(parts: Iterable[Part], judge: Judge, processes: int) -> Iterator[_Findings]:
    """Yield the findings of all parts in order. Few parts are queued at a time, to bound memory."""
    if processes == 1:
        yield from (_look_at(part, judge) for part in parts)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, (judge,)) as pool:
        pending: deque[Future[_Findings]] = deque()
        try:
            for part in parts:
                pending.append(pool.submit(_look_at, part))
                if len(pending) > 3 * processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise JobError(
                "A process that checked rows was killed, perhaps for lack of memory; close other programs."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_judge: Judge
"""The judge of a worker process, set by `_begin`."""


def _begin(judge: Judge) -> None:
    global _judge
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is already one process per core
    _judge = judge
    load_plugins(judge.plugin)
    gc.freeze()  # keep the collector from scanning imported objects repeatedly
    gc.set_threshold(100_000)  # a part creates many objects and no garbage


def _look_at(part: Part, judge: Judge | None = None) -> _Findings:
    judge = judge or _judge
    rows = part.rows()
    judge.prepare([row.request.prompt for row in rows if row.error is None])
    problems: list[Problem] = []
    digests: list[bytes] = []
    work: Counter[Work] = Counter()
    for row in rows:
        try:
            settings, subjects = judge.resolve(row)
        except RowError as error:
            problems.append(_problem(row, type(error).__name__, error.reason))
            digests.append(_digest(("row", row.index)))
            continue
        ignored = why_ignored(settings, judge.family)
        problems += _warnings(row, judge.streams, ignored)
        digests.append(_digest(_picture(row.request, settings, ignored is None)))
        work[_work(row.request, settings, subjects, judge)] += 1
    return _Findings(len(rows), problems, b"".join(digests), work)


# --- one row -------------------------------------------------------------------------------------


def _problem(row: Row, kind: str, reason: str) -> Problem:
    match = _COLUMN.match(reason)
    if match:
        column, reason = match[1], reason[match.end() :]
    else:
        (first,) = _FIRST.match(reason).groups()  # type: ignore[union-attr]
        column = first if first in _SETTINGS else _BEGINNINGS.get(first, "subjects")
    return Problem(row.index + 1, row.id, column, kind, True, reason)


def _warnings(row: Row, streams: Sequence[Stream], ignored: str | None) -> Iterator[Problem]:
    if ignored and row.request.negative_prompt:
        column = "negative_prompt"
        yield Problem(row.index + 1, row.id, column, IGNORED_NEGATIVE, False, ignored)
    for kind, column in ((TRUNCATED, "prompt"), (TRUNCATED_NEGATIVE, "negative_prompt")):
        text = getattr(row.request, column)
        for stream in streams if text else ():
            length, most = stream.count(text), stream.length
            if length > most:
                special = stream.first - stream.offset + 1
                who = f"the text encoder {stream.name}" if len(streams) > 1 else "the text encoder"
                reason = (
                    f"has {length - special} tokens and {who} sees {most - special}; shorten it"
                )
                yield Problem(row.index + 1, row.id, column, kind, False, reason)


def _work(request: Request, settings: GuidanceConfig, subjects: int, judge: Judge) -> Work:
    parts = 1
    if METHODS[settings.method].texts == "conjuncts":
        found = resolve_subjects(judge.streams, request)
        parts = len(conjuncts(judge.streams, request.prompt, found))
    return Work(
        settings.method,
        settings.num_inference_steps,
        judge.family.rows(settings) > 1,
        settings.height,
        settings.width,
        subjects,
        parts,
    )


# --- rows that repeat another --------------------------------------------------------------------


def _picture(request: Request, settings: GuidanceConfig, has_negative: bool) -> tuple[object, ...]:
    """Return everything that a row's image depends on. A missing size is the same model default for all rows,
    and plain sampling ignores subjects."""
    named = settings.method != BASELINE
    return (
        request.prompt,
        request.seed,
        settings.method,
        tuple(request.subjects or ()) if named else (),
        tuple(request.token_indices or ()) if named else (),
        (settings.negative_prompt or "") if has_negative else "",
        settings.guidance_scale,
        settings.true_cfg_scale,
        settings.num_inference_steps,
        settings.height,
        settings.width,
    )


def _digest(value: tuple[object, ...]) -> bytes:
    return hashlib.blake2b(repr(value).encode("utf-8", "backslashreplace"), digest_size=16).digest()


def _repeated_rows(manifest: Manifest, digests: np.ndarray) -> Iterator[Problem]:
    """Yield the warnings, reading ids again part by part. digests: [rows, 2], uint64."""
    rows, firsts = repeated(digests[:, 0], digests[:, 1])
    pairs = zip(rows.tolist(), firsts.tolist(), strict=True)
    for part, some in groupby(pairs, key=lambda pair: pair[0] // PART_ROWS):
        start = part * PART_ROWS
        read, _ = manifest.read(start, min(start + PART_ROWS, len(manifest)))
        for row, first in some:
            reason = (
                f"asks for the same image as row {first + 1}; give it another seed, or remove one "
                "of them"
            )
            yield Problem(row + 1, read[row - start].id, "seed", REPEATED, False, reason)
