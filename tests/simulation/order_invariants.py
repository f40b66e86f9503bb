"""Invariants 9a to 9l: the order and timing of a pool's calls, and pauses between its claims."""

from __future__ import annotations

from http import HTTPStatus
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from tests.simulation.trace import FOREVER
from workpool.events import (
    AckFinished,
    DrainStarted,
    ItemDeclined,
    ItemReceived,
    SessionFinished,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.simulation.finished_simulation import FinishedSimulation
    from tests.simulation.trace import HandlerRun, PoolProcess, SentCall
    from workpool.events import Event

INSTANT_SECONDS: Final = 0.001
MARGIN_SECONDS: Final = 0.05
PAUSE_SECONDS: Final = 2.2
"""A pool notices longer pauses."""
TRY_PART: Final = 3
"""One try takes at most one third of the time that is left of the lease."""
REPEAT_SECONDS: Final = 10.0
"""A cancellation that is ignored is repeated after this time."""
RETRY_SECONDS: Final = 3.2
"""The longest pause between two tries of a completion, with a margin."""
DENIED_ACKS: Final = 10
"""The most acks that are sent while all are refused, not counting those in flight."""
FAILURES: Final = 5
"""A handler is failing after so many quick failures in a row."""
OPTIONAL: Final = ("get", "update")
PROMPT: Final = frozenset(
    {"work", "raise_error", "return_wrong_type", "end_early", "write_metadata"}
)
"""Behaviours whose completion follows at once."""


def completions_get_permits_before_new_claims(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 9a: while a completion waits for the rate limit, no claim gets a permit."""
    for run in case.trace.runs:
        permits = run.node.claim_permits
        if permits and run.behaviour in PROMPT and run.result in {"returned", "raised"}:
            yield from _find_claims_permitted_before_completion(case, run, permits)


def _find_claims_permitted_before_completion(
    case: FinishedSimulation, run: HandlerRun, permits: list[float]
) -> Iterator[str]:
    lease = case.find_last_lease_of_pool(run.node, run.work_id, run.started)
    writes = [
        call
        for call in case.sent[run.node, run.work_id]
        if call.op in {"update", "stop"}
        and call.at >= run.ended
        and case.find_last_lease_of_pool(run.node, run.work_id, call.at) is lease
    ]
    stop = next((call for call in writes if call.op == "stop"), None)
    if stop is None or run.node.was_machine_halted(run.ended, stop.at):
        return
    if run.node.lease_clock_stood_still(run.started, stop.at):
        # After an unnoticed pause, the pool sends the stop only once a heartbeat has verified the
        # lease.
        return
    writes = [call for call in writes if call.at <= stop.at]
    delayed = _had_halt_or_missing_connection(case, run.node, run.work_id, run.ended, stop.at)
    if delayed or any(call.fault is not None for call in writes):
        return
    for at in permits:
        waited = run.ended + INSTANT_SECONDS < at < stop.at - INSTANT_SECONDS
        if waited and not any(call.at <= at <= call.answered_at for call in writes):
            yield f"{stop} waited since {run.ended:.3f}, a claim was permitted at {at:.3f}"


def acks_do_not_wait_for_permits(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 9b: a pool acknowledges an item as soon as the item has a slot.

    The ack does not wait for a permit, because the pool acquires the permit before it polls.
    """
    for node in case.trace.nodes:
        if not node.claim_permits:
            continue
        for at, event in node.events:
            if isinstance(event, AckFinished):
                yield from _find_acks_sent_too_late(case, node, at, event)


def _find_acks_sent_too_late(
    case: FinishedSimulation, node: PoolProcess, at: float, event: AckFinished
) -> Iterator[str]:
    began = at - (event.delivery_seconds - event.queue_seconds) / node.pool.rate
    for call in case.sent[node, event.item.id]:
        if call.op == "ack" and began - INSTANT_SECONDS <= call.at <= at:
            late = call.at - began > MARGIN_SECONDS
            if late and not (
                call.fault or _had_halt_or_missing_connection(case, node, call.work_id, began, at)
            ):
                yield f"{call} was sent; its item had a slot since {began:.3f}"
            return


def _had_halt_or_missing_connection(
    case: FinishedSimulation, node: PoolProcess, work_id: str | None, since: float, until: float
) -> bool:
    """Return whether the pool's machine was halted, or a call for the item got no connection."""
    return node.was_machine_halted(since - 1, until) or any(
        each.node is node and each.work_id == work_id and since - 1 <= each.since <= until
        for each in case.trace.delays
    )


def pools_back_off_after_refused_acks(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 9c: a pool sends only a few acks while the control plane refuses all of them."""
    for node in case.trace.nodes:
        for since, until in node.denials:
            denied = sum(
                call.node is node
                and call.op == "ack"
                and call.answer == HTTPStatus.FORBIDDEN
                and since <= call.at < until
                for call in case.trace.sent
            )
            if denied > DENIED_ACKS + node.pool.concurrency + node.pool.prefetch:
                yield f"{node.machine.name} sent {denied} acks that were refused"


def claims_pause_after_repeated_handler_failures(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 9d: after five quick failures of a handler in a row, its pool pauses claims."""
    for node in case.trace.nodes:
        declined = {
            (at, each.item.id) for at, each in node.events if isinstance(each, ItemDeclined)
        }
        for retried in (False, True):
            yield from _find_claims_made_too_early(node, declined, retried)


def _find_claims_made_too_early(
    node: PoolProcess, declined: set[tuple[float, str]], retried: bool
) -> Iterator[str]:
    """Yield the claims that were made too soon after repeated failures of one handler.

    A pool with `max_sessions` has one handler for items with and without retries.
    """
    failed: set[str] = set()
    resume_at, pause = 0.0, 0.0
    for at, event in node.events:
        if node.pool.max_sessions is None and _has_retrying_handler(event) != retried:
            continue
        if isinstance(event, SessionFinished):
            failed, grown = _compute_failures_and_pause(event, failed, pause)
            if grown != pause or _has_failed_within_a_second(event):
                resume_at, pause = at + grown, grown
        elif _is_claim_event(event, at, declined) and at < resume_at - INSTANT_SECONDS:
            name = node.machine.name
            yield f"{name} claimed an item at {at:.3f}, before {resume_at:.3f}"


def _has_retrying_handler(event: Event) -> bool:
    """Return whether the event is about an item whose handler has `retry=`."""
    item = event.session.item if isinstance(event, SessionFinished) else None
    if isinstance(event, ItemReceived):
        item = event.item
    return item is not None and item.metadata.get("behaviour") == "retry"


def _compute_failures_and_pause(
    event: SessionFinished, failed: set[str], pause: float
) -> tuple[set[str], float]:
    """Return the items that failed in a row up to `event`, and the pause before the next claim."""
    if _has_failed_within_a_second(event):
        failed = failed | {event.session.item.id}
        return failed, min(30.0, 2 * pause or 1.0) if len(failed) >= FAILURES else 0.0
    if event.outcome in {"completed", "failed", "timed_out", "stalled"}:
        return set(), 0.0
    return failed, pause


def _has_failed_within_a_second(event: SessionFinished) -> bool:
    return event.outcome == "failed" and event.seconds < 1


def _is_claim_event(event: Event, at: float, declined: set[tuple[float, str]]) -> bool:
    return (
        isinstance(event, ItemReceived)
        and event.origin != "duplicate"
        and (at, event.item.id) not in declined
    )


def handlers_that_ignore_cancellation_are_cancelled_again(
    case: FinishedSimulation,
) -> Iterator[str]:
    """Invariant 9e: a handler that ignores its cancellation is cancelled again after 10 s."""
    for run in case.trace.runs:
        if (
            run.behaviour != "swallow_cancellation"
            or run.cancelled_at == FOREVER
            or run.node.abandoned
        ):
            continue
        halted = run.node.seconds_of_machine_halts(run.cancelled_at, run.ended)
        if run.ended - run.cancelled_at > REPEAT_SECONDS + MARGIN_SECONDS + halted:
            yield f"{run.work_id[-6:]} was cancelled at {run.cancelled_at:.3f} and ran on"


def nothing_is_written_after_a_pause_until_the_lease_is_verified(
    case: FinishedSimulation,
) -> Iterator[str]:
    """Invariant 9f: after an unnoticed machine pause, a pool verifies each lease before it writes.

    The lease clock stands still during such a pause. A heartbeat or ack that succeeds verifies the
    lease.
    """
    for (node, work_id), calls in case.sent.items():
        for since, until in node.machine.unseen:
            if until - since < PAUSE_SECONDS:
                continue
            for call in calls:
                if call.op in {"stop", "update"} and call.at >= until:
                    lease = case.find_last_lease_of_pool(node, work_id, call.at)
                    if (
                        lease is not None
                        and lease.began < until
                        and not _lease_was_verified(calls, until, call)
                    ):
                        yield f"{call} was sent; its machine was paused until {until:.3f}"


def _lease_was_verified(calls: list[SentCall], since: float, until: SentCall) -> bool:
    return any(
        call.op in {"heartbeat", "ack"}
        and call.answer == "ok"
        and call.at >= since
        and call.answered_at <= until.at
        for call in calls
    )


def heartbeats_of_an_item_do_not_overlap(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 9g: a pool sends no heartbeat for an item while another heartbeat is in flight."""
    for (node, work_id), calls in case.sent.items():
        heartbeats = [call for call in calls if call.op == "heartbeat"]
        for one, two in pairwise(heartbeats):
            # The heartbeats may overlap if the first one belongs to an earlier lease: the pool
            # ignores the answer to the first one.
            first = case.find_last_lease_of_pool(node, work_id, one.at)
            second = case.find_last_lease_of_pool(node, work_id, two.at)
            if two.at < one.answered_at and first is second:
                yield f"{two} was sent while {one} was in flight"


def writes_time_out_early_enough_to_be_sent_again(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 9h: a pool gives up an unanswered write in time to repeat it during the lease."""
    for (node, work_id), calls in case.sent.items():
        for call in calls:
            if call.op not in {"stop", "update"} or call.answered_at == FOREVER:
                continue
            lease = case.find_last_lease_of_pool(node, work_id, call.at)
            if lease is None:
                continue
            left = (lease.lease_end_granted_by(call.at) - call.at) / TRY_PART
            most = min(node.pool.request_timeout, max(0.0, left)) + MARGIN_SECONDS
            if call.answered_at - call.at > most + node.seconds_of_machine_halts(
                call.at, call.answered_at
            ):
                yield f"{call} was given up at {call.answered_at:.3f} only"


def refused_optional_calls_are_not_repeated(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 9j: a pool does not repeat an optional call that was refused to the pool's key.

    After a refused poll the pool may try the call again. A call that was already being repeated
    when another one was refused is repeated until it is refused itself. A read that already waited
    for a connection is sent.
    """
    for node in case.trace.nodes:
        for op in OPTIONAL:
            permission_denied_at = case.find_denial_time_of_operation(node, op)
            forgotten_at = min(
                (
                    call.answered_at
                    for call in case.trace.sent
                    if call.node is node
                    and call.op == "poll"
                    and isinstance(call.answer, int)
                    and call.answered_at >= permission_denied_at
                ),
                default=FOREVER,
            )
            for call in case.trace.sent:
                if (
                    call.node is node
                    and call.op == op
                    and permission_denied_at < call.at < forgotten_at
                    and not _is_repetition_of_unanswered_call(case, call, permission_denied_at)
                    and not _has_call_waited_for_connection(case, call, permission_denied_at)
                ):
                    yield f"{call} was sent; it was refused at {permission_denied_at:.3f}"


def _has_call_waited_for_connection(case: FinishedSimulation, call: SentCall, since: float) -> bool:
    """Return whether the call began to wait for a connection at the time `since` or before."""
    return any(
        each.node is call.node
        and (each.op, each.work_id) == (call.op, call.work_id)
        and each.since <= since
        for each in case.trace.delays
    )


def _is_repetition_of_unanswered_call(
    case: FinishedSimulation, call: SentCall, since: float
) -> bool:
    """Return whether the pool decided before the time `since` to make this call.

    Either the call began to wait in the client before `since`, or it repeats a call that was sent
    before `since` and had no answer by then.
    """
    waited = any(
        delay.node is call.node
        and (delay.op, delay.work_id) == (call.op, call.work_id)
        and delay.since < since
        for delay in case.trace.delays
    )
    earlier = [
        each
        for each in case.sent[call.node, str(call.work_id)]
        if each.op == call.op and each.at < call.at
    ]
    unanswered = all(each.answer in {"lost", None} for each in earlier if each.at >= since)
    repeated = any(each.at < since <= each.answered_at for each in earlier) and unanswered
    return waited or repeated


def sessions_share_no_context_variables(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 9i: no handler sees a context variable that another session's handler has set."""
    for run in case.trace.runs:
        if run.leaked:
            yield f"{run.work_id[-6:]} began in another session's context at {run.started:.3f}"


def clients_are_used_on_the_loop_that_created_them(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 9k: a client is used on the event loop for which `connect` created it."""
    for node, op, at in case.trace.misplaced:
        yield f"{node.machine.name}: {op} at {at:.3f} on another event loop than its client's"


def completions_are_retried_until_shortly_before_lease_end(
    case: FinishedSimulation,
) -> Iterator[str]:
    """Invariant 9l: a pool gives up a completion only shortly before its lease ends.

    The pool counts the lease from the time at which it decided to send the last heartbeat that
    succeeded.
    """
    for node in case.trace.nodes:
        leaving = 0.0 if node.error is not None else node.drain[0] if node.drain else FOREVER
        for at, event in node.events:
            # An exit limit begins a drain that `node.drain` does not record, so read the event.
            if isinstance(event, DrainStarted):
                leaving = min(leaving, at)
            if not isinstance(event, SessionFinished) or event.outcome != "released":
                continue
            work_id = event.session.item.id
            lease = case.find_last_lease_of_pool(node, work_id, at)
            run = None if lease is None else case.find_last_handler_run(node, lease)
            if run is None or run.cancelled_at < FOREVER or at >= leaving:
                continue
            if run.result not in {"returned", "raised"}:
                continue
            left = _lease_end_known_to_pool(case, node, work_id, at) - at
            if left > RETRY_SECONDS:
                yield f"{node.machine.name}: {work_id[-6:]} was given up {left:.1f} s too early"


def _lease_end_known_to_pool(
    case: FinishedSimulation, node: PoolProcess, work_id: str, at: float
) -> float:
    """Return the end of the lease as the pool counts it from the last successful heartbeat."""
    decided = [
        _time_of_decision_to_send(case, call)
        for call in case.sent[node, work_id]
        if call.op == "heartbeat" and call.answer == "ok" and call.answered_at <= at
    ]
    return max(decided, default=at) + node.pool.lease_ttl


def _time_of_decision_to_send(case: FinishedSimulation, call: SentCall) -> float:
    """Return when the pool decided to send the call. A wait in the pool's client comes later.

    The pool counts its lease from the decision, the control plane from the call's arrival. The
    difference is large if the machine sleeps during the wait.
    """
    if call.fault is None or not call.fault.wait:
        return call.at
    return max(
        each.since
        for each in case.trace.delays
        if each.node is call.node
        and (each.op, each.work_id) == (call.op, call.work_id)
        and each.since <= call.at
    )
