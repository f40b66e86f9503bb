"""The promise, as functions of the control plane's history and the trace.

Each yields what breaks it, in words. MARGIN_SECONDS is what clocks that run 100 ppm apart come to
over a lease of 60 s, and the network's latency.
"""

from __future__ import annotations

from http import HTTPStatus
from itertools import combinations
from typing import TYPE_CHECKING, Final

from workpool.errors import ControlPlaneError, RefusedError
from workpool.events import PollerRestarted
from workpool.testing.simulation.agreement import (
    losses_are_true,
    metrics_agree,
    nothing_goes_uncounted,
    outcomes_agree,
)
from workpool.testing.simulation.attempts import (
    attempts_are_counted,
    no_mark_stands_beside_an_error,
    what_is_released_is_marked,
)
from workpool.testing.simulation.case import WRITES
from workpool.testing.simulation.handovers import (
    a_handover_is_silent,
    only_a_child_takes_over,
    what_is_handed_over_is_let_go,
)
from workpool.testing.simulation.order import (
    a_try_leaves_time_for_another,
    acks_do_not_wait,
    cancellations_are_repeated,
    completions_go_first,
    failing_handlers_claim_slowly,
    nothing_is_sent_in_doubt,
    one_heartbeat_at_a_time,
    refused_acks_are_backed_off,
    sessions_share_no_context,
)
from workpool.testing.simulation.trace import FOREVER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from workpool.testing.simulation.case import Case, Tenure
    from workpool.testing.simulation.trace import Node, Run, Sent

    Invariant = Callable[[Case], Iterator[str]]

MARGIN_SECONDS: Final = 0.05
GIVE_UP_SECONDS: Final = 1.0
"""A handler is cancelled at least this long before its lease's end (design §1)."""
TICK_SECONDS: Final = 5.0
"""How often the simulated keeper looks whether its machine has slept."""
TIDY_SECONDS: Final = 1.0
RELEASED_SECONDS: Final = 12.5
"""The longest delay of a release here, and a little."""
DRAIN_SECONDS: Final = 6.0
"""What a drain may take beyond its timeout: 5 s for the finish, and what its ends wait for."""
CLOSE_SECONDS: Final = 11.0
HEEDLESS: Final = frozenset({"stubborn", "swallow"})
"""Handlers that ignore a cancellation."""
DECIDED: Final = frozenset({"ok", 400, 401, 403, 404, 409, 412})


def every_item_ends_stopped(case: Case) -> Iterator[str]:
    """1. No session is lost."""
    for work_id in {record.work_id for record in case.history}:
        if work_id not in case.stopped:
            yield f"{work_id} is not stopped"


def handlers_run_under_a_promise(case: Case) -> Iterator[str]:
    """2a. From its start until it is told to end, a handler's lease is promised to its pool.

    It is told at least a second before the end. A machine that stood still may tell it late, by no
    more than its keeper's tick.
    """
    for run in case.trace.runs:
        tenure = case.tenure(run.node, run.work_id, run.started)
        if tenure is None:
            yield f"{_name(run)} started without a lease"
            continue
        if not any(
            call.op == "heartbeat" and call.answer == "ok" and call.answered_at <= run.started
            for call in case.sent[run.node, run.work_id]
            if call.answered_at >= tenure.began
        ):
            yield f"{_name(run)} started before a beat was answered"
        if _starts_too_late(case, tenure, run):
            yield f"{_name(run)} started; promised until {tenure.promised(run.started):.3f}"
        told = run.obeyed_at
        limit = tenure.promised(told) - GIVE_UP_SECONDS + MARGIN_SECONDS
        excused = (
            _just_woken(run.node, told)
            or case.usurped(run.node, run.work_id)
            or run.node.paused_unseen(tenure.began, told)
        )
        if told > limit and not excused:
            yield f"{_name(run)} ran until {told:.3f}, promised until {limit:.3f}"


def _starts_too_late(case: Case, tenure: Tenure, run: Run) -> bool:
    late = run.started > tenure.promised(run.started) + MARGIN_SECONDS and run.play != "alone"
    return late and not case.usurped(run.node, run.work_id)


