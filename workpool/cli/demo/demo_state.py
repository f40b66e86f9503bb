"""The state of the demo: which worker holds which item, according to the control plane.

Read from the history only, so the demo shows the record of the control plane and not that of
workers.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workpool.cli.demo.demo_workers import Worker
    from workpool.server import History, Record


class DemoState:
    """Reads a history from its beginning on.

    Args:
        count: The number of sessions of the demo.
        history: The history of the control plane.
        names: The displayed names of items, by their ids.

    Attributes:
        url: The address of the control plane; empty until known.
        workers: The workers, in the order in which they are shown.
        held: The id of each running item, with the worker that acknowledged it.
        stopped: The number of items that are stopped.
        acked: The number of acknowledgements, repeated items included.
    """

    def __init__(self, count: int, history: History, names: Mapping[str, str]) -> None:
        self.url = ""
        self.count = count
        self.workers: Sequence[Worker] = ()
        self.held: dict[str, str] = {}
        self.stopped = 0
        self.acked = 0
        self._without_heartbeat: set[str] = set()
        self._history = history
        self._names = names
        self._seen = 0
        self._orphans: dict[str, str] = {}

    @property
    def queued(self) -> int:
        """The number of sessions that no worker holds."""
        return self.count - self.stopped - len(self.held)

    def follow(self) -> list[str]:
        """Read the new records; return a sentence for each item that changed hands."""
        news: list[str] = []
        for record in islice(self._history, self._seen, None):
            self._seen += 1
            news += self._see(record)
        return news

    def held_by(self, worker: str) -> list[str]:
        """Return the names of the items that a worker holds; none while one has no heartbeat yet.

        The lease of an acknowledgement is six times as long as the demo's: the demo would wait for
        an item whose worker is killed before the first heartbeat.
        """
        held = [work_id for work_id, holder in self.held.items() if holder == worker]
        return (
            []
            if self._without_heartbeat.intersection(held)
            else [self._name(each) for each in held]
        )

    def _see(self, record: Record) -> list[str]:
        work_id, name = record.work_id, self._name(record.work_id)
        if record.kind in {"heartbeat", "lapsed", "stopped"}:
            self._without_heartbeat.discard(work_id)
        if record.kind == "acked":
            worker = worker_of(record.worker_id)
            self.held[work_id] = worker
            self._without_heartbeat.add(work_id)
            self.acked += 1
            if work_id in self._orphans:
                return [f"{name} reclaimed by {worker}"]
        elif record.kind == "lapsed":
            holder = self.held.pop(work_id, "no worker")
            self._orphans[work_id] = holder
            return [f"{name} is free again: the lease of {holder} lapsed"]
        elif record.kind == "stopped":
            worker = self.held.pop(work_id, "no worker")
            self.stopped += 1
            if work_id in self._orphans:
                return [f"{name} finished by {worker}"]
        return []

    def _name(self, work_id: str) -> str:
        return self._names.get(work_id, work_id)


def worker_of(worker_id: str | None) -> str:
    """Return the name of a worker, without the digits that each start adds."""
    return (worker_id or "").rpartition("-")[0]
