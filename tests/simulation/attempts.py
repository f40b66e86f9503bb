"""Invariants 8: the counting of attempts, by the metadata that the pools' calls wrote.

A *try* is one granted lease of an item, or the leases of a parent and its child together. It is at
most one attempt.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from tests.simulation.case import DENIED
from tests.simulation.trace import FOREVER
from workpool.events import SessionFinished, SessionStarted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.simulation.case import FinishedSimulation, GrantedLease
    from tests.simulation.trace import HandlerRun, Node, SentCall

_RELEASED: Final = "workpool.released"
_ERROR: Final = "workpool.error"
_NOTES: Final = frozenset({"workpool.attempt", "workpool.retries", _RELEASED, _ERROR})


@dataclass(slots=True, eq=False, repr=False)
class _RunAttempt:
    """One attempt of an item, as the history and the trace show it.

    Attributes:
        marked: A mark that it wrote was there at its end.
        refused: A write of its notes was refused, so the next try may not know its number.
        denied: Its pool may not write notes, so the next try does not know of it.
    """

    leases: list[GrantedLease] = field(default_factory=list)
    runs: list[HandlerRun] = field(default_factory=list)
    marked: bool = False
    refused: bool = False
    denied: bool = False


def attempts_are_counted(case: FinishedSimulation) -> Iterator[str]:
    """8a. The attempt of a run is 1 plus the number of earlier attempts without a mark.

    A try without a handler run may or may not count, as may one whose number was refused. A pool
    that may not write notes counts its own tries only. If its child may write them, the child's
    mark has the number of an earlier try, and cancels the count of that one.
    """
    for work_id in case.runs:
        if was_applied_late(case, work_id):
            continue
        least = most = 1
        for one in _attempts_of(case, work_id):
            least -= one.refused
            for run in one.runs:
                if not (1 if one.denied else least) <= run.attempt <= most:
                    name = f"{run.node.machine.name}:{work_id[-6:]}@{run.started:.3f}"
                    yield f"{name} is attempt {run.attempt}, not {least} to {most}"
            if not one.marked:
                most += 1
                least += bool(one.runs) and not one.denied
            elif one.denied:
                least = max(1, least - 1)


def lost_runs_are_counted(case: FinishedSimulation) -> Iterator[str]:
    """8d. A pool that may not write notes counts the runs that it has lost."""
    for node in case.trace.nodes:
        lost: Counter[str] = Counter()
        started: set[str] = set()
        for _, event in node.events if node.pool.worker_key else ():
            if isinstance(event, SessionStarted):
                work_id, attempt = event.session.item.id, event.session.attempt
                started.add(work_id)
                if attempt <= lost[work_id]:
                    name = f"{node.machine.name}:{work_id[-6:]}"
                    yield f"{name} is attempt {attempt} after {lost[work_id]} lost runs"
            elif isinstance(event, SessionFinished):
                work_id = event.session.item.id
                lost[work_id] += event.outcome == "lease_lost" and work_id in started
                started.discard(work_id)


def released_items_are_marked(case: FinishedSimulation) -> Iterator[str]:
    """8b. A released item has a mark, unless its pool had a fault.

    Before its first heartbeat, an item whose ack answered `active` may be another worker's, and a
    child does not own its item, so nothing can be written for it, and no handler has run.
    """
    for work_id in case.runs:
        for one in _attempts_of(case, work_id):
            lease = one.leases[-1]
            node = _node_of_record(case, lease)
            if one.marked or one.denied or lease.stop_requested < FOREVER:
                continue
            if case.had_fault(node, lease):
                continue
            not_begun = node.child or case.active_claim(node, work_id, lease.ended) is not None
            if not_begun and not any(run.node is node for run in one.runs):
                continue
            if _was_released(node, lease):
                yield f"{work_id} was released by {node.machine.name} and not marked"


def no_item_has_a_mark_and_an_error(case: FinishedSimulation) -> Iterator[str]:
    """8c. No item has a mark and an error, unless a write overtook an earlier one on its way."""
    for work_id in case.runs:
        calls = notes_of(case, work_id)
        if was_applied_late(case, work_id) or calls != sorted(calls, key=_record_time):
            continue
        standing: set[str] = set()
        for call in calls:
            standing -= call.patch.keys()
            standing |= {key for key, value in call.patch.items() if value is not None}
            if {_RELEASED, _ERROR} <= standing:
                yield f"{work_id} has a mark and an error since {call.arrives_at:.3f}"
                break


def _attempts_of(case: FinishedSimulation, work_id: str) -> list[_RunAttempt]:
    tries: list[_RunAttempt] = []
    for lease in case.leases.get(work_id, ()):
        if not tries or tries[-1].leases[-1].end_kind != "detached":
            tries.append(_RunAttempt())
        _add_attempt(case, tries[-1], lease)
    return tries


def _add_attempt(case: FinishedSimulation, one: _RunAttempt, lease: GrantedLease) -> None:
    node = _node_of_record(case, lease)
    one.leases.append(lease)
    one.runs += [
        run
        for run in case.runs[lease.work_id]
        if run.node is node and case.lease_at(node, lease.work_id, run.started) is lease
    ]
    one.denied |= node.pool.worker_key or case.denied_at(node, "update") < lease.ended
    one.refused |= any(
        call.answer in DENIED and call.patch.keys() & _NOTES
        for call in case.sent[node, lease.work_id]
        if case.lease_at(node, lease.work_id, call.at) is lease
    )
    for call in notes_of(case, lease.work_id):
        if call.node is node and case.lease_at(node, lease.work_id, call.at) is lease:
            one.marked = call.patch.get(_RELEASED, one.marked or None) is not None


def notes_of(case: FinishedSimulation, work_id: str) -> list[SentCall]:
    """Return the writes of the item's attempt, error and mark, in the order in which they were
    applied.
    """
    found = [
        call
        for (_, of_item), calls in case.sent.items()
        if of_item == work_id
        for call in calls
        if call.patch.keys() & _NOTES and call.arrives_at < FOREVER
        if not call.node.pool.worker_key
    ]
    return sorted(found, key=lambda call: call.arrives_at)


def was_applied_late(case: FinishedSimulation, work_id: str) -> bool:
    """Return whether a note was applied after its sender's lease, which the wire allows."""
    for call in notes_of(case, work_id):
        lease = case.lease_at(call.node, work_id, call.at)
        if lease is None or call.arrives_at > lease.ended:
            return True
    return False


def _was_released(node: Node, lease: GrantedLease) -> bool:
    return any(
        isinstance(event, SessionFinished)
        and event.session.item.id == lease.work_id
        and event.outcome == "released"
        and lease.began <= at <= lease.ended
        for at, event in node.events
    )


def _node_of_record(case: FinishedSimulation, lease: GrantedLease) -> Node:
    return next(node for node in case.trace.nodes if node.worker_id == lease.worker_id)


def _record_time(call: SentCall) -> float:
    return call.at
