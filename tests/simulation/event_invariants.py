"""Invariants 7a to 7d: a pool's events and metrics agree with the history and the trace."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from tests.simulation.trace import FOREVER
from workpool.events import (
    AckFinished,
    HandlerRetried,
    ItemDeclined,
    ItemReceived,
    ItemReclaimed,
    PollFinished,
    SessionFinished,
    SessionStarted,
    StopFinished,
    StopRequested,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.simulation.finished_simulation import FinishedSimulation, GrantedLease
    from tests.simulation.schedule import PoolSettings
    from tests.simulation.trace import HandlerRun, PoolProcess
    from workpool.events import Event

_EXPECTED: Final = {"returned": "completed", "raised": "failed", "released": "released"}
_COUNTED: Final[Mapping[type[Event], tuple[str, str]]] = {
    SessionFinished: ("sessions_total", "outcome"),
    AckFinished: ("acks_total", "result"),
    StopFinished: ("stops_total", "result"),
    ItemReceived: ("items_received_total", "origin"),
    ItemReclaimed: ("reclaims_total", "direction"),
    HandlerRetried: ("handler_retries_total", "handler"),
}
"""The counter that each event increases, and the attribute that is its label."""
GIVE_UP_SECONDS: Final = 4.0
"""A lease may be given up so early: a tenth of the longest TTL, and time for a last try."""


def outcomes_agree_with_history(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 7a: a pool reports one outcome of each acknowledged session, and the right one.

    The history of the control plane and the handler's run show which outcome is right.
    """
    for node in case.trace.nodes:
        if node.crashed < FOREVER:
            continue
        acked = sum(
            isinstance(event, AckFinished) and event.result == "ok" for _, event in node.events
        )
        ends = [(at, each) for at, each in node.events if isinstance(each, SessionFinished)]
        if acked != len(ends) and not node.child:
            yield f"{node.machine.name}: {acked} acked, {len(ends)} finished"
        for at, event in ends:
            if problem := _describe_wrong_outcome(case, node, event, at):
                yield f"{node.machine.name}: {problem}"


def _describe_wrong_outcome(
    case: FinishedSimulation, node: PoolProcess, event: SessionFinished, at: float
) -> str | None:
    work_id = event.session.item.id
    if event.outcome in {"lease_lost", "released"} and case.is_item_owner_uncertain(
        node, work_id, at
    ):
        # The answer to the pool's ack was `active`, so the outcome `lease_lost` is right if another
        # worker owns the item, and the outcome `released` is right if a drain has ended the claim.
        return None
    lease = case.find_last_lease_of_pool(node, work_id, at)
    if lease is None:
        owned = not node.child or event.outcome in {"completed", "failed", "timed_out", "stalled"}
        return "finished an item that it never owned" if owned else None
    problem = _find_contradiction_of_outcome(case, node, lease, event.outcome, at)
    return problem and f"{work_id[-6:]} is {event.outcome} at {at:.3f}, but {problem}"


