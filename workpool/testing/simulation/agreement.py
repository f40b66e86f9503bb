"""7. What a pool says of itself, by its events and its metrics, agrees with what happened."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from workpool.events import (
    AckFinished,
    ItemClaimed,
    ItemDeclined,
    ItemReclaimed,
    PollFinished,
    SessionFinished,
    SessionStarted,
    StopFinished,
    StopRequested,
)
from workpool.testing.simulation.trace import FOREVER

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from workpool.events import Event
    from workpool.testing.simulation.case import Case, Tenure
    from workpool.testing.simulation.trace import Node, Run

_EXPECTED: Final = {"returned": "completed", "raised": "failed", "released": "released"}
_COUNTED: Final[Mapping[type[Event], tuple[str, str]]] = {
    SessionFinished: ("sessions_total", "outcome"),
    AckFinished: ("acks_total", "result"),
    StopFinished: ("stops_total", "result"),
    ItemClaimed: ("items_received_total", "origin"),
    ItemReclaimed: ("reclaims_total", "direction"),
}
"""Which counter an event feeds, and by which of its attributes."""
GIVE_UP_SECONDS: Final = 4.0
"""Before the lease's end: a tenth of the longest, and what a last try may take."""


def outcomes_agree(case: Case) -> Iterator[str]:
    """7a. Every acknowledged session ends in one outcome, and it is what happened."""
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
            tenure = case.tenure(node, event.session.item.id, at)
            if tenure is None:
                if not node.child or event.outcome in {"completed", "failed", "timed_out"}:
                    yield f"{node.machine.name}: finished what it never had"
                continue
            words = _contradiction(case, node, tenure, event.outcome, at)
            if words:
                work_id = tenure.work_id[-6:]
                yield f"{node.machine.name}: {work_id} is {event.outcome} at {at:.3f}, but {words}"


def losses_are_true(case: Case) -> Iterator[str]:
    """7c. What is counted as lost to another worker is not this pool's any more."""
    for node in case.trace.nodes:
        for at, event in node.events:
            if not isinstance(event, ItemReclaimed) or event.direction != "lost":
                continue
            tenure = case.tenure(node, event.item.id, at)
            if tenure is None or tenure.usurper is not None or event.stage == "ack":
                continue
            if tenure.ended > at and not _acked_again(case, node, tenure, at):
                yield f"{node.machine.name}: {tenure.work_id[-6:]} is not lost at {at:.3f}"


def _acked_again(case: Case, node: Node, tenure: Tenure, at: float) -> bool:
    """Whether an ack of a later delivery was refused, or one applied that was given up before."""
    return any(
        call.answered_at == at or call.answered_at < tenure.began <= call.arrives_at + 0.01
        for call in case.sent[node, tenure.work_id]
        if call.op == "ack"
    )


def _contradiction(case: Case, node: Node, tenure: Tenure, outcome: str, at: float) -> str | None:
    run = case.run_of(node, tenure)
    handed = tenure.how == "detached" and tenure.ended <= at
    if handed != (outcome == "detached") and not (case.disturbed(node, tenure) or node.left_behind):
        return "a child has taken it" if handed else "no child has taken it"
    match outcome:
        case "completed" | "timed_out" if not (
            _stopped_by(case, tenure, at) or case.broken(tenure)
        ):
            return "it is not stopped"
        case "completed" if run is None or run.result != "returned":
            return "its handler has not returned"
        case "timed_out" if node.pool.session_timeout is None:
            return "there is no timeout"
        case "stopped" if not _ended_by_others(case, node, tenure, at):
            return "nobody else has ended it"
        case "lease_lost" if not case.disturbed(node, tenure) and not _over(tenure, at):
            return f"its lease was promised until {tenure.promised(at):.3f}"
        case "released" if _stopped_by(case, tenure, at) and not case.disturbed(node, tenure):
            return "it is stopped"
        case _:
            return _unexpected(case, node, tenure, run, outcome)


def _stopped_by(case: Case, tenure: Tenure, at: float) -> bool:
    stopped = case.stopped.get(tenure.work_id)
    return stopped is not None and stopped.time <= at


def _unexpected(
    case: Case, node: Node, tenure: Tenure, run: Run | None, outcome: str
) -> str | None:
    """What an undisturbed handler's end must come to."""
    if run is None or run.told_at < FOREVER or case.disturbed(node, tenure):
        return None
    if min(tenure.stop_wished, _ended_by_operator(tenure)) <= run.ended + 1:
        return None
    expected = "failed" if run.play == "odd" else _EXPECTED.get(str(run.result))
    return None if expected in {None, outcome} else f"its handler has {run.result}"


