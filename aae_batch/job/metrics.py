"""Ray metrics of a job, which each node's agent serves to Prometheus with the prefix `ray_`.

| name | kind | |
|---|---|---|
| `aae_batch_rows` | counter, by `status` | finished rows, `ok` or `failed` |
| `aae_batch_refinements` | counter | latent updates of iterative refinement |
| `aae_batch_seconds` | counter, by `phase` | excite, denoise, decode, encode, upload; compile, which is part of the first two |
| `aae_batch_slots` | gauge | a worker's slots for samples |
| `aae_batch_slots_in_use` | gauge | slots in use |
| `aae_batch_queue` | gauge | a worker's rows that wait for a slot |
| `aae_batch_unwritten` | gauge | a worker's images that wait to be encoded and written |
| `aae_batch_images_per_second` | gauge | speed of the whole job, from the driver |
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge


class WorkerMetrics:
    """A worker's metrics. Ray adds labels for the actor and the node."""

    def __init__(self) -> None:
        self._rows = Counter("aae_batch_rows", "Rows that are finished.", tag_keys=("status",))
        self._refinements = Counter("aae_batch_refinements", "Latent updates of refinement.")
        self._seconds = Counter("aae_batch_seconds", "Time by phase.", tag_keys=("phase",))
        self._slots = Gauge("aae_batch_slots", "Samples at a time.")
        self._in_use = Gauge("aae_batch_slots_in_use", "Samples on their way.")
        self._queue = Gauge("aae_batch_queue", "Rows that wait for a slot.")
        self._unwritten = Gauge("aae_batch_unwritten", "Images that wait to be written.")
        self._told: dict[str, float] = defaultdict(float)

    def row(self, status: str, refinements: int) -> None:
        self._rows.inc(1, {"status": status})
        if refinements:
            self._refinements.inc(refinements)

    def spent(self, phase: str, seconds: float) -> None:
        if seconds > 0:
            self._seconds.inc(seconds, {"phase": phase})

    def totals(self, seconds: Mapping[str, float]) -> None:
        """Set the seconds spent in each phase since the start."""
        for phase, total in seconds.items():
            self.spent(phase, total - self._told[phase])
            self._told[phase] = total

    def load(self, slots: int, in_use: int, queue: int, unwritten: int) -> None:
        self._slots.set(slots)
        self._in_use.set(in_use)
        self._queue.set(queue)
        self._unwritten.set(unwritten)
