"""One finished simulation: its history and trace, indexed by item and process.

A *granted lease* is the time for which one worker owns one item, from its ack on, as the control
plane granted it. An operator can end it before the time that its last heartbeat was granted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from tests.simulation.trace import FOREVER
from workpool.wire.protocol import ACTIVE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tests.simulation.trace import HandlerRun, PoolProcess, SentCall, Trace
    from workpool.server import Record

WRITES: Final = frozenset({"heartbeat", "stop", "update"})
DENIED: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
"""Statuses of answers to a call that a key may not make."""
ACK_SECONDS: Final = 60.0
"""The longest time for which acks are tried. A pause within that time ends the claim."""
START: Final = 86_400.0
"""The control plane's time at the start of every simulation; small, so that floats are exact."""


@dataclass(slots=True, eq=False, repr=False)
class GrantedLease:
    """One worker's lease of one item, as the control plane granted it.

    Attributes:
        ends: For each answer of the control plane: its time, and the end of the lease that it
            granted.
        ended: The time at which the worker ceased to own the item.
        stop_requested: The time of an operator's first request to stop.
        end_kind: The kind of end of the lease. `detached`: a child process of the worker took the
            item.
        stopped_by: The worker that stopped the item; None if the lease lapsed.
        settled: Which worker owns the item is known. An ack that answers `active` leaves it open
            until the first heartbeat, whose sender then owns the item.
        extended_by: Another worker that extended this lease: an operator had ended its own lease
            early, and it then repeated its first heartbeat, which names no owner.
    """

    work_id: str
    worker_id: str
    began: float
    ends: list[tuple[float, float]] = field(default_factory=list)
    ended: float = FOREVER
    end_kind: Literal["lapsed", "stopped", "detached"] | None = None
    stop_requested: float = FOREVER
    stopped_by: str | None = None
    settled: bool = True
    extended_by: str | None = None

    def lease_end_granted_by(self, at: float) -> float:
        """Return the end that the control plane had last granted to this lease by the time `at`."""
        place = bisect_right(self.ends, (at, FOREVER)) - 1
        return self.ends[max(place, 0)][1]

    @property
    def last_granted_lease_end(self) -> float:
        """The end that the control plane last granted to this lease."""
        return self.ends[-1][1]


class ClaimWithUncertainOwner(NamedTuple):
    """A claim whose ack was answered `active`, so that the owner of the item is not certain.

    Attributes:
        polled_at: The time at which the poll that delivered the item was sent.
        calls: The pool's calls for the item from then on.
    """

    polled_at: float
    calls: list[SentCall]

    def list_heartbeats_answered_by(self, at: float) -> list[SentCall]:
        """Return the heartbeats of this claim that were answered by the time `at`."""
        return [each for each in self.calls if each.op == "heartbeat" and each.answered_at <= at]

    def is_pool_proven_owner(self, at: float) -> bool:
        """Return whether a heartbeat answered by the time `at` showed the pool to be the owner."""
        return any(
            each.answer == "ok" and getattr(each.value, "state", None) == ACTIVE
            for each in self.list_heartbeats_answered_by(at)
        )


