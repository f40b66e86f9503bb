"""Invariants 8a to 8d: how pools count the attempts of an item in the metadata that they write.

A *try* is one granted lease of an item, or the leases of a parent and its child together. A try is
at most one attempt. A *release mark* is metadata which say that a try was released, so that it does
not count as an attempt.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from tests.simulation.finished_simulation import DENIED
from tests.simulation.trace import FOREVER
from workpool.events import SessionFinished, SessionStarted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.simulation.finished_simulation import FinishedSimulation, GrantedLease
    from tests.simulation.trace import HandlerRun, PoolProcess, SentCall

_RELEASED: Final = "workpool.released"
_ERROR: Final = "workpool.error"
_NOTES: Final = frozenset({"workpool.attempt", "workpool.retries", _RELEASED, _ERROR})


@dataclass(slots=True, eq=False, repr=False)
class _ItemAttempt:
    """One try to run an item: its leases and handler runs, from the history and the trace.

    Attributes:
        marked: The item had the release mark of this try when the try ended.
        refused: A metadata write was refused, so the next try may not know the attempt number.
        denied: The pool may not write metadata, so the next try does not know of this try.
    """

    leases: list[GrantedLease] = field(default_factory=list)
    runs: list[HandlerRun] = field(default_factory=list)
    marked: bool = False
    refused: bool = False
    denied: bool = False


def attempts_are_counted(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 8a: a run's attempt number is 1 plus the number of earlier tries that count.

    A try counts if it has no release mark, which says that the try was released.

    A try without a handler run may or may not count, as may one whose number was refused. A pool
    that may not write notes counts its own tries only. If its child may write them, the child's
    mark has the number of an earlier try, and cancels the count of that one.
    """
    for work_id in case.runs:
        if has_late_write_of_attempt_metadata(case, work_id):
            continue
        least = most = 1
        for one in _list_attempts(case, work_id):
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


def runs_that_lost_their_lease_are_counted(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 8d: a pool that may not write metadata counts in memory the runs that lost a lease.

    A run that its handler has released does not count, even if the lease is lost afterwards. Nor
    does a run whose machine was halted while it waited for a retry: the pool releases its item.
    """
    for node in case.trace.nodes:
        lost: Counter[str] = Counter()
        started: set[str] = set()
        for at, event in node.events if node.pool.worker_key else ():
            if isinstance(event, SessionStarted):
                work_id, attempt = event.session.item.id, event.session.attempt
                started.add(work_id)
                if attempt <= lost[work_id]:
                    name = f"{node.machine.name}:{work_id[-6:]}"
                    yield f"{name} is attempt {attempt} after {lost[work_id]} lost runs"
            elif isinstance(event, SessionFinished):
                work_id = event.session.item.id
                if event.outcome == "lease_lost" and work_id in started:
                    runs = [run for run in case.runs[work_id] if run.node is node]
                    latest = max(
                        (run for run in runs if run.started <= at), key=lambda run: run.started
                    )
                    released = latest.result == "released" or (
                        latest.result == "retried" and node.was_machine_halted(latest.ended, at)
                    )
                    lost[work_id] += not released
                started.discard(work_id)


def released_items_have_a_release_mark(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 8b: except after a fault, a pool that releases an item writes a release mark.

    Before its first heartbeat, an item whose ack answered `active` may be another worker's, and a
    child does not own its item, so nothing can be written for it, and no handler has run. The mark
    of a drain is removed once the handler has returned, also if the drain then gives the item up.
    """
    for work_id in case.runs:
        for one in _list_attempts(case, work_id):
            lease = one.leases[-1]
            node = case.find_process_of_lease(lease)
            if one.marked or one.denied or lease.stop_requested < FOREVER:
                continue
            if case.pool_had_fault_during_lease(node, lease):
                continue
            not_begun = (
                node.child
                or case.find_claim_with_uncertain_owner(node, work_id, lease.ended) is not None
            )
            if not_begun and not any(run.node is node for run in one.runs):
                continue
            returned = any(run.result == "returned" and run.node is node for run in one.runs)
            if _session_was_released(node, lease) and not returned:
                yield f"{work_id} was released by {node.machine.name} and not marked"


def no_item_has_a_release_mark_and_an_error(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 8c: the metadata of an item never have both a release mark and an error.

    Items are not checked if the writes to their metadata arrived out of order.
    """
    for work_id in case.runs:
        calls = list_writes_of_attempt_metadata(case, work_id)
        if has_late_write_of_attempt_metadata(case, work_id) or calls != sorted(
            calls, key=_time_when_call_was_sent
        ):
            continue
        standing: set[str] = set()
        for call in calls:
            standing -= call.patch.keys()
            standing |= {key for key, value in call.patch.items() if value is not None}
            if {_RELEASED, _ERROR} <= standing:
                yield f"{work_id} has a mark and an error since {call.arrival_time:.3f}"
                break


def _list_attempts(case: FinishedSimulation, work_id: str) -> list[_ItemAttempt]:
    tries: list[_ItemAttempt] = []
    for lease in case.leases.get(work_id, ()):
        if not tries or tries[-1].leases[-1].end_kind != "detached":
            tries.append(_ItemAttempt())
        _add_lease_to_attempt(case, tries[-1], lease)
    return tries


def _add_lease_to_attempt(case: FinishedSimulation, one: _ItemAttempt, lease: GrantedLease) -> None:
    node = case.find_process_of_lease(lease)
    one.leases.append(lease)
    one.runs += [
        run
        for run in case.runs[lease.work_id]
        if run.node is node
        and case.find_last_lease_of_pool(node, lease.work_id, run.started) is lease
    ]
    one.denied |= (
        node.pool.worker_key or case.find_denial_time_of_operation(node, "update") < lease.ended
    )
    one.refused |= any(
        call.answer in DENIED and call.patch.keys() & _NOTES
        for call in case.sent[node, lease.work_id]
        if case.find_last_lease_of_pool(node, lease.work_id, call.at) is lease
    )
    for call in list_writes_of_attempt_metadata(case, lease.work_id):
        if (
            call.node is node
            and case.find_last_lease_of_pool(node, lease.work_id, call.at) is lease
        ):
            one.marked = call.patch.get(_RELEASED, one.marked or None) is not None


def list_writes_of_attempt_metadata(case: FinishedSimulation, work_id: str) -> list[SentCall]:
    """Return the writes of attempt number, retry number, error and release mark, by arrival."""
    found = [
        call
        for (_, of_item), calls in case.sent.items()
        if of_item == work_id
        for call in calls
        if call.patch.keys() & _NOTES and call.arrival_time < FOREVER
        if not call.node.pool.worker_key
    ]
    return sorted(found, key=lambda call: call.arrival_time)


def has_late_write_of_attempt_metadata(case: FinishedSimulation, work_id: str) -> bool:
    """Return whether a pool's write of attempt metadata arrived after this pool's lease had ended.

    Attempt metadata are those that `list_writes_of_attempt_metadata` names.
    """
    for call in list_writes_of_attempt_metadata(case, work_id):
        lease = case.find_last_lease_of_pool(call.node, work_id, call.at)
        if lease is None or call.arrival_time > lease.ended:
            return True
    return False


def _session_was_released(node: PoolProcess, lease: GrantedLease) -> bool:
    return any(
        isinstance(event, SessionFinished)
        and event.session.item.id == lease.work_id
        and event.outcome == "released"
        and lease.began <= at <= lease.ended
        for at, event in node.events
    )


def _time_when_call_was_sent(call: SentCall) -> float:
    return call.at
