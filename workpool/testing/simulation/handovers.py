"""3d to 3f. What a handover promises: parent and child never have one item both."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from workpool.testing.simulation.case import WRITES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workpool.testing.simulation.case import Case, Tenure
    from workpool.testing.simulation.trace import Node


def a_handover_is_silent(case: Case) -> Iterator[str]:
    """3d. No beat is on its way, and nothing is sent, while a handler starts a child."""
    for handing in case.trace.handings:
        until = min(handing.left, handing.entered + handing.ttl / 2)
        if handing.node.paused(handing.entered - 1, until):
            continue
        for call in case.sent[handing.node, handing.work_id]:
            under_way = call.op == "heartbeat" and call.at <= handing.entered < call.answered_at
            if under_way or (call.op in WRITES and handing.entered <= call.at < until):
                yield f"{call} was sent; handing over since {handing.entered:.3f}"


def only_a_child_takes_over(case: Case) -> Iterator[str]:
    """3e. Nobody takes an item from a child while its lease lasts, and from a pool only a child."""
    children = {node.worker_id for node in case.trace.nodes if node.child}
    for tenures in case.tenures.values():
        for one, two in pairwise(tenures):
            fair = one.worker_id not in children and two.worker_id in children
            if one.how == "detached" and not fair:
                yield f"{one.work_id} was taken over at {one.ended:.3f}"


def what_is_handed_over_is_let_go(case: Case) -> Iterator[str]:
    """3f. Its parent does not touch it, but for one beat that is to take it back."""
    for node, tenure in case.all_tenures():
        if tenure.how == "detached":
            yield from _not_let_go(case, node, tenure)


def _not_let_go(case: Case, node: Node, tenure: Tenure) -> Iterator[str]:
    tries = 0
    for call in case.sent[node, tenure.work_id]:
        if call.at <= tenure.ended or case.tenure(node, tenure.work_id, call.at) is not tenure:
            continue
        if call.op in {"stop", "update"}:
            yield f"{call} was sent for what a child has"
        tries += call.op == "heartbeat" and call.trouble is None
        tries -= call.op == "get" and call.trouble is not None
    tries -= sum(  # a read that waited in vain for a connection left it open whose the item is
        delay.node is node and delay.work_id == tenure.work_id and delay.since >= tenure.ended
        for delay in case.trace.delays
    )
    if tries > 1:
        yield f"{tenure.work_id} was to be taken back {tries} times by {node.machine.name}"