@dataclass(slots=True, eq=False, repr=False)
class FinishedSimulation:
    """The history and trace of one finished simulation, indexed for the invariants.

    Attributes:
        history: The control plane's history, on the loop's clock.
        counted: The increase of the metrics' counters, by name and labels.
        leases: The granted leases of each item, in order.
        sent: The calls of each pool for each item, in order.
        runs: The handler runs of each item, in order.
        stopped: The history's record of each item's stop.
    """

    history: list[Record]
    trace: Trace
    counted: Mapping[tuple[str, ...], float]
    leases: dict[str, list[GrantedLease]] = field(init=False)
    sent: dict[tuple[PoolProcess, str], list[SentCall]] = field(init=False)
    runs: dict[str, list[HandlerRun]] = field(init=False)
    stopped: dict[str, Record] = field(init=False)

    def __post_init__(self) -> None:
        """Index the history and the trace by item and process."""
        children = frozenset(node.worker_id for node in self.trace.nodes if node.child)
        self.leases = _build_leases(self.history, children)
        self.stopped = {each.work_id: each for each in self.history if each.kind == "stopped"}
        self.stopped |= {
            each.work_id: each
            for each in self.history
            if each.kind == "lapsed" and each.state == "stopped"
        }
        self.sent = defaultdict(list)
        for call in self.trace.sent:
            if call.work_id is not None:
                self.sent[call.node, call.work_id].append(call)
        self.runs = defaultdict(list)
        for run in self.trace.runs:
            self.runs[run.work_id].append(run)

    def find_last_lease_of_pool(
        self, node: PoolProcess, work_id: str, at: float
    ) -> GrantedLease | None:
        """Return the last lease of the item that the pool got by the time `at`."""
        found = None
        for lease in self.leases.get(work_id, ()):
            if lease.worker_id == node.worker_id and lease.began <= at:
                found = lease
        return found

    def find_claim_with_uncertain_owner(
        self, node: PoolProcess, work_id: str, at: float
    ) -> ClaimWithUncertainOwner | None:
        """Return the pool's last claim of the item whose ack was answered by the time `at`.

        Return None if there is no such claim, or if the answer to its ack was not `active`.
        """
        calls = self.sent.get((node, work_id), [])
        ack = max(
            (call for call in calls if call.op == "ack" and call.answered_at <= at),
            key=lambda call: call.answered_at,
            default=None,
        )
        if ack is None or getattr(ack.value, "state", None) != ACTIVE:
            return None
        polled_at = max(
            call.at
            for call in self.trace.sent
            if call.node is node
            and call.op == "poll"
            and call.answered_at <= ack.at
            and getattr(call.value, "id", None) == work_id
        )
        later = [call for call in calls if ack.answered_at <= call.at]
        return ClaimWithUncertainOwner(polled_at, [call for call in later if call.op != "ack"])

    def is_item_owner_uncertain(self, node: PoolProcess, work_id: str, at: float) -> bool:
        """Return whether the pool claimed the item, but may not be its owner at the time `at`."""
        claim = self.find_claim_with_uncertain_owner(node, work_id, at)
        return claim is not None and not claim.is_pool_proven_owner(at)

    def find_denial_time_of_operation(self, node: PoolProcess, op: str) -> float:
        """Return when the pool's key was refused the operation `op`; infinite if it is allowed."""
        answered = sorted(
            (call for call in self.trace.sent if call.node is node and call.op == op),
            key=lambda call: call.answered_at,
        )
        for call in answered:
            if call.answer == "ok":
                return FOREVER
            if call.answer in DENIED:
                return call.answered_at
        return FOREVER

    def has_extended_lease_of_another_worker(self, node: PoolProcess, work_id: str) -> bool:
        """Return whether the pool lost its lease and then extended the lease of another worker."""
        leases = self.leases.get(work_id, ())
        extended_another = any(lease.extended_by == node.worker_id for lease in leases)
        return extended_another and any(broken == work_id for _, broken in self.trace.broken)

    def find_process_of_lease(self, lease: GrantedLease) -> PoolProcess:
        """Return the process that owned the lease."""
        return next(node for node in self.trace.nodes if node.worker_id == lease.worker_id)

    def all_leases(self) -> Iterable[tuple[PoolProcess, GrantedLease]]:
        """Yield every granted lease with the pool that owned it."""
        nodes = {node.worker_id: node for node in self.trace.nodes}
        for leases in self.leases.values():
            for lease in leases:
                yield nodes[lease.worker_id], lease

    def find_last_handler_run(self, node: PoolProcess, lease: GrantedLease) -> HandlerRun | None:
        """Return the last run of the pool's handler that began in a lease; None if no run did."""
        found = None
        for run in self.runs.get(lease.work_id, ()):
            if run.node is node and lease is self.find_last_lease_of_pool(
                node, lease.work_id, run.started
            ):
                found = run
        return found

    def pool_had_fault_during_lease(
        self, node: PoolProcess, lease: GrantedLease, until: float = FOREVER
    ) -> bool:
        """Return whether the pool or its calls for the item had a fault during the lease."""
        since = lease.began - 0.01
        return (
            any(
                call.fault is not None and call.latest_effect_time >= since and call.at <= until
                for call in self.sent[node, lease.work_id]
            )
            # A worker's key may read an item only from the list of all items, so a fault of a list
            # call disturbs every item of the pool.
            or any(
                call.op == "list" and call.node is node and call.fault is not None
                for call in self.trace.sent
                if call.latest_effect_time >= since and call.at <= until
            )
            or any(
                delay.node is node
                and delay.work_id in {lease.work_id, None}
                and delay.until >= since
                and delay.since <= until
                for delay in self.trace.delays
            )
            or node.was_machine_halted(since, min(until, lease.last_granted_lease_end + 1))
            # A pause before the ack may have delayed the ack, so the pause counts as a fault.
            or node.lease_clock_stood_still(since - ACK_SECONDS, until)
            or node.crashed <= min(until, lease.last_granted_lease_end)
            or self.lease_was_ended_early(lease)
        )

    def lease_was_ended_early(self, lease: GrantedLease) -> bool:
        """Return whether the control plane ended the lease before the end that it had granted."""
        return any(
            work_id == lease.work_id and lease.began <= at <= lease.last_granted_lease_end
            for at, work_id in self.trace.broken
        ) or (lease.end_kind == "lapsed" and lease.ended < lease.last_granted_lease_end - 0.001)


