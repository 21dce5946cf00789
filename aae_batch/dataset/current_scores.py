"""The scores of a dataset that are of its metrics' last runs."""

from __future__ import annotations

import pyarrow as pa

from aae_batch.dataset.reader import Dataset


class CurrentScores:
    """A dataset's tables of scores; its metrics and their shards are listed once, here.

    Attributes:
        shards: the shards that each metric has scored.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.shards = {m: frozenset(dataset.scored_shards(m)) for m in dataset.metrics()}
        self._runs = {metric: dataset.metric_fingerprint(metric) for metric in self.shards}

    def of(self, metric: str, shard: int) -> pa.Table | None:
        """What a metric says of the pictures of a shard; None where it has not scored it, or where
        its table is of another run and waits to be scored again.

        Raises:
            OutputError: the table is damaged.
        """
        if shard not in self.shards[metric]:
            return None
        return self._dataset.current_scores_of(metric, shard, self._runs[metric])
