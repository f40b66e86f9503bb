"""The invariants of the simulation: functions that yield a description of each violation.

The docstring of an invariant begins with its number, such as 3f. Comments refer to that number.
"""

from __future__ import annotations

from http import HTTPStatus
from itertools import combinations
from typing import TYPE_CHECKING, Final, TypeGuard

from tests.simulation.attempt_invariants import (
    attempts_are_counted,
    no_item_has_a_release_mark_and_an_error,
    released_items_have_a_release_mark,
    runs_that_lost_their_lease_are_counted,
)
from tests.simulation.event_invariants import (
    all_received_items_are_reported,
    metrics_agree_with_calls,
    outcomes_agree_with_history,
    pools_do_not_own_items_that_they_report_as_lost,
)
from tests.simulation.finished_simulation import ACK_SECONDS, WRITES
from tests.simulation.handoff_invariants import (
    nothing_is_sent_during_a_handoff,
    only_a_child_process_takes_over_an_item,
    parent_writes_nothing_after_a_handoff,
)
from tests.simulation.order_invariants import (
    acks_do_not_wait_for_permits,
    claims_pause_after_repeated_handler_failures,
    clients_are_used_on_the_loop_that_created_them,
    completions_are_retried_until_shortly_before_lease_end,
    completions_get_permits_before_new_claims,
    handlers_that_ignore_cancellation_are_cancelled_again,
    heartbeats_of_an_item_do_not_overlap,
    nothing_is_written_after_a_pause_until_the_lease_is_verified,
    pools_back_off_after_refused_acks,
    refused_optional_calls_are_not_repeated,
    sessions_share_no_context_variables,
    writes_time_out_early_enough_to_be_sent_again,
)
from tests.simulation.retry_invariants import (
    failed_calls_are_repeated,
    no_retry_begins_after_a_drain_or_stop_request,
    retries_are_bounded,
    retry_number_is_stored_for_the_next_run,
)
from tests.simulation.stall_invariants import (
    handlers_without_progress_are_cancelled,
    sessions_with_progress_do_not_end_as_stalled,
)
from tests.simulation.trace import FOREVER
from workpool.errors import ControlPlaneError, RefusedError
from workpool.events import ItemReceived, PollerRestarted, SessionFinished, SessionStarted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.simulation.finished_simulation import FinishedSimulation, GrantedLease
    from tests.simulation.trace import HandlerRun, PoolProcess, SentCall
    from workpool.events import Event

    Invariant = Callable[[FinishedSimulation], Iterator[str]]

MARGIN_SECONDS: Final = 0.05
"""Drift of clocks that differ by 100 ppm over a lease of 60 s, and the network's latency."""
GIVE_UP_SECONDS: Final = 1.0
"""A handler is cancelled at least this long before the end of its lease."""
CHECK_SECONDS: Final = 5.0
"""The longest time between two checks of the simulated lease renewer."""
TIDY_SECONDS: Final = 1.0
"""The longest clean-up of a cancelled handler."""
RELEASED_SECONDS: Final = 12.5
"""The longest delay of a release in a simulation, with a margin."""
DRAIN_SECONDS: Final = 6.0
"""The longest time for a drain beyond its timeout: 5 s for completions, with a margin."""
CLOSE_SECONDS: Final = 11.0
"""The longest time between the end of a drain and the end of the process."""
IGNORES_CANCELLATION: Final = frozenset({"ignore_cancellation", "swallow_cancellation"})
"""Behaviours that ignore a cancellation."""
OWNED: Final = frozenset({HTTPStatus.CONFLICT, HTTPStatus.PRECONDITION_FAILED})
"""Answers to a first heartbeat that say that the item is not ours."""
DECIDED: Final = frozenset({"ok", 400, 401, 403, 404, 409, 412})
"""Answers that say whether the call was applied."""