def no_two_handlers_run_one_item(case: Case) -> Iterator[str]:
    """2b. No two handlers run one item at once.

    But for one that ignores its cancellation, one whose machine stood still, and one whose lease
    was ended before the promised time.
    """
    for runs in case.runs.values():
        for one, two in combinations(sorted(runs, key=lambda run: run.started), 2):
            if two.started < one.ended and not _may_overlap(case, one, two):
                yield f"{_name(one)} and {_name(two)} ran at once"


def _may_overlap(case: Case, one: Run, two: Run) -> bool:
    if one.node is two.node:
        return False
    tenures = [case.tenure(run.node, run.work_id, run.started) for run in (one, two)]
    broken = any(tenure is not None and case.broken(tenure) for tenure in tenures)
    told = one.told_at <= two.started and one.play in HEEDLESS
    unseen = one.node.paused_unseen(one.started, two.started)
    return told or broken or unseen or _just_woken(one.node, two.started, TIDY_SECONDS)


def no_two_handlers_run_one_session(case: Case) -> Iterator[str]:
    """2c. A pool does not run two items of one session at once."""
    for one, two in combinations(case.trace.runs, 2):
        same = one.session_id == two.session_id and one.node is two.node
        if same and max(one.started, two.started) < min(one.ended, two.ended):
            yield f"{_name(one)} and {_name(two)} are of one session"


def nothing_is_sent_without_the_lease(case: Case) -> Iterator[str]:
    """3a. Beats, stops and metadata are sent while the lease is promised, whatever befell."""
    for call in case.trace.sent:
        if call.op not in WRITES or call.work_id is None:
            continue
        tenure = case.tenure(call.node, call.work_id, call.at)
        if tenure is None:
            if call.op != "heartbeat" or not call.node.child:
                yield f"{call} was sent without a lease"
        elif call.at > tenure.promised(call.at) + MARGIN_SECONDS and not (
            _verifies(case, tenure, call)
        ):
            yield f"{call} was sent; promised until {tenure.promised(call.at):.3f}"


def _verifies(case: Case, tenure: Tenure, call: Sent) -> bool:
    """Whether this is the heartbeat after a pause that the lease clock does not show.

    It names the one before it, so that it cannot take another worker's item.
    """
    begun = any(
        each.op == "heartbeat"
        and each.answer == "ok"
        and tenure.began < each.answered_at <= call.at
        for each in case.sent[call.node, tenure.work_id]
    )
    return call.op == "heartbeat" and begun and call.node.paused_unseen(tenure.began, call.at)


def nothing_is_sent_after_the_news(case: Case) -> Iterator[str]:
    """3b. Nor after an answer that said that the item is stopped, or somebody else's."""
    for (node, work_id), calls in case.sent.items():
        for tenure in case.tenures.get(work_id, ()):
            if tenure.worker_id != node.worker_id:
                continue
            following = [  # a child's begins with its first call, not with its ack
                call
                for call in calls
                if node.child or case.tenure(node, work_id, call.at) is tenure
            ]
            news = min((_news(call, following, tenure) for call in following), default=FOREVER)
            for call in following:
                if call.op in WRITES and call.at > news:
                    yield f"{call} was sent; over since {news:.3f}"


def _news(call: Sent, calls: list[Sent], tenure: Tenure) -> float:
    """When this call's answer said that the tenure is over; never, mostly."""
    if call.trouble is not None and call.trouble.answer is not None:
        return FOREVER
    over = call.op == "stop" and call.answer == "ok"
    if call.op == "heartbeat" and call.answer == HTTPStatus.PRECONDITION_FAILED:
        before = [each for each in calls if each.op in {"heartbeat", "get"} and each.at < call.at]
        # Between parent and child it leaves open whose the item is: 3f says what follows.
        lent = tenure.how == "detached" or (
            call.node.child and not any(each.answer == "ok" for each in before)
        )
        over = not lent and all(each.answer in DECIDED for each in before)
    if call.op == "get" and call.answer == "ok":
        state = getattr(call.told, "state", None)
        over = state in {"stopped", "queued"}
    return call.answered_at if over and call.answered_at >= tenure.began else FOREVER


