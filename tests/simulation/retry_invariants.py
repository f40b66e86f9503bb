"""Invariants 11: retries, the further calls of a handler in the same session run after an error."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

from tests.simulation.attempt_invariants import has_late_note_write, list_note_writes
from tests.simulation.scripted_handlers import RETRY
from tests.simulation.trace import FOREVER
from workpool.events import DrainStarted, HandlerRetried, SessionFinished, StopRequested

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.simulation.finished_simulation import FinishedSimulation, GrantedLease
    from tests.simulation.trace import HandlerRun, PoolProcess

MARGIN_SECONDS: Final = 0.05
_RELEASED: Final = "workpool.released"
_RETRIES: Final = "workpool.retries"


def failed_calls_are_repeated(case: FinishedSimulation) -> Iterator[str]:
    """11a. After an error the handler is called again during the lease, within the retry delay."""
    for node, lease in case.all_leases():
        runs = _list_handler_calls(case, node, lease)
        for number, (run, following) in enumerate(pairwise([*runs, None])):
            if run is None or run.result != "retried":
                continue
            until = run.ended + min(RETRY.backoff * 2.0**number, RETRY.backoff_max) + MARGIN_SECONDS
            until += node.halted_seconds(run.ended, FOREVER)
            if following is None:
                if not _may_have_ended_before(case, node, lease, until):
                    yield f"{_run_name(run)} failed, and is not called again until {until:.3f}"
            elif following.retry != run.retry + 1 or following.started > until:
                yield f"{_run_name(run)} failed, and is called again only as {_run_name(following)}"


def retries_are_bounded(case: FinishedSimulation) -> Iterator[str]:
    """11b. No handler call has a retry number beyond the limit `Retry.times`."""
    for run in case.trace.runs:
        if run.retry > RETRY.times:
            yield f"{_run_name(run)} is one call too many"


def retries_end_with_the_pool_and_the_session(case: FinishedSimulation) -> Iterator[str]:
    """11d. No handler is called again after a drain began or an operator asked to stop."""
    for node in case.trace.nodes:
        drained = False
        stopping: set[str] = set()
        for at, event in node.events:
            match event:
                case DrainStarted():
                    drained = True
                case StopRequested(item=item):
                    stopping.add(item.id)
                case SessionFinished(session=session):
                    stopping.discard(session.item.id)
                case HandlerRetried(session=session):
                    if drained or session.item.id in stopping:
                        yield f"{node.machine.name}: {session.id[-6:]} is called again at {at:.3f}"


def retry_number_continues_in_the_next_run(case: FinishedSimulation) -> Iterator[str]:
    """11c. A released run stores its next retry number, with which the next run begins."""
    for work_id, runs in case.runs.items():
        if has_late_note_write(case, work_id) or not any(run.behaviour == "retry" for run in runs):
            continue
        for lease in case.leases.get(work_id, ()):
            node = case.node_of_lease(lease)
            calls = _list_handler_calls(case, node, lease)
            if not calls:
                continue
            left = _stored_retry_number(case, work_id, lease.began)
            if calls[0].retry != left:
                yield f"{_run_name(calls[0])} is the first call, but {left} was left to it"
            expected = calls[-1].retry + (calls[-1].result == "retried")
            if (
                _was_released(case, node, lease)
                and _stored_retry_number(case, work_id, lease.ended) != expected
            ):
                yield f"{_run_name(calls[-1])} was released without {expected} for the next run"


def _list_handler_calls(
    case: FinishedSimulation, node: PoolProcess, lease: GrantedLease
) -> list[HandlerRun]:
    """Return the calls of the retrying handler during a lease, in order."""
    return [
        run
        for run in case.runs[lease.work_id]
        if run.node is node
        and run.behaviour == "retry"
        and case.lease_at(node, lease.work_id, run.started) is lease
    ]


def _may_have_ended_before(
    case: FinishedSimulation, node: PoolProcess, lease: GrantedLease, until: float
) -> bool:
    """Return whether anything may have ended the session before the next call."""
    drains = [at for at, event in node.events if isinstance(event, DrainStarted)]
    return (
        node.error is not None
        or min(drains, default=FOREVER) <= until
        or node.crashed <= until
        or node.pool.session_timeout is not None
        or lease.stop_requested <= until
        or (lease.end_kind == "stopped" and lease.stopped_by != lease.worker_id)
        or case.had_fault_during_lease(node, lease)
    )


def _was_released(case: FinishedSimulation, node: PoolProcess, lease: GrantedLease) -> bool:
    """Return whether a pool that may write metadata released the session without a fault."""
    return (
        lease.stop_requested == FOREVER
        and not case.had_fault_during_lease(node, lease)
        and not node.abandoned
        and not node.pool.worker_key
        and case.permission_denied_at(node, "update") == FOREVER
        and any(
            isinstance(event, SessionFinished)
            and event.session.item.id == lease.work_id
            and event.outcome == "released"
            and lease.began <= at <= lease.ended
            for at, event in node.events
        )
    )


def _stored_retry_number(case: FinishedSimulation, work_id: str, at: float) -> int:
    """Return the next retry number that the item's metadata had at the time `at`."""
    standing: dict[str, str] = {}
    for call in list_note_writes(case, work_id):
        if call.arrives_at > at:
            break
        for key, value in call.patch.items():
            standing.pop(key, None)
            if value is not None:
                standing[key] = value
    return int(standing.get(_RETRIES, "0")) if _RELEASED in standing else 0


def _run_name(run: HandlerRun) -> str:
    return f"{run.node.machine.name}:{run.work_id[-6:]}#{run.retry}@{run.started:.3f}"