def _ended_by_operator(tenure: Tenure) -> float:
    foreign = tenure.how == "stopped" and tenure.stopped_by != tenure.worker_id
    return tenure.ended if foreign else FOREVER


def _ended_by_others(case: Case, node: Node, tenure: Tenure, at: float) -> bool:
    stopped = case.stopped.get(tenure.work_id)
    foreign = stopped is not None and stopped.worker_id != node.worker_id and stopped.time <= at
    if foreign or tenure.stop_wished <= at:
        return True
    # A stop of ours that was sent in an earlier tenure and arrived in this one.
    return any(
        call.op == "stop" and call.at < tenure.began for call in case.sent[node, tenure.work_id]
    )


def _over(tenure: Tenure, at: float) -> bool:
    return tenure.ended <= at or tenure.promised(at) - GIVE_UP_SECONDS <= at


def metrics_agree(case: Case) -> Iterator[str]:
    """7b. The counters of all pools together say what the network saw."""
    told = {key: value for key, value in case.counted.items() if value}
    for key, seen in _seen(case).items():
        if told.get(key, 0) != seen:
            yield f"{' '.join(key)} is {told.get(key, 0):g}, but there were {seen}"


def _seen(case: Case) -> Counter[tuple[str, ...]]:
    seen: Counter[tuple[str, ...]] = Counter()
    for call in case.trace.sent:
        if call.answered_at < FOREVER:
            seen["http_requests_total", call.op] += 1
        if call.op == "poll" and call.answer == "ok":
            seen["polls_total", "null" if call.told is None else "item"] += 1
    _count_events(case, seen)
    return seen


def _count_events(case: Case, seen: Counter[tuple[str, ...]]) -> None:
    for node in case.trace.nodes:
        for _, event in node.events:
            if type(event) in _COUNTED:
                name, label = _COUNTED[type(event)]
                seen[name, getattr(event, label)] += 1
    for node in case.trace.nodes:
        if node.crashed == FOREVER:
            _check_events(case, node, seen)


def _check_events(case: Case, node: Node, seen: Counter[tuple[str, ...]]) -> None:
    """Count what the pool's events say, under names of their own."""
    runs = sum(run.node is node and run.play != "alone" for run in case.trace.runs)
    started = sum(isinstance(event, SessionStarted) for _, event in node.events)
    if runs != started:
        seen[node.machine.name, "sessions started"] = runs
    polls = sum(isinstance(event, PollFinished) for _, event in node.events)
    if polls != node.polls:
        seen[node.machine.name, "polls"] = node.polls


def nothing_goes_uncounted(case: Case) -> Iterator[str]:
    """7d. What a pool was told, it tells: items, reclaims, beats, requests to stop."""
    for node in case.trace.nodes:
        if node.crashed < FOREVER or node.child:
            continue
        for what, told, least, most in _tallies(case, node):
            if not least <= told <= most:
                yield f"{node.machine.name}: {told} {what}, not {least} to {most}"
    started = sum(
        isinstance(event, SessionStarted) for node in case.trace.nodes for _, event in node.events
    )
    sent = sum(call.op == "heartbeat" for call in case.trace.sent)
    if not started <= (beats := case.counted.get(("heartbeats_total", "ok"), 0)) <= sent:
        yield f"{beats:g} good beats, not {started} to {sent}"


def _tallies(case: Case, node: Node) -> Iterator[tuple[str, int, int, float]]:
    """What, how often it was told, and the least and the most that is true."""
    events = [event for _, event in node.events]
    claimed = [(at, event) for at, event in node.events if isinstance(event, ItemClaimed)]
    leaving = 0.0 if node.error is not None else node.drain[0] if node.drain else FOREVER
    brought = [
        call.answered_at
        for call in case.trace.sent
        if call.node is node and call.op == "poll" and call.answer == "ok" and call.told
    ]
    yield "items", len(claimed), sum(at < leaving for at in brought), len(brought)
    declined = {(at, e.item.id) for at, e in node.events if isinstance(e, ItemDeclined)}
    gained = sum(
        event.origin != "duplicate" and (at, event.item.id) not in declined
        for at, event in claimed
        if event.item.acknowledged_at or event.item.last_heartbeat
    )
    reclaims = [event.direction for event in events if isinstance(event, ItemReclaimed)]
    yield "items gained", reclaims.count("gained"), gained, gained
    conflicts = sum(isinstance(e, AckFinished) and e.result == "conflict" for e in events)
    yield "items lost", reclaims.count("lost"), conflicts, FOREVER
    asked = {e.item.id for e in events if isinstance(e, StopRequested)}
    confirmed = {e.item.id for e in events if isinstance(e, StopFinished) and e.mode == "confirm"}
    yield "requests to stop", len(confirmed & asked), len(confirmed), FOREVER
