"""The state of the demo: which worker holds which item, according to the control plane.

All numbers come from the history and the items of the control plane, so they add up even if the
killed worker reported something else before its end.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from workpool.cli.demo.demo_workers import DemoWorker
    from workpool.server import ControlPlane, Record


@dataclass(slots=True)
class HeldItem:
    """An item that a worker holds under a lease, which ends at `lease_end` (epoch seconds)."""

    worker: str
    lease_end: float
    has_heartbeat: bool = False


class DemoState:
    """The items that each worker holds, computed from the history of the control plane.

    Args:
        count: The number of sessions of the demo.
        plane: The control plane.
        names: The displayed names of items, by their ids.
        now: The clock of the control plane.

    Attributes:
        workers: The workers, in the order in which they are shown.
        held: The items that are held, by their ids.
        completed: The number of sessions that each worker completed.
        failed: The number of sessions whose handler failed, by worker.
        reclaimed: The number of items that each worker took over from another one.
        acked: The number of acknowledgements, repeated items included.
    """

    def __init__(
        self, count: int, plane: ControlPlane, names: Mapping[str, str], now: Callable[[], float]
    ) -> None:
        self.count = count
        self.workers: Sequence[DemoWorker] = ()
        self.held: dict[str, HeldItem] = {}
        self.completed: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.reclaimed: Counter[str] = Counter()
        self.acked = 0
        self._plane = plane
        self._names = names
        self._now = now
        self._seen = 0
        self._orphans: set[str] = set()

    @property
    def control_plane_url(self) -> str:
        """The base URL of the control plane."""
        return self._plane.base_url

    @property
    def ended_session_count(self) -> int:
        """The number of sessions that have ended."""
        return self.completed.total() + self.failed.total()

    @property
    def queued_session_count(self) -> int:
        """The number of sessions that no worker holds."""
        return self.count - self.ended_session_count - len(self.held)

    def held_item_count(self, worker: str) -> int:
        """Return the number of items that a worker holds."""
        return sum(hold.worker == worker for hold in self.held.values())

    def format_results(self, worker: str) -> str:
        """Return a text with the numbers of completed and failed sessions of a worker."""
        failed = f", {self.failed[worker]} failed" if self.failed[worker] else ""
        return f"{self.completed[worker]} completed{failed}"

    def seconds_until_lease_lapse(self, worker: str) -> float | None:
        """Return the seconds until the last lease of a worker lapses; None if it has no lease."""
        ends = [hold.lease_end for hold in self.held.values() if hold.worker == worker]
        return max(0.0, max(ends) - self._now()) if ends else None

    def list_held_item_names(self, worker: str) -> list[str]:
        """Return the names of the items that a worker holds.

        The list is empty until each of these items has had a heartbeat, so that the demo does not
        kill the worker yet. A lease without a heartbeat lasts six times as long as one with.
        """
        held = {key: hold for key, hold in self.held.items() if hold.worker == worker}
        ready = all(hold.has_heartbeat for hold in held.values())
        return [self._item_name(work_id) for work_id in held] if ready else []

    def apply_new_history_records(self) -> list[str]:
        """Update the state from new records of the history.

        Return lines that report failed sessions, lapsed leases and reclaimed items.
        """
        records = list(islice(self._plane.history, self._seen, None))
        self._seen += len(records)
        return [line for record in records if (line := self._apply_history_record(record))]

    def _apply_history_record(self, record: Record) -> str:
        work_id, name = record.work_id, self._item_name(record.work_id)
        orphan = work_id in self._orphans
        lease_end = record.lease_end or record.time
        if record.kind == "acked":
            worker = parse_worker_name(record.worker_id)
            self.held[work_id] = HeldItem(worker, lease_end)
            self.acked += 1
            self.reclaimed[worker] += orphan
            return f"{name} reclaimed by {worker}" if orphan else ""
        if record.kind == "heartbeat" and work_id in self.held:
            self.held[work_id] = HeldItem(self.held[work_id].worker, lease_end, has_heartbeat=True)
        if record.kind not in {"lapsed", "stopped"}:
            return ""
        worker = self.held.pop(work_id).worker if work_id in self.held else "no worker"
        if record.kind == "lapsed":
            self._orphans.add(work_id)
            return f"{name} is free again: the lease of {worker} lapsed"
        item = self._plane.operations.get_item(self._plane.environments[0], work_id)
        error = item.metadata.get("workpool.error")
        (self.completed if error is None else self.failed)[worker] += 1
        if error is not None:
            return f"{name} failed: {error}"
        return f"{name} finished by {worker}" if orphan else ""

    def _item_name(self, work_id: str) -> str:
        return self._names.get(work_id, work_id)


def parse_worker_name(worker_id: str | None) -> str:
    """Return the configured name of a worker, without the suffix that each start adds."""
    return (worker_id or "").rpartition("-")[0]