def stops_are_justified(case: Case) -> Iterator[str]:
    """3c. A pool stops what its handler has finished, or what an operator wants ended."""
    for call in case.trace.sent:
        if call.op != "stop" or call.work_id is None:
            continue
        tenure = case.tenure(call.node, call.work_id, call.at)
        if tenure is not None and tenure.stop_wished > call.at:  # without one: 3a
            run = case.run_of(call.node, tenure)
            if words := _unjustified(call, run):
                yield f"{call} was sent {words}"
        elif tenure is not None:
            run = case.run_of(call.node, tenure)
            if run is not None and call.at < run.ended:
                yield f"{call} was sent while its handler ran"


def _unjustified(call: Sent, run: Run | None) -> str | None:
    """What is wrong with a stop that no operator asked for."""
    if run is None:
        return "for what had not run"
    if call.at < run.ended:
        return "while its handler ran"
    if run.result == "cancelled" and call.node.pool.session_timeout is not None:
        return None
    untouched = run.result in {"released", "cancelled"}
    return f"for what was {run.result}" if untouched else None


def an_item_completes_once(case: Case) -> Iterator[str]:
    """4. What a handler has finished is stopped at once, unless something befell its pool."""
    for node, tenure in case.all_tenures():
        run = case.run_of(node, tenure)
        if run is None or run.told_at < FOREVER or run.result not in {"returned", "raised"}:
            continue
        if case.disturbed(node, tenure) or _leaving(node, run.ended):
            continue
        if tenure.how != "stopped" or tenure.ended > run.ended + 1:
            yield f"{_name(run)} was {run.result}, but not stopped"


def what_is_acked_is_run(case: Case) -> Iterator[str]:
    """5a. Unless the pool is going away, or the item was stopped meanwhile."""
    for node, tenure in case.all_tenures():
        if case.run_of(node, tenure) is not None or case.disturbed(node, tenure):
            continue
        wished = min(tenure.stop_wished, tenure.ended if tenure.how == "stopped" else FOREVER)
        if not _leaving(node, tenure.began + 1) and wished > tenure.began + 1:
            yield f"{tenure.work_id} was acked by {node.machine.name} and not run"


def no_more_is_claimed_than_can_be_run(case: Case) -> Iterator[str]:
    """5b. Polls under way and handlers that run are no more than the places for them."""
    for node in case.trace.nodes:
        calls = [call for call in case.trace.sent if call.node is node]
        runs = [run for run in case.trace.runs if run.node is node]
        pool = node.pool
        for op, places in (("poll", pool.concurrency + pool.prefetch), ("ack", pool.concurrency)):
            of_op = [call for call in calls if call.op == op]
            for call in of_op:
                under_way = sum(one.at <= call.at < one.answered_at for one in of_op)
                running = sum(run.started <= call.at < run.ended for run in runs)
                if under_way + running > places:
                    yield f"{call}: {under_way} {op}s and {running} runs in {places} places"


def drains_end_in_time(case: Case) -> Iterator[str]:
    """6a. Within their timeout and 5 s, whatever a handler or the network does."""
    for node in case.trace.nodes:
        if node.drain is None or node.crashed < FOREVER:
            continue
        began, timeout = node.drain
        stood = sum(max(0.0, until - max(since, began)) for since, until in node.machine.pauses)
        if min(node.drained, node.closed) - began > timeout + DRAIN_SECONDS + stood:
            yield f"{node.machine.name} drained in {node.drained - began:.1f} s of {timeout:.1f}"
        if node.closed - began > timeout + DRAIN_SECONDS + CLOSE_SECONDS + stood:
            yield f"{node.machine.name} closed after {node.closed - began:.1f} s"


