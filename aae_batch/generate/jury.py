"""Judges pictures as they are made, and decides what becomes of their rows."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from aae_batch.dataset.image_format import ImageFormat
from aae_batch.dataset.outcome import VERDICTS
from aae_batch.dataset.writer import attention_rows
from aae_batch.errors import (
    AaeBatchError,
    DroppedError,
    GivenUpError,
    NonFiniteError,
    NotAcceptedError,
    RowError,
)
from aae_batch.evaluate.metric import Metric
from aae_batch.generate.acceptance import Acceptance
from aae_batch.manifest.row import Row
from aae_batch.request import Request, Result

AT_ONCE = 16
"""Pictures that are judged together."""


@dataclass
class Trial:
    """The tries of one row so far.

    Attributes:
        number: of the try in progress.
        tries: rows of the table of tries, one for each finished try.
        best: the place in `tries` of the best picture so far, and its result.
        resumed: the try in progress as it was given up before, if it is made again to its end.
    """

    rule: Acceptance
    row: Row
    number: int = 0
    tries: list[dict[str, Any]] = field(default_factory=list)
    best: tuple[int, Result] | None = None
    error: RowError | None = None
    resumed: dict[str, Any] | None = None

    @property
    def request(self) -> Request:
        """What the try in progress asks for."""
        return self.rule.ladder.request(self.row.request, self.number)

    @property
    def give_up_below(self) -> float | None:
        """As for `Batch.add`; a row's last try is finished, unless there is a picture already."""
        is_last = self.rule.ladder.after(self.row.request, self.number) is None
        must_end = is_last and self.best is None
        return None if must_end or self.resumed is not None else self.rule.give_up_below

    def end(self, result: Result, verdict: Verdict | None, image_format: ImageFormat) -> bool:
        """Note the result of the try in progress. Returns whether the row is done; otherwise the next try
        is in progress.

        Args:
            verdict: None without a picture.
        """
        seen = result.attention
        made: dict[str, Any] = {
            "id": self.row.id,
            "try": self.number,
            "method": result.request.method,
            "seed": result.request.seed,
            "kept": False,
            "num_refinements": seen.num_refinements if seen else None,
            "final_loss": seen.final_loss if seen else None,
            "guided": result.guided,
            "denoised": result.denoised,
            "seconds": result.seconds,
        }
        if self.resumed is not None:
            for name in ("guided", "denoised", "seconds"):
                made[name] += self.resumed[name]
        if verdict is None:
            error = result.error
            assert error is not None
            made |= {"verdict": "given up" if isinstance(error, GivenUpError) else "failed"}
            made |= {"error": str(error)}
            self.error = self.error or error
            hopeless = not isinstance(error, (GivenUpError, NonFiniteError))
        else:
            hopeless = False
            made |= {"verdict": verdict.word, "value": verdict.value, "scores": verdict.as_json()}
            if self.rule.keep_rejected:
                assert result.image is not None
                made["picture"] = image_format.encode(result.image)
        self.tries.append(made)
        if verdict is not None and self._is_better(made):
            self.best = len(self.tries) - 1, result
        settled = verdict is not None and verdict.word != "rejected"
        after = self.rule.ladder.after(self.row.request, self.number, hopeless)
        if self.resumed is not None or (settled and not self.rule.all_tries):
            return True
        if after is None:
            return not self._resume()
        self.number = after
        return False

    def _resume(self) -> bool:
        """If there is no picture, make the last try that was given up again, to its end. Returns whether
        there is one."""
        given_up = [one for one in self.tries if one["verdict"] == "given up"]
        if self.best is not None or not given_up:
            return False
        self.resumed = given_up[-1]
        self.tries.remove(self.resumed)
        self.number = self.resumed["try"]
        return True

    def _is_better(self, made: Mapping[str, Any]) -> bool:
        """Return whether a picture is better than the best so far: accepted, else not rejected, then with
        the larger value. Of equals the first is kept."""

        def rank(made: Mapping[str, Any]) -> tuple[int, float]:
            value = made["value"]
            order = ["rejected", "unjudged", "accepted"].index(made["verdict"])
            return order, -math.inf if value is None else value

        return self.best is None or rank(made) > rank(self.tries[self.best[0]])

    def verdict(self) -> tuple[Row, Result]:
        """Return the row as its kept try asked for it, and that try's result; or the row and why it has
        none. Marks the kept try."""
        rule = self.rule
        if self.best is None:
            return self.row, Result(self.row.request, error=self.error)
        (place, result), self.best = self.best, None  # its shard may wait for long
        kept = self.tries[place]
        if VERDICTS[kept["verdict"]] is False and rule.unaccepted != "keep":
            kind = DroppedError if rule.unaccepted == "drop" else NotAcceptedError
            reason = (
                f"none of {len(self.tries)} tries meets {rule.accept}; the best, try {kept['try']}, has "
                f"{rule.by} = {kept['value']}: with more --tries, or --unaccepted keep, another output would have it"
            )
            return self.row, Result(self.row.request, error=kind(self.row.id, reason))
        kept |= {"kept": True, "picture": None}
        return replace(self.row, request=result.request), result


