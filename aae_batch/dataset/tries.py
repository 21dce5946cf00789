"""Count what became of rows that were tried several times, and what their tries cost."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pyarrow as pa

from aae_batch.dataset.outcome import VERDICTS, forwards_of
from aae_batch.errors import DroppedError

WORDS = {True: "accepted", False: "unaccepted", None: "unjudged"}
"""Of rows with an image, by the column `accepted`."""

OF_ROWS = ["status", "error_type", "accepted"]
OF_TRIES = ["method", "verdict", "kept", "guided", "denoised"]


@dataclass
class TryCounts:
    """Counts, accumulated shard by shard.

    Attributes:
        rows: rows by what became of them: the words of `WORDS`, `dropped` and `failed`.
        rungs: of each method, its `tries`; those with a picture that was `judged`, and was `accepted`;
            those that `settled` their row; those `given_up`; those that were `nursed` to their end, and
            their `nursing` forwards; all `guided` forwards, and `forwards` as `forwards_of` counts them.
    """

    rows: Counter[str] = field(default_factory=Counter)
    rungs: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, metadata: pa.Table, tries: pa.Table) -> None:
        """Add a shard.

        Args:
            metadata: its rows, with the columns of `OF_ROWS`.
            tries: its tries, with the columns of `OF_TRIES`.
        """
        for row in metadata.select(OF_ROWS).to_pylist():
            dropped = row["error_type"] == DroppedError.__name__
            word = "dropped" if dropped else WORDS[row["accepted"]]
            self.rows[word if row["status"] == "ok" or dropped else "failed"] += 1
        for made in tries.select(OF_TRIES).to_pylist():
            accepted = VERDICTS.get(made["verdict"])
            forwards = forwards_of(made)
            nursed = made["guided"] > 0 and made["verdict"] in VERDICTS
            self.rungs[made["method"]] += Counter(
                tries=1,
                judged=accepted is not None,
                accepted=accepted is True,
                settled=made["kept"] and made["verdict"] != "rejected",
                given_up=made["verdict"] == "given up",
                nursed=nursed,
                nursing=forwards * nursed,
                guided=made["guided"],
                forwards=forwards,
            )

    @property
    def tries(self) -> int:
        return sum(rung["tries"] for rung in self.rungs.values())
