"""Invariants 3d to 3f: during a handoff, parent and child never own the item at the same time."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from tests.simulation.finished_simulation import WRITES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.simulation.finished_simulation import FinishedSimulation, GrantedLease
    from tests.simulation.trace import PoolProcess


def nothing_is_sent_during_a_handoff(case: FinishedSimulation) -> Iterator[str]:
    """3d. While a handler starts a child, the parent sends nothing and awaits no heartbeat."""
    for block in case.trace.handoff_blocks:
        until = min(block.left, block.entered + block.ttl / 2)
        # If the handler is cancelled as the handoff begins, the parent takes the item back at once.
        if block.left <= block.entered or block.node.was_paused(block.entered - 1, until):
            continue
        for call in case.sent[block.node, block.work_id]:
            under_way = call.op == "heartbeat" and call.at <= block.entered < call.answered_at
            if under_way or (call.op in WRITES and block.entered <= call.at < until):
                yield f"{call} was sent; its handoff began at {block.entered:.3f}"


def only_a_child_takes_an_item_over(case: FinishedSimulation) -> Iterator[str]:
    """3e. During a lease, only a child may take over the item, and never from another child."""
    children = {node.worker_id for node in case.trace.nodes if node.child}
    for leases in case.leases.values():
        for one, two in pairwise(leases):
            allowed = one.worker_id not in children and two.worker_id in children
            if one.end_kind == "detached" and not allowed:
                yield f"{one.work_id} was taken over at {one.ended:.3f}"


def items_handed_off_are_left_alone(case: FinishedSimulation) -> Iterator[str]:
    """3f. After a child took the item, the parent sends at most one heartbeat, to take it back."""
    for node, lease in case.all_leases():
        if lease.end_kind == "detached":
            yield from _check_calls_after_handoff(case, node, lease)


def _check_calls_after_handoff(
    case: FinishedSimulation, node: PoolProcess, lease: GrantedLease
) -> Iterator[str]:
    tries = 0
    for call in case.sent[node, lease.work_id]:
        if call.at <= lease.ended or case.lease_at(node, lease.work_id, call.at) is not lease:
            continue
        if case.has_unsettled_claim(node, lease.work_id, call.at):
            continue  # This call belongs to a later claim of the same item.
        if call.op in {"stop", "update"}:
            yield f"{call} was sent for an item that a child owns"
        tries += call.op == "heartbeat" and call.fault is None
        tries -= call.op == "get" and (call.fault is not None or call.answer != "ok")
    # A pool with a worker's key looks up the owner in the list; a failed list allows another try.
    tries -= sum(
        call.node is node and call.op == "list" and call.fault is not None
        for call in case.trace.sent
        if call.at >= lease.ended
    )
    # A read that got no connection did not show the owner, so one more try is allowed.
    tries -= sum(
        delay.node is node
        and (delay.work_id == lease.work_id or delay.op == "list")
        and delay.since >= lease.ended
        for delay in case.trace.delays
    )
    if tries > 1:
        yield f"{node.machine.name} tried {tries} times to take {lease.work_id} back"