@dataclass(frozen=True)
class Verdict:
    """What the judges say of one picture.

    Attributes:
        word: a key of `VERDICTS`.
        value: how good it is; None if unknown.
        scores: metric -> its columns.
    """

    word: str
    value: float | None
    scores: Mapping[str, Mapping[str, Any]]

    def as_json(self) -> str:
        return json.dumps(self.scores, default=float)


class Jury:
    """The judges of a run, loaded."""

    def __init__(self, rule: Acceptance, image_format: ImageFormat, device: str) -> None:
        self.rule = rule
        self.image_format = image_format
        for metric in rule.metrics.values():
            metric.load(device, "float32")

    def judge(self, results: Sequence[tuple[Row, Result]]) -> list[Verdict]:
        """Judge pictures, as they will look when they are stored.

        Args:
            results: rows as their tries asked for them, and the tries' results, with pictures.
        """
        seen = [(row, result, result.attention) for row, result in results]
        rows = [
            {
                "id": str(place),
                "status": "ok",
                "prompt": row.request.prompt,
                "subjects": row.request.subjects,
                "seed": row.request.seed,
                "method": row.request.method,
                "num_refinements": record.num_refinements if record else 0,
                "final_loss": record.final_loss if record else None,
                "neglected": record.neglected if record else None,
            }
            for place, (row, _, record) in enumerate(seen)
        ]
        attention = {
            str(place): attention_rows(row, record)
            for place, (row, _, record) in enumerate(seen)
            if record is not None
        }
        images = [self._as_stored(result) for _, result in results]
        scores = {name: self._scores(m, rows, images, attention) for name, m in self.metrics}
        accepted, values = self.rule.judged(rows, scores)
        return [
            Verdict(
                "unjudged" if math.isnan(truth) else "accepted" if truth else "rejected",
                None if math.isnan(value) else float(value),
                {name: rows[place] for name, rows in scores.items()},
            )
            for place, (truth, value) in enumerate(zip(accepted, values, strict=True))
        ]

    @property
    def metrics(self) -> list[tuple[str, Metric]]:
        return list(self.rule.metrics.items())

    def _scores(
        self,
        metric: Metric,
        rows: list[dict[str, Any]],
        images: list[Image.Image],
        attention: Mapping[str, list[dict[str, Any]]],
    ) -> list[dict[str, Any]]:
        try:
            return metric.score(rows, images if metric.sees_images else [], attention)
        except AaeBatchError:
            raise
        except RuntimeError:  # out of memory, for one: one by one
            if len(rows) == 1:
                raise
            one_by_one = zip(rows, images, strict=True)
            return [self._scores(metric, [row], [image], attention)[0] for row, image in one_by_one]

    def _as_stored(self, result: Result) -> Image.Image:
        assert result.image is not None
        if self.image_format.is_lossless:
            return result.image
        return Image.open(io.BytesIO(self.image_format.encode(result.image))).convert("RGB")
