"""The history of all items, and counts of lost items and of items that two workers ran at once.

The control plane's own record. `operations` appends to it and never reads it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

from workpool.wire.protocol import NO_HEARTBEAT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from workpool.wire.protocol import State

Kind: TypeAlias = Literal[
    "created",
    "delivered",
    "withdrawn",
    "acked",
    "heartbeat",
    "stop_requested",
    "stopped",
    "lapsed",
    "metadata",
    "conflict",
]


BLIND: Final = "blind"


class Record(NamedTuple):
    """One change of one item, or one refused call on the item.

    Attributes:
        time: Epoch seconds; for a lapse, the end of the lease.
        worker_id: The worker of the request; None: a worker without a name, or no request.
        state: The item's state afterwards.
        lease_end: The end of the item's lease afterwards, in epoch seconds; None: no lease.
        op: The refused call, for a `conflict` (409 or 412). `BLIND` for a heartbeat that names no
            earlier heartbeat.
    """

    time: float
    work_id: str
    kind: Kind
    worker_id: str | None
    state: State
    lease_end: float | None = None
    op: str | None = None


def get_record_op_of_heartbeat(expected: str | None) -> str | None:
    """Return `BLIND` for a heartbeat that names no earlier heartbeat; None for any other.

    Any worker can send such a heartbeat, not only the holder of the lease.
    """
    return BLIND if expected in {None, NO_HEARTBEAT} else None


class History:
    """The newest `limit` records (None: all records), in order of time.

    Attributes:
        forgotten: The number of dropped records; with 0 a summary is exact.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._records: deque[Record] = deque(maxlen=limit)
        self.forgotten = 0

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(tuple(self._records))

    def add(self, record: Record) -> None:
        """Append a record; drop the oldest record if there are more than `limit` records."""
        self.forgotten += len(self._records) == self._records.maxlen
        self._records.append(record)

    def records_of_item(self, work_id: str) -> tuple[Record, ...]:
        """Return the records of one item; this call searches the records of all items."""
        return tuple(record for record in self._records if record.work_id == work_id)


class Summary(NamedTuple):
    """Counts of items, which show whether any item was lost or ran on two workers at once.

    Attributes:
        enqueued: The number of created items.
        stopped: The number of stopped items.
        reclaimed: The number of lapsed leases whose items returned to the queue, and of redelivered
            items that another worker acknowledged.
        lost: The number of items that are not stopped: lost, or still in progress.
        overlapping: The number of items on which a worker acted while another held the lease.
    """

    enqueued: int
    stopped: int
    reclaimed: int
    lost: int
    overlapping: int


def summarize(records: Iterable[Record]) -> Summary:
    """Compute the counts of `Summary`, such as the number of lost items, from a history."""
    lives: dict[str, _ItemHistory] = {}
    for record in records:
        lives.setdefault(record.work_id, _ItemHistory()).update_from_record(record)
    created = [life for life in lives.values() if life.created]
    stopped = sum(life.stopped for life in created)
    return Summary(
        enqueued=len(created),
        stopped=stopped,
        reclaimed=sum(life.reclaimed for life in lives.values()),
        lost=len(created) - stopped,
        overlapping=sum(life.overlapping for life in lives.values()),
    )


class _ItemHistory:
    """The state of one item, updated record by record, from which the summary is computed."""

    def __init__(self) -> None:
        self.created = False
        self.stopped = False
        self.overlapping = False
        self.reclaimed = 0
        self._holder: str | None = None
        self._lease_end: float | None = None
        self._delivered_to: str | None = None
        self._redelivered = False

    def update_from_record(self, record: Record) -> None:
        if record.kind == "conflict":
            return  # the call was refused, so the item has not changed
        if self._another_worker_holds_lease(record):
            if record.kind == "heartbeat" and record.op != BLIND:
                # This worker's heartbeat contains the time of the holder's last heartbeat. Only a
                # handoff by the holder can give this worker the time, so the two do not overlap.
                self._holder = record.worker_id
            else:
                self.overlapping = True
        if record.kind == "delivered":
            changed = self._delivered_to not in {None, record.worker_id}
            self._redelivered = self._redelivered or changed
            self._delivered_to = record.worker_id
        elif record.kind == "acked":
            self.reclaimed += self._redelivered
            self._holder = record.worker_id
        elif record.kind == "lapsed":
            self.reclaimed += record.state == "queued"
        self.created = self.created or record.kind == "created"
        self.stopped = record.state == "stopped"
        self._lease_end = record.lease_end
        if record.kind in {"acked", "lapsed", "stopped", "withdrawn"}:
            self._redelivered, self._delivered_to = False, None

    def _another_worker_holds_lease(self, record: Record) -> bool:
        """Return whether the record's worker acted while another worker held the lease."""
        return (
            record.kind not in {"created", "delivered", "withdrawn", "lapsed"}
            and self._lease_end is not None
            and record.time < self._lease_end
            and None not in {self._holder, record.worker_id}
            and record.worker_id != self._holder
        )
