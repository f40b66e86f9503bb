"""The demo's view of the control plane's own record: who holds what, and what changed hands.

Reads the history only, so what the demo shows is what the control plane saw, not what workers say.
"""

from collections.abc import Mapping
from itertools import islice

from workpool.server import History, Record


class Ledger:
    """Follows a history from its beginning.

    Attributes:
        held: Work id → the worker that acknowledged it and has not ended it.
        stopped: How many items have come to their end.
        acked: How many acknowledgements there were, repeated items included.
    """

    def __init__(self, history: History, names: Mapping[str, str]) -> None:
        """`names`: what to call an item, by its id."""
        self.held: dict[str, str] = {}
        self.stopped = 0
        self.acked = 0
        self._unbeaten: set[str] = set()
        self._history = history
        self._names = names
        self._seen = 0
        self._orphans: dict[str, str] = {}

    def follow(self) -> list[str]:
        """Read what is new; returns a sentence for each change of hands."""
        news: list[str] = []
        for record in islice(self._history, self._seen, None):
            self._seen += 1
            news += self._see(record)
        return news

    def held_by(self, worker: str) -> list[str]:
        """The names of the items that a worker holds; none while one has had no heartbeat yet.

        The lease of an acknowledgement is six times as long as the demo's: an item
        whose worker is killed before the first heartbeat would keep everyone waiting.
        """
        held = [work_id for work_id, holder in self.held.items() if holder == worker]
        return [] if self._unbeaten.intersection(held) else [self._name(each) for each in held]

    def _see(self, record: Record) -> list[str]:
        work_id, name = record.work_id, self._name(record.work_id)
        if record.kind in {"heartbeat", "lapsed", "stopped"}:
            self._unbeaten.discard(work_id)
        if record.kind == "acked":
            worker = worker_of(record.worker_id)
            self.held[work_id] = worker
            self._unbeaten.add(work_id)
            self.acked += 1
            if work_id in self._orphans:
                return [f"{name} reclaimed by {worker}"]
        elif record.kind == "lapsed":
            holder = self.held.pop(work_id, "nobody")
            self._orphans[work_id] = holder
            return [f"{name} is free again: the lease of {holder} lapsed"]
        elif record.kind == "stopped":
            worker = self.held.pop(work_id, "nobody")
            self.stopped += 1
            if work_id in self._orphans:
                return [f"{name} finished by {worker}"]
        return []

    def _name(self, work_id: str) -> str:
        return self._names.get(work_id, work_id)


def worker_of(worker_id: str | None) -> str:
    """The name that a worker was given, without the digits that each start adds."""
    return (worker_id or "").rpartition("-")[0]
