"""Every row of a manifest judged before the job: what will fail, and what is probably not meant.

Rows are read and judged by the code that the job uses, in several processes, and their prompts tokenized
many at a time.
"""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np

from aae_batch.errors import JobError, RowError
from aae_batch.manifest.judge import Judge, ManyTexts
from aae_batch.manifest.reader import Manifest, Part
from aae_batch.manifest.repeats import repeated
from aae_batch.manifest.row import Row
from aae_batch.methods import BASELINE, METHODS, load_plugins
from aae_batch.request import Request
from aae_batch.sampling.config import GuidanceConfig
from aae_batch.sampling.phrases import conjuncts
from aae_batch.sampling.words import resolve_subjects

PART_ROWS = 2_000
_ALONE = 4 * PART_ROWS
"""Manifests up to this are judged in this process: others take a while to start."""

TRUNCATED, TRUNCATED_NEGATIVE, REPEATED = "TruncatedPrompt", "TruncatedNegative", "RepeatedRow"
_COLUMN = re.compile(r"column (\w+): ")


class Problem(NamedTuple):
    """Something about one row. `fails`: it will have no picture; otherwise it is a warning.

    `row` counts from 1, as a person does; `kind` is the error's class or the warning's name.
    """

    row: int
    id: str
    column: str
    kind: str
    fails: bool
    problem: str


class Work(NamedTuple):
    """What the price of a picture depends on; `height` and `width` None where the model decides.
    `conjuncts` are those that a method denoises one by one."""

    method: str
    num_inference_steps: int
    classifier_free: bool
    height: int | None
    width: int | None
    subjects: int
    conjuncts: int = 1


@dataclass
class Summary:
    """What was found in all.

    Attributes:
        rows: of the manifest.
        totals: problems by kind.
        failing: rows that will have no picture.
        work: the others, by what their price depends on.
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
    """Judge every row.

    Args:
        on_problem: called with every problem in the order of the rows, and at the end with rows that
            repeat another.
        on_progress: called with how many rows of how many are done.
        processes: default: one for each core, and none besides this for a small manifest.

    Raises:
        ManifestError: the manifest cannot be read to its end.
        JobError: one of the processes was killed.
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
    """Of one part. `digests`: 16 bytes a row, of all that the picture depends on; a failing row's are
    those of its own place."""

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
    """Of all parts in their order. Few are read ahead, so that memory does not grow."""
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
                "A process that judged rows was killed, perhaps for its memory; close others."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_judge: Judge
"""Of this process, where it is one of several."""


def _begin(judge: Judge) -> None:
    global _judge
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as the cores
    _judge = judge
    load_plugins(judge.plugin)
    gc.freeze()  # what was imported is not looked through for garbage again and again
    gc.set_threshold(100_000)  # the rows of a part are many objects and no garbage


def _look_at(part: Part, judge: Judge | None = None) -> _Findings:
    judge = judge or _judge
    rows = part.rows()
    judge.tokenizer.prepare([row.request.prompt for row in rows if row.error is None])
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
        problems += _warnings(row, judge.tokenizer)
        digests.append(_digest(_picture(row.request, settings)))
        work[_work(row.request, settings, subjects, judge.tokenizer)] += 1
    return _Findings(len(rows), problems, b"".join(digests), work)


# --- one row -------------------------------------------------------------------------------------


def _problem(row: Row, kind: str, reason: str) -> Problem:
    match = _COLUMN.match(reason)
    if match:
        column, reason = match[1], reason[match.end() :]
    elif reason.startswith(("height is", "width is", "negative_prompt has")):
        column = reason.split()[0]
    elif reason.startswith("token"):
        column = "token_indices"
    else:
        column = "prompt" if reason.startswith("the prompt") else "subjects"
    return Problem(row.index + 1, row.id, column, kind, True, reason)


def _warnings(row: Row, tokenizer: ManyTexts) -> Iterator[Problem]:
    most = tokenizer.model_max_length
    for kind, column in ((TRUNCATED, "prompt"), (TRUNCATED_NEGATIVE, "negative_prompt")):
        text = getattr(row.request, column)
        if text and (length := tokenizer.length(text)) > most:
            reason = f"has {length - 2} tokens and the text encoder sees {most - 2}; shorten it"
            yield Problem(row.index + 1, row.id, column, kind, False, reason)


def _work(request: Request, settings: GuidanceConfig, subjects: int, tokenizer: ManyTexts) -> Work:
    parts = 1
    if METHODS[settings.method].texts == "conjuncts":
        found = resolve_subjects(tokenizer, request)
        parts = len(conjuncts(tokenizer, request.prompt, found))
    return Work(
        settings.method,
        settings.num_inference_steps,
        settings.guidance_scale > 1,
        settings.height,
        settings.width,
        subjects,
        parts,
    )


# --- rows that repeat another --------------------------------------------------------------------


def _picture(request: Request, settings: GuidanceConfig) -> tuple[object, ...]:
    """All that a row's picture depends on; a size that is left open the model decides for all alike.
    Plain sampling looks at no subjects."""
    named = settings.method != BASELINE
    return (
        request.prompt,
        request.seed,
        settings.method,
        tuple(request.subjects or ()) if named else (),
        tuple(request.token_indices or ()) if named else (),
        settings.negative_prompt or "",
        settings.guidance_scale,
        settings.num_inference_steps,
        settings.height,
        settings.width,
    )


def _digest(value: tuple[object, ...]) -> bytes:
    return hashlib.blake2b(repr(value).encode("utf-8", "backslashreplace"), digest_size=16).digest()


def _repeated_rows(manifest: Manifest, digests: np.ndarray) -> Iterator[Problem]:
    """The warnings; the rows' ids are read again, a part at a time. digests: [rows, 2], uint64."""
    rows, firsts = repeated(digests[:, 0], digests[:, 1])
    pairs = zip(rows.tolist(), firsts.tolist(), strict=True)
    for part, some in groupby(pairs, key=lambda pair: pair[0] // PART_ROWS):
        start = part * PART_ROWS
        read, _ = manifest.read(start, min(start + PART_ROWS, len(manifest)))
        for row, first in some:
            reason = (
                f"asks for the same picture as row {first + 1}; give it another seed, or remove one "
                "of them"
            )
            yield Problem(row + 1, read[row - start].id, "seed", REPEATED, False, reason)