def only_stubborn_handlers_are_left_behind(case: Case) -> Iterator[str]:
    """6c. Whatever heeds its cancellation, and its finish, fits into a drain that is answered."""
    for node in case.trace.nodes:
        stubborn = sum(
            run.node is node and run.play in HEEDLESS and run.ended > run.told_at
            for run in case.trace.runs
        )
        if node.left_behind > stubborn and not (node.machine.pauses or _unanswered(case, node)):
            yield f"{node.machine.name} left {node.left_behind} behind, {stubborn} stubborn"


def _unanswered(case: Case, node: Node) -> bool:
    """Whether something befell the pool's calls in the last seconds of its drain."""
    return any(
        delay.node is node and delay.until >= node.closed - DRAIN_SECONDS
        for delay in case.trace.delays
    ) or any(
        call.node is node
        and call.op != "poll"
        and call.trouble is not None
        and call.at <= node.closed
        and call.over_at >= node.closed - DRAIN_SECONDS
        for call in case.trace.sent
    )


def drains_leave_nothing_behind(case: Case) -> Iterator[str]:
    """6b. What a pool that has closed still holds was released; nothing of it runs or is sent."""
    for node, tenure in case.all_tenures():
        if tenure.ended <= node.closed or node.left_behind or node.crashed < FOREVER:
            continue
        if tenure.last_promise > node.closed + RELEASED_SECONDS and not case.disturbed(
            node, tenure, node.closed
        ):
            yield f"{tenure.work_id} is held by {node.machine.name}, which has closed"
    for call in case.trace.sent:
        if call.at > call.node.closed:
            yield f"{call} was sent by a pool that had closed"
    for run in case.trace.runs:
        if run.ended > run.node.closed and not run.node.left_behind:
            yield f"{_name(run)} runs on in a pool that has closed"


def nothing_crashes(case: Case) -> Iterator[str]:
    """A pool ends by a drain, or because it was refused; a poller that crashes is a bug."""
    for node in case.trace.nodes:
        allowed = ControlPlaneError if node.child else RefusedError
        if node.error is not None and not isinstance(node.error, allowed):
            yield f"{node.machine.name} failed: {node.error!r}"
        for _, event in node.events:
            if isinstance(event, PollerRestarted):
                yield f"{node.machine.name}: a poller crashed: {event.error!r}"


def _leaving(node: Node, at: float) -> bool:
    return node.error is not None or (node.drain is not None and node.drain[0] <= at)


def _just_woken(node: Node, at: float, more: float = 0.0) -> bool:
    slack = TICK_SECONDS + MARGIN_SECONDS + more
    return any(since <= at <= until + slack for since, until in node.machine.pauses)


def _name(run: Run) -> str:
    return f"{run.node.machine.name}:{run.play}({run.work_id[-6:]})@{run.started:.3f}"


INVARIANTS: Final[tuple[Invariant, ...]] = (
    every_item_ends_stopped,
    handlers_run_under_a_promise,
    no_two_handlers_run_one_item,
    no_two_handlers_run_one_session,
    nothing_is_sent_without_the_lease,
    nothing_is_sent_after_the_news,
    a_handover_is_silent,
    only_a_child_takes_over,
    what_is_handed_over_is_let_go,
    stops_are_justified,
    an_item_completes_once,
    what_is_acked_is_run,
    no_more_is_claimed_than_can_be_run,
    drains_end_in_time,
    only_stubborn_handlers_are_left_behind,
    drains_leave_nothing_behind,
    nothing_crashes,
    completions_go_first,
    acks_do_not_wait,
    refused_acks_are_backed_off,
    failing_handlers_claim_slowly,
    cancellations_are_repeated,
    nothing_is_sent_in_doubt,
    one_heartbeat_at_a_time,
    a_try_leaves_time_for_another,
    sessions_share_no_context,
    outcomes_agree,
    losses_are_true,
    metrics_agree,
    nothing_goes_uncounted,
    attempts_are_counted,
    what_is_released_is_marked,
    no_mark_stands_beside_an_error,
)


def judge(case: Case) -> list[str]:
    """Return what breaks which invariant; empty: the promise was kept."""
    return [f"{each.__name__}: {words}" for each in INVARIANTS for words in each(case)]