def pools_do_not_own_items_that_they_report_as_lost(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 7c: a pool reports an item as lost only if another worker owns the item by then."""
    for node in case.trace.nodes:
        for at, event in node.events:
            if not isinstance(event, ItemReclaimed) or event.direction != "lost":
                continue
            lease = case.find_last_lease_of_pool(node, event.item.id, at)
            if lease is None or lease.extended_by is not None or event.stage == "ack":
                continue
            if case.is_item_owner_uncertain(node, event.item.id, at):
                continue
            if lease.ended > at and not _is_reported_loss_of_another_ack(case, node, lease, at):
                yield f"{node.machine.name}: {lease.work_id[-6:]} is not lost at {at:.3f}"


def _is_reported_loss_of_another_ack(
    case: FinishedSimulation, node: PoolProcess, lease: GrantedLease, at: float
) -> bool:
    """Return whether the pool reported at `at` the loss of the item, but not the loss of `lease`.

    Either the ack of a later delivery was refused, or the pool had already given up the ack that
    began `lease`.
    """
    return any(
        call.answered_at == at or call.answered_at < lease.began <= call.arrival_time + 0.01
        for call in case.sent[node, lease.work_id]
        if call.op == "ack"
    )


def _find_contradiction_of_outcome(
    case: FinishedSimulation, node: PoolProcess, lease: GrantedLease, outcome: str, at: float
) -> str | None:
    run = case.find_last_handler_run(node, lease)
    handed = lease.end_kind == "detached" and lease.ended <= at
    # A pool that may not read items cannot find out whether a 409 means that the item is stopped.
    # Such a pool does not even notice that its own child process stopped the item.
    unread = case.find_denial_time_of_operation(node, "get") <= at
    if handed != (outcome == "detached") and not (
        case.pool_had_fault_during_lease(node, lease)
        or node.abandoned
        or (unread and _was_item_stopped_at_time(case, lease, at))
    ):
        return "a child has taken it" if handed else "no child has taken it"
    match outcome:
        case "completed" | "timed_out" | "stalled" if not (
            unread
            or _was_item_stopped_at_time(case, lease, at)
            or case.lease_was_ended_early(lease)
        ):
            return "it is not stopped"
        case "completed" if run is None or run.result != "returned":
            return "its handler has not returned"
        case "timed_out" | "stalled" if (
            _find_timeout_setting_of_outcome(node.pool, outcome) is None
        ):
            return "there is no timeout"
        case "stopped" if not _was_item_ended_by_others(case, node, lease, at):
            return "nobody else has ended it"
        case "lease_lost" if not case.pool_had_fault_during_lease(
            node, lease
        ) and not _is_near_lease_end(lease, at):
            return f"its lease was granted until {lease.lease_end_granted_by(at):.3f}"
        case "released" if _was_item_stopped_at_time(
            case, lease, _arrival_of_last_answered_heartbeat(case, node, lease, at)
        ) and not (unread or case.pool_had_fault_during_lease(node, lease)):
            return "it is stopped"
        case _:
            return _describe_unexpected_outcome(case, node, lease, run, outcome)


def _find_timeout_setting_of_outcome(pool: PoolSettings, outcome: str) -> float | None:
    return pool.session_timeout if outcome == "timed_out" else pool.stall_timeout


def _was_item_stopped_at_time(case: FinishedSimulation, lease: GrantedLease, at: float) -> bool:
    stopped = case.stopped.get(lease.work_id)
    return stopped is not None and stopped.time <= at


def _arrival_of_last_answered_heartbeat(
    case: FinishedSimulation, node: PoolProcess, lease: GrantedLease, at: float
) -> float:
    """Return the arrival time of the pool's last heartbeat that was answered by the time `at`.

    The pool knows the state that the lease had then, but no later state.
    """
    applied = [
        call.arrival_time
        for call in case.sent[node, lease.work_id]
        if call.op == "heartbeat" and call.answer == "ok" and call.answered_at <= at
    ]
    return max(applied, default=at)


def _describe_unexpected_outcome(
    case: FinishedSimulation,
    node: PoolProcess,
    lease: GrantedLease,
    run: HandlerRun | None,
    outcome: str,
) -> str | None:
    """Describe how the outcome contradicts the end of the handler; None if it does not.

    An outcome that a fault may have caused is no contradiction.
    """
    if run is None or run.cancelled_at < FOREVER or case.pool_had_fault_during_lease(node, lease):
        return None
    if min(lease.stop_requested, _time_of_stop_by_non_owner(lease)) <= run.ended + 1:
        return None
    expected = "failed" if run.behaviour == "return_wrong_type" else _EXPECTED.get(str(run.result))
    return None if expected in {None, outcome} else f"its handler has {run.result}"


def _time_of_stop_by_non_owner(lease: GrantedLease) -> float:
    foreign = lease.end_kind == "stopped" and lease.stopped_by != lease.worker_id
    return lease.ended if foreign else FOREVER


def _was_item_ended_by_others(
    case: FinishedSimulation, node: PoolProcess, lease: GrantedLease, at: float
) -> bool:
    stopped = case.stopped.get(lease.work_id)
    foreign = stopped is not None and stopped.worker_id != node.worker_id and stopped.time <= at
    if foreign or lease.stop_requested <= at:
        return True
    # A stop that the pool sent during an earlier lease may have arrived during this lease. The pool
    # does not know that its own stop ended the item, so this stop counts like another client's.
    return any(
        call.op == "stop" and call.at < lease.began for call in case.sent[node, lease.work_id]
    )


def _is_near_lease_end(lease: GrantedLease, at: float) -> bool:
    return lease.ended <= at or lease.lease_end_granted_by(at) - GIVE_UP_SECONDS <= at


def metrics_agree_with_calls(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 7b: the sums of the metrics of all pools agree with the calls in the network."""
    counted = {key: value for key, value in case.counted.items() if value}
    for key, seen in _expected_counters(case).items():
        if counted.get(key, 0) != seen:
            yield f"{' '.join(key)} is {counted.get(key, 0):g}, but there were {seen}"


def _expected_counters(case: FinishedSimulation) -> Counter[tuple[str, ...]]:
    seen: Counter[tuple[str, ...]] = Counter()
    for call in case.trace.sent:
        if call.answered_at < FOREVER:
            seen["http_requests_total", call.op] += 1
        if call.op == "poll" and call.answer == "ok":
            seen["polls_total", "null" if call.value is None else "item"] += 1
    _add_event_counts(case, seen)
    return seen


def _add_event_counts(case: FinishedSimulation, seen: Counter[tuple[str, ...]]) -> None:
    for node in case.trace.nodes:
        for _, event in node.events:
            if type(event) in _COUNTED:
                name, label = _COUNTED[type(event)]
                seen[name, getattr(event, label)] += 1
    for node in case.trace.nodes:
        if node.crashed == FOREVER:
            _add_counts_of_misreported_events(case, node, seen)


def _add_counts_of_misreported_events(
    case: FinishedSimulation, node: PoolProcess, seen: Counter[tuple[str, ...]]
) -> None:
    """Check the numbers of three kinds of events that a pool reported.

    If a number is wrong, add the right number to `seen`.
    """
    calls = [run for run in case.trace.runs if run.node is node and run.behaviour != "alone"]
    runs = sum(not run.again for run in calls)
    started = sum(isinstance(event, SessionStarted) for _, event in node.events)
    if runs != started:
        seen[node.machine.name, "sessions started"] = runs
    retries = sum(isinstance(event, HandlerRetried) for _, event in node.events)
    if retries != len(calls) - runs:
        seen[node.machine.name, "retries"] = len(calls) - runs
    polls = sum(isinstance(event, PollFinished) for _, event in node.events)
    if polls != node.polls:
        seen[node.machine.name, "polls"] = node.polls


def all_received_items_are_reported(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 7d: a pool reports each received item, owner change, heartbeat and stop request."""
    for node in case.trace.nodes:
        if node.crashed < FOREVER or node.child:
            continue
        for what, reported, least, most in _list_event_counts_with_bounds(case, node):
            if not least <= reported <= most:
                yield f"{node.machine.name}: {reported} {what}, not {least} to {most}"
    started = sum(
        isinstance(event, SessionStarted) for node in case.trace.nodes for _, event in node.events
    )
    sent = sum(call.op == "heartbeat" for call in case.trace.sent)
    if not started <= (good := case.counted.get(("heartbeats_total", "ok"), 0)) <= sent:
        yield f"{good:g} successful heartbeats, not {started} to {sent}"


def _list_event_counts_with_bounds(
    case: FinishedSimulation, node: PoolProcess
) -> Iterator[tuple[str, int, int, float]]:
    """Yield the name, the count and the lowest and highest correct count of each event kind."""
    events = [event for _, event in node.events]
    claimed = [(at, event) for at, event in node.events if isinstance(event, ItemReceived)]
    leaving = 0.0 if node.error is not None else node.drain[0] if node.drain else FOREVER
    received = [
        call.answered_at
        for call in case.trace.sent
        if call.node is node and call.op == "poll" and call.answer == "ok" and call.value
    ]
    certain = sum(
        at < leaving and not any(since <= at <= until for since, until in node.refrains)
        for at in received
    )
    yield "items", len(claimed), certain, len(received)
    # Two polls can return one item at the same time: one of the two is declined, the other is not.
    declined = Counter((at, e.item.id) for at, e in node.events if isinstance(e, ItemDeclined))
    held_before = Counter(
        (at, event.item.id)
        for at, event in claimed
        if event.origin != "duplicate" and (event.item.acknowledged_at or event.item.last_heartbeat)
    )
    gained = (held_before - declined).total()
    reclaims = [event.direction for event in events if isinstance(event, ItemReclaimed)]
    # A pool reports an item that it took over from another worker. If the handler has a limit, the
    # pool reports the item only when its session starts, and the session may never start.
    least = gained if node.pool.max_sessions is None else 0
    yield "items gained", reclaims.count("gained"), least, gained
    conflicts = sum(isinstance(e, AckFinished) and e.result == "conflict" for e in events)
    yield "items lost", reclaims.count("lost"), conflicts, FOREVER
    asked = {e.item.id for e in events if isinstance(e, StopRequested)}
    confirmed = {e.item.id for e in events if isinstance(e, StopFinished) and e.mode == "confirm"}
    yield "stop requests", len(confirmed & asked), len(confirmed), FOREVER