def _build_leases(
    history: Iterable[Record], children: frozenset[str]
) -> dict[str, list[GrantedLease]]:
    found: dict[str, list[GrantedLease]] = defaultdict(list)
    for record in history:
        leases = found[record.work_id]
        if record.kind == "acked":
            leases.append(_lease_from_record(record))
            leases[-1].settled = record.state != ACTIVE
            continue
        if record.kind == "heartbeat" and leases and leases[-1].end_kind == "lapsed":
            # On a control plane where polls begin leases (`poll_leases`), a new lease has no ack.
            # This heartbeat is its first record.
            leases.append(_lease_from_record(record))
            continue
        if not leases or leases[-1].end_kind is not None:
            continue
        if record.kind == "heartbeat" and not leases[-1].settled:
            leases[-1].settled, leases[-1].worker_id = True, str(record.worker_id)
        if record.kind == "heartbeat" and record.worker_id != leases[-1].worker_id:
            if children & {str(record.worker_id), leases[-1].worker_id}:
                leases.append(_hand_off_lease_to_child(leases[-1], record))
            else:
                leases[-1].extended_by = record.worker_id
            continue
        _apply_record_to_lease(leases[-1], record)
    return found


def _lease_from_record(record: Record) -> GrantedLease:
    """Return a lease that begins at the time of the given ack or heartbeat."""
    lease = GrantedLease(record.work_id, str(record.worker_id), record.time)
    lease.ends.append((record.time, _read_lease_end(record)))
    return lease


def _hand_off_lease_to_child(lease: GrantedLease, record: Record) -> GrantedLease:
    lease.ended, lease.end_kind = record.time, "detached"
    child = _lease_from_record(record)
    child.stop_requested = lease.stop_requested
    return child


def _apply_record_to_lease(lease: GrantedLease, record: Record) -> None:
    if record.kind == "heartbeat":
        lease.ends.append((record.time, _read_lease_end(record)))
    elif record.kind == "stop_requested":
        lease.stop_requested = min(lease.stop_requested, record.time)
    elif record.kind in {"lapsed", "stopped"}:
        lease.ended = record.time
        lease.end_kind = "lapsed" if record.kind == "lapsed" else "stopped"
        lease.stopped_by = record.worker_id


def _read_lease_end(record: Record) -> float:
    return FOREVER if record.lease_end is None else record.lease_end - START
