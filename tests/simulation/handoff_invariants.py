"""Invariants 3d to 3f: in a handoff, parent and child process never own the item together."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from tests.simulation.finished_simulation import WRITES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.simulation.finished_simulation import FinishedSimulation, GrantedLease
    from tests.simulation.trace import PoolProcess


def nothing_is_sent_during_a_handoff(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 3d: while a handler starts a child process, its pool sends nothing for the item.

    No heartbeat may be in flight when the handoff begins.
    """
    for period in case.trace.handoff_periods:
        until = min(period.left, period.entered + period.ttl / 2)
        # Skip a handoff that ended as it began, because the handler was cancelled. The handler's
        # pool may send calls for the item at once.
        if period.left <= period.entered or period.node.was_machine_halted(
            period.entered - 1, until
        ):
            continue
        for call in case.sent[period.node, period.work_id]:
            in_flight = call.op == "heartbeat" and call.at <= period.entered < call.answered_at
            if in_flight or (call.op in WRITES and period.entered <= call.at < until):
                yield f"{call} was sent; its handoff began at {period.entered:.3f}"


def only_a_child_process_takes_over_an_item(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 3e: during a lease, only a child process of the owner may take over the item."""
    children = {node.worker_id for node in case.trace.nodes if node.child}
    for leases in case.leases.values():
        for one, two in pairwise(leases):
            allowed = one.worker_id not in children and two.worker_id in children
            if one.end_kind == "detached" and not allowed:
                yield f"{one.work_id} was taken over at {one.ended:.3f}"


def parent_writes_nothing_after_a_handoff(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 3f: after a child took over the item, its parent sends at most one heartbeat.

    With that heartbeat the parent tries to take the item back.
    """
    for node, lease in case.all_leases():
        if lease.end_kind == "detached":
            yield from _check_calls_after_handoff(case, node, lease)


def _check_calls_after_handoff(
    case: FinishedSimulation, node: PoolProcess, lease: GrantedLease
) -> Iterator[str]:
    tries = 0
    for call in case.sent[node, lease.work_id]:
        if (
            call.at <= lease.ended
            or case.find_last_lease_of_pool(node, lease.work_id, call.at) is not lease
        ):
            continue
        if case.is_item_owner_uncertain(node, lease.work_id, call.at):
            continue  # The call belongs to a later claim of the item. Invariant 3g checks the call.
        if call.op in {"stop", "update"}:
            yield f"{call} was sent for an item that a child owns"
        tries += call.op == "heartbeat" and call.fault is None
        tries -= call.op == "get" and (call.fault is not None or call.answer != "ok")
    # A pool with a worker's key finds the owner of the item in the list of all items. Allow the
    # pool one more heartbeat for each list call that failed: the call did not show the owner.
    tries -= sum(
        call.node is node and call.op == "list" and call.fault is not None
        for call in case.trace.sent
        if call.at >= lease.ended
    )
    # Allow the pool one more heartbeat for each read that had to wait for a connection, because a
    # read that was never sent did not show the owner of the item.
    tries -= sum(
        delay.node is node
        and (delay.work_id == lease.work_id or delay.op == "list")
        and delay.since >= lease.ended
        for delay in case.trace.delays
    )
    if tries > 1:
        yield f"{node.machine.name} tried {tries} times to take {lease.work_id} back"