def every_item_is_stopped_in_the_end(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 1: in the end every item is stopped; one that is not was lost."""
    for work_id in {record.work_id for record in case.history}:
        if work_id not in case.stopped:
            yield f"{work_id} is not stopped"


def handlers_run_under_a_lease(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 2a: a pool owns an item while the item's handler runs and is not cancelled.

    The handler is cancelled at least a second before the lease ends. A machine that was halted may
    cancel the handler late, by at most the time between two checks of its lease renewer.
    """
    for run in case.trace.runs:
        lease = case.find_last_lease_of_pool(run.node, run.work_id, run.started)
        if lease is None:
            yield f"{_describe_run(run)} started without a lease"
            continue
        if not any(
            call.op == "heartbeat" and call.answer == "ok" and call.answered_at <= run.started
            for call in case.sent[run.node, run.work_id]
            if call.answered_at >= lease.began
        ):
            yield f"{_describe_run(run)} started before a heartbeat was answered"
        if _is_handler_start_too_late(case, lease, run):
            granted = lease.lease_end_granted_by(run.started)
            yield f"{_describe_run(run)} started; granted until {granted:.3f}"
        until = run.time_of_end_or_cancellation
        limit = lease.lease_end_granted_by(until) - GIVE_UP_SECONDS + MARGIN_SECONDS
        excused = (
            _machine_was_halted_shortly_before(run.node, until)
            or case.has_extended_lease_of_another_worker(run.node, run.work_id)
            or run.node.lease_clock_stood_still(lease.began, until)
        )
        if until > limit and not excused:
            yield f"{_describe_run(run)} ran until {until:.3f}, allowed until {limit:.3f}"


def _is_handler_start_too_late(
    case: FinishedSimulation, lease: GrantedLease, run: HandlerRun
) -> bool:
    late = (
        run.started > lease.lease_end_granted_by(run.started) + MARGIN_SECONDS
        and run.behaviour != "alone"
    )
    return late and not case.has_extended_lease_of_another_worker(run.node, run.work_id)


def no_two_handlers_run_one_item(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 2b: no two handlers run one item at the same time.

    Exceptions: a handler that ignores its cancellation, one whose machine was halted, and one whose
    lease an operator ended early.
    """
    for runs in case.runs.values():
        for one, two in combinations(sorted(runs, key=lambda run: run.started), 2):
            if two.started < one.ended and not _is_overlap_of_runs_allowed(case, one, two):
                yield f"{_describe_run(one)} and {_describe_run(two)} ran at the same time"


def _is_overlap_of_runs_allowed(case: FinishedSimulation, one: HandlerRun, two: HandlerRun) -> bool:
    if one.node is two.node:
        return False
    leases = [
        case.find_last_lease_of_pool(run.node, run.work_id, run.started) for run in (one, two)
    ]
    broken = any(lease is not None and case.lease_was_ended_early(lease) for lease in leases)
    ignored = one.cancelled_at <= two.started and one.behaviour in IGNORES_CANCELLATION
    unseen = one.node.lease_clock_stood_still(one.started, two.started)
    return (
        ignored
        or broken
        or unseen
        or _machine_was_halted_shortly_before(one.node, two.started, TIDY_SECONDS)
    )


def no_two_handlers_run_one_session(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 2c: a pool does not run two items of one session at the same time."""
    for one, two in combinations(case.trace.runs, 2):
        same = one.session_id == two.session_id and one.node is two.node
        if same and max(one.started, two.started) < min(one.ended, two.ended):
            yield f"{_describe_run(one)} and {_describe_run(two)} are of one session"


def nothing_is_sent_without_the_lease(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 3a: heartbeats, stops and metadata are sent only during a lease, despite faults."""
    for call in case.trace.sent:
        if call.op not in WRITES or call.work_id is None:
            continue
        lease = case.find_last_lease_of_pool(call.node, call.work_id, call.at)
        if call.op == "heartbeat" and _is_item_owner_still_unknown(case, call):
            continue
        if lease is None:
            if call.op != "heartbeat" or not call.node.child:
                yield f"{call} was sent without a lease"
        elif call.at > lease.lease_end_granted_by(call.at) + MARGIN_SECONDS and not (
            _is_heartbeat_after_unnoticed_pause(case, lease, call)
        ):
            yield f"{call} was sent; granted until {lease.lease_end_granted_by(call.at):.3f}"


def _is_item_owner_still_unknown(case: FinishedSimulation, call: SentCall) -> bool:
    """Return whether the pool cannot know yet which worker owns the item of the call.

    An ack that is answered `active` does not show the owner. The next heartbeat shows it.
    """
    claim = case.find_claim_with_uncertain_owner(call.node, str(call.work_id), call.at)
    return (
        claim is not None
        and not claim.is_pool_proven_owner(call.at)
        and (
            call.at <= claim.polled_at + ACK_SECONDS + MARGIN_SECONDS
            or call.node.lease_clock_stood_still(claim.polled_at, call.at)
        )
    )


def only_heartbeats_are_sent_until_owner_of_item_is_known(
    case: FinishedSimulation,
) -> Iterator[str]:
    """Invariant 3g: after the ack answer `active`, only heartbeats are sent until one succeeds.

    The answer `active` does not show which worker owns the item. After a refused heartbeat the pool
    sends nothing more, because another worker owns the item.
    """
    for call in case.trace.sent:
        if call.work_id is None or call.op in {"ack", "poll"}:
            continue
        claim = case.find_claim_with_uncertain_owner(call.node, call.work_id, call.at)
        if claim is None:
            continue
        if claim.is_pool_proven_owner(call.at):
            continue
        if call.op != "heartbeat":
            yield f"{call} was sent for an item that may be another worker's"
        elif any(each.answer in OWNED for each in claim.list_heartbeats_answered_by(call.at)):
            yield f"{call} was sent for an item that another worker owns"


def _is_heartbeat_after_unnoticed_pause(
    case: FinishedSimulation, lease: GrantedLease, call: SentCall
) -> bool:
    """Return whether the call is a heartbeat after a pause in which the lease clock stood still.

    The pool cannot know how much of the lease is left after such a pause. The heartbeat names the
    previous one, so it cannot extend another worker's lease.
    """
    begun = any(
        each.op == "heartbeat" and each.answer == "ok" and lease.began < each.answered_at <= call.at
        for each in case.sent[call.node, lease.work_id]
    )
    return (
        call.op == "heartbeat" and begun and call.node.lease_clock_stood_still(lease.began, call.at)
    )


def nothing_is_sent_after_an_answer_that_ends_the_lease(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 3b: after an answer that shows the lease as ended, nothing is sent for the item."""
    for (node, work_id), calls in case.sent.items():
        for lease in case.leases.get(work_id, ()):
            if lease.worker_id != node.worker_id:
                continue
            # The lease of a child process begins when the first call arrives, so
            # `find_last_lease_of_pool` does not find it at the time at which that call was sent.
            following = [
                call
                for call in calls
                if node.child or case.find_last_lease_of_pool(node, work_id, call.at) is lease
            ]
            known_at = min(
                (_time_of_reported_lease_end(case, call, following, lease) for call in following),
                default=FOREVER,
            )
            for call in following:
                if (
                    call.op in WRITES
                    and call.at > known_at
                    and not _is_item_owner_still_unknown(case, call)
                ):
                    yield f"{call} was sent; its lease was known to be over at {known_at:.3f}"


def _time_of_reported_lease_end(
    case: FinishedSimulation, call: SentCall, calls: list[SentCall], lease: GrantedLease
) -> float:
    """Return when the call's answer showed that the lease had ended; infinite if it did not."""
    if call.fault is not None and call.fault.answer is not None:
        return FOREVER
    over = call.op == "stop" and call.answer == "ok"
    if call.op == "heartbeat" and call.answer == HTTPStatus.PRECONDITION_FAILED:
        before = [each for each in calls if each.op in {"heartbeat", "get"} and each.at < call.at]
        # During a handoff, a 412 does not show whether the parent or the child owns the item, so
        # the 412 is no sign here that the lease is over. Invariant 3f checks the calls that follow.
        handoff = (
            lease.end_kind == "detached"
            or (call.node.child and not any(each.answer == "ok" for each in before))
            or any(
                period.node is call.node
                and period.work_id == call.work_id
                and lease.began <= period.entered <= call.at
                for period in case.trace.handoff_periods
            )
        )
        # A heartbeat that got no connection was not sent, but the pool cannot know that. The pool
        # may take a later 412 for the effect of this heartbeat, so the 412 does not show the pool
        # that the lease is over.
        delayed = any(
            delay.node is call.node
            and delay.work_id == call.work_id
            and delay.op in {"heartbeat", "get"}
            and lease.began <= delay.since < call.at
            for delay in case.trace.delays
        )
        over = not (handoff or delayed) and all(each.answer in DECIDED for each in before)
    if call.op == "get" and call.answer == "ok":
        state = getattr(call.value, "state", None)
        over = state in {"stopped", "queued"}
    return call.answered_at if over and call.answered_at >= lease.began else FOREVER


def items_are_stopped_only_after_handler_end_or_request(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 3c: a pool stops an item only after the handler's end or a stop request."""
    for call in case.trace.sent:
        if call.op != "stop" or call.work_id is None:
            continue
        lease = case.find_last_lease_of_pool(call.node, call.work_id, call.at)
        # Skip a stop that was sent without a lease, because invariant 3a reports it.
        if lease is not None and lease.stop_requested > call.at:
            run = case.find_last_handler_run(call.node, lease)
            if problem := _describe_unjustified_stop(call, run):
                yield f"{call} was sent {problem}"
        elif lease is not None:
            run = case.find_last_handler_run(call.node, lease)
            if run is not None and call.at < run.ended:
                yield f"{call} was sent while its handler ran"


def _describe_unjustified_stop(call: SentCall, run: HandlerRun | None) -> str | None:
    """Return why a stop that no operator requested was wrong; None if it was right."""
    if run is None:
        return "for an item that had not run"
    if call.at < run.ended:
        return "while its handler ran"
    limits = call.node.pool.session_timeout, call.node.pool.stall_timeout
    if run.result in {"cancelled", "retried"} and limits != (None, None):
        return None
    untouched = run.result in {"released", "cancelled", "retried"}
    return f"for an item that was {run.result}" if untouched else None


def items_are_stopped_soon_after_handler_end(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 4: without faults, a pool stops an item within a second after the handler's end."""
    for node, lease in case.all_leases():
        run = case.find_last_handler_run(node, lease)
        if run is None or run.cancelled_at < FOREVER or run.result not in {"returned", "raised"}:
            continue
        if case.pool_had_fault_during_lease(node, lease) or _has_pool_stopped_claiming(
            node, run.ended
        ):
            continue
        if lease.end_kind != "stopped" or lease.ended > run.ended + 1:
            yield f"{_describe_run(run)} was {run.result}, but not stopped"


def every_acknowledged_item_is_handled(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 5a: an acknowledged item is handled unless the pool drains or the item stops."""
    for node, lease in case.all_leases():
        if case.find_last_handler_run(node, lease) is not None or case.pool_had_fault_during_lease(
            node, lease
        ):
            continue
        if not lease.settled or _heartbeat_answer_was_lost(case, node, lease):
            continue  # no answer has shown that the pool owns the item
        wished = min(lease.stop_requested, lease.ended if lease.end_kind == "stopped" else FOREVER)
        if not _has_pool_stopped_claiming(node, lease.began + 1) and wished > lease.began + 1:
            yield f"{lease.work_id} was acknowledged by {node.machine.name} and not run"


def _heartbeat_answer_was_lost(
    case: FinishedSimulation, node: PoolProcess, lease: GrantedLease
) -> bool:
    """Return whether the pool stopped waiting before its first heartbeat was answered.

    On a control plane where polls begin leases, this also happens without a fault: the pool waits
    only until the end of the lease that the poll began.
    """
    return any(
        call.op == "heartbeat"
        and call.answer == "lost"
        and call.at <= lease.began <= call.answered_at
        for call in case.sent[node, lease.work_id]
    )


def claims_and_runs_never_exceed_concurrency(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 5b: a pool's running handlers plus its polls or acks never exceed its slots.

    Running handlers plus polls in flight are at most `concurrency` plus `prefetch`. Running
    handlers plus acks in flight are at most `concurrency`.
    """
    for node in case.trace.nodes:
        calls = [call for call in case.trace.sent if call.node is node]
        runs = [run for run in case.trace.runs if run.node is node]
        pool = node.pool
        for op, places in (("poll", pool.concurrency + pool.prefetch), ("ack", pool.concurrency)):
            of_op = [call for call in calls if call.op == op]
            for call in of_op:
                in_flight = sum(one.at <= call.at < one.answered_at for one in of_op)
                running = sum(run.started <= call.at < run.ended for run in runs)
                if in_flight + running > places:
                    yield f"{call}: {in_flight} {op}s and {running} runs in {places} places"


def handler_limit_is_never_exceeded(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 5e: at most `max_sessions` runs of a pool's handler are in progress at once."""
    for node in case.trace.nodes:
        limit = node.pool.max_sessions
        if limit is None or node.child:
            continue
        runs = [run for run in case.trace.runs if run.node is node]
        for run in runs:
            concurrent = sum(one.started <= run.started < one.ended for one in runs)
            if concurrent > limit:
                yield f"{_describe_run(run)} was one of {concurrent} runs of a handler for {limit}"


def shared_slots_are_never_exceeded(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 5f: polls in flight and handler runs together never exceed the shared slots."""
    total = case.trace.shared_slots
    if total is None:
        return
    polls = [call for call in case.trace.sent if call.op == "poll" and call.node.share is not None]
    runs = [run for run in case.trace.runs if run.node.share is not None]
    for call in polls:
        at = call.at
        in_flight = sum(
            one.at <= at < min(one.answered_at, _time_when_slots_are_freed(one.node))
            for one in polls
        )
        running = sum(
            run.started <= at < min(run.ended, _time_when_slots_are_freed(run.node)) for run in runs
        )
        if in_flight + running > total:
            yield f"{call}: {in_flight} polls and {running} runs in {total} shared slots"


def _time_when_slots_are_freed(node: PoolProcess) -> float:
    """Return when the pool begins to drain, closes or crashes, and so may free its slots."""
    drain = FOREVER if node.drain is None else node.drain[0]
    return min(node.crashed, node.closed, drain)


def closed_pools_hold_no_shared_slots(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 5g: a pool that has ended holds no slot that it shared with other pools."""
    for node in case.trace.nodes:
        if node.share is not None and node.closed != FOREVER and node.share.taken:
            yield f"{node.machine.name} has {node.share.taken} shared slots after its end"


def claims_never_exceed_exit_limit(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 5c: a pool claims at most `exit_after_sessions` sessions, and then ends."""
    for node in case.trace.nodes:
        limit = node.pool.exit_after_sessions
        if limit is None or node.child:
            continue
        ends = {
            event.session: at for at, event in node.events if isinstance(event, SessionFinished)
        }
        claimed = {event.session for _, event in node.events if _is_event_of_claimed_session(event)}
        if len(claimed) > limit:
            yield f"{node.machine.name} claimed {len(claimed)} of {limit} sessions"
        if len(claimed) == limit and claimed <= ends.keys() and node.crashed == FOREVER:
            ended = max(ends.values())
            if node.closed - ended > CLOSE_SECONDS + node.seconds_of_machine_halts(ended, FOREVER):
                yield f"{node.machine.name} closed {node.closed - ended:.1f} s after its sessions"


def nothing_is_claimed_during_a_pause(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 5d: a pool receives no item while it is paused."""
    for node in case.trace.nodes:
        for number, (since, until) in enumerate(node.refrains):
            # A later pause replaces an earlier one, even if the later one ends sooner.
            end = min([until, *(start for start, _ in node.refrains[number + 1 :])])
            for at, event in node.events:
                if isinstance(event, ItemReceived) and since < at < end - MARGIN_SECONDS:
                    yield f"{node.machine.name} took {event.item.id} in a pause, at {at:.3f}"


def _is_event_of_claimed_session(event: Event) -> TypeGuard[SessionStarted | SessionFinished]:
    """Return whether the event proves that the pool claimed the event's session.

    A session whose lease was lost before the session started does not count as claimed.
    """
    return isinstance(event, SessionStarted) or (
        isinstance(event, SessionFinished) and event.outcome != "lease_lost"
    )


def drains_end_in_time(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 6a: a drain ends at most 5 s after its timeout, even if handlers or calls hang."""
    for node in case.trace.nodes:
        if node.drain is None or node.crashed < FOREVER:
            continue
        began, timeout = node.drain
        halted = sum(max(0.0, until - max(since, began)) for since, until in node.machine.pauses)
        if min(node.drained, node.closed) - began > timeout + DRAIN_SECONDS + halted:
            yield f"{node.machine.name} drained in {node.drained - began:.1f} s of {timeout:.1f}"
        if node.closed - began > timeout + DRAIN_SECONDS + CLOSE_SECONDS + halted:
            yield f"{node.machine.name} closed after {node.closed - began:.1f} s"


def drains_abandon_only_handlers_that_ignore_cancellation(
    case: FinishedSimulation,
) -> Iterator[str]:
    """Invariant 6c: without faults, a drain abandons only handlers that ignore cancellation."""
    for node in case.trace.nodes:
        stubborn = sum(
            run.node is node
            and run.behaviour in IGNORES_CANCELLATION
            and run.ended > run.cancelled_at
            for run in case.trace.runs
        )
        if node.abandoned > stubborn and not (
            node.machine.pauses or _had_unanswered_calls(case, node)
        ):
            yield f"{node.machine.name} abandoned {node.abandoned} sessions, {stubborn} stubborn"


def _had_unanswered_calls(case: FinishedSimulation, node: PoolProcess) -> bool:
    """Return whether a fault or a missing connection delayed a call at the end of the drain."""
    return any(
        delay.node is node and delay.until >= node.closed - DRAIN_SECONDS
        for delay in case.trace.delays
    ) or any(
        call.node is node
        and call.op != "poll"
        and call.fault is not None
        and call.at <= node.closed
        and call.latest_effect_time >= node.closed - DRAIN_SECONDS
        for call in case.trace.sent
    )


def closed_pools_own_no_items_and_run_no_handlers(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 6b: a closed pool has released its items, runs no handler and sends nothing."""
    for node, lease in case.all_leases():
        if lease.ended <= node.closed or node.abandoned or node.crashed < FOREVER:
            continue
        if (
            lease.settled
            and lease.last_granted_lease_end > node.closed + RELEASED_SECONDS
            and not case.pool_had_fault_during_lease(node, lease, node.closed)
            # A pool whose ack was answered with `active` does not know whether it owns the item, so
            # it may close without a release.
            and not case.is_item_owner_uncertain(node, lease.work_id, node.closed)
        ):
            yield f"{lease.work_id} is held by {node.machine.name}, which has closed"
    for call in case.trace.sent:
        if call.at > call.node.closed:
            yield f"{call} was sent by a pool that had closed"
    for run in case.trace.runs:
        if run.ended > run.node.closed and not run.node.abandoned:
            yield f"{_describe_run(run)} continues in a pool that has closed"


def pools_and_pollers_do_not_crash(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 10: a pool ends only after a drain or a refused call, and no poller crashes."""
    for node in case.trace.nodes:
        allowed = ControlPlaneError if node.child else RefusedError
        if node.error is not None and not isinstance(node.error, allowed):
            yield f"{node.machine.name} failed: {node.error!r}"
        for _, event in node.events:
            if isinstance(event, PollerRestarted):
                yield f"{node.machine.name}: a poller crashed: {event.error!r}"


def _has_pool_stopped_claiming(node: PoolProcess, at: float) -> bool:
    return node.error is not None or (node.drain is not None and node.drain[0] <= at)


def _machine_was_halted_shortly_before(node: PoolProcess, at: float, more: float = 0.0) -> bool:
    slack = CHECK_SECONDS + MARGIN_SECONDS + more
    return any(since <= at <= until + slack for since, until in node.machine.pauses)


def _describe_run(run: HandlerRun) -> str:
    return f"{run.node.machine.name}:{run.behaviour}({run.work_id[-6:]})@{run.started:.3f}"


INVARIANTS: Final[tuple[Invariant, ...]] = (
    every_item_is_stopped_in_the_end,
    handlers_run_under_a_lease,
    no_two_handlers_run_one_item,
    no_two_handlers_run_one_session,
    nothing_is_sent_without_the_lease,
    nothing_is_sent_after_an_answer_that_ends_the_lease,
    only_heartbeats_are_sent_until_owner_of_item_is_known,
    nothing_is_sent_during_a_handoff,
    only_a_child_process_takes_over_an_item,
    parent_writes_nothing_after_a_handoff,
    items_are_stopped_only_after_handler_end_or_request,
    items_are_stopped_soon_after_handler_end,
    every_acknowledged_item_is_handled,
    claims_and_runs_never_exceed_concurrency,
    claims_never_exceed_exit_limit,
    shared_slots_are_never_exceeded,
    closed_pools_hold_no_shared_slots,
    handler_limit_is_never_exceeded,
    nothing_is_claimed_during_a_pause,
    drains_end_in_time,
    drains_abandon_only_handlers_that_ignore_cancellation,
    closed_pools_own_no_items_and_run_no_handlers,
    pools_and_pollers_do_not_crash,
    completions_get_permits_before_new_claims,
    acks_do_not_wait_for_permits,
    pools_back_off_after_refused_acks,
    claims_pause_after_repeated_handler_failures,
    handlers_that_ignore_cancellation_are_cancelled_again,
    handlers_without_progress_are_cancelled,
    sessions_with_progress_do_not_end_as_stalled,
    nothing_is_written_after_a_pause_until_the_lease_is_verified,
    heartbeats_of_an_item_do_not_overlap,
    writes_time_out_early_enough_to_be_sent_again,
    sessions_share_no_context_variables,
    refused_optional_calls_are_not_repeated,
    clients_are_used_on_the_loop_that_created_them,
    completions_are_retried_until_shortly_before_lease_end,
    outcomes_agree_with_history,
    pools_do_not_own_items_that_they_report_as_lost,
    metrics_agree_with_calls,
    all_received_items_are_reported,
    attempts_are_counted,
    runs_that_lost_their_lease_are_counted,
    released_items_have_a_release_mark,
    no_item_has_a_release_mark_and_an_error,
    failed_calls_are_repeated,
    retries_are_bounded,
    no_retry_begins_after_a_drain_or_stop_request,
    retry_number_is_stored_for_the_next_run,
)


def check_invariants(case: FinishedSimulation) -> list[str]:
    """Return a description of each violation; empty if every invariant holds."""
    return [f"{each.__name__}: {text}" for each in INVARIANTS for text in each(case)]
