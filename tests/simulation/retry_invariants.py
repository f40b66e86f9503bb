"""Invariants 11a to 11d: how a pool calls a handler again after an error, in the same session."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

from tests.simulation.attempt_invariants import (
    has_late_write_of_attempt_metadata,
    list_writes_of_attempt_metadata,
)
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
    """Invariant 11a: a handler that failed is called again during the same lease.

    The call begins at most `MARGIN_SECONDS` after the retry delay, halts of the machine excluded.
    """
    for node, lease in case.all_leases():
        runs = _list_handler_calls(case, node, lease)
        for number, (run, following) in enumerate(pairwise([*runs, None])):
            if run is None or run.result != "retried":
                continue
            until = run.ended + min(RETRY.backoff * 2.0**number, RETRY.backoff_max) + MARGIN_SECONDS
            until += node.seconds_of_machine_halts(run.ended, FOREVER)
            if following is None:
                if not _may_session_have_ended_by(case, node, lease, until):
                    yield f"{_describe_run(run)} failed, and is not called again until {until:.3f}"
            elif following.retry != run.retry + 1 or following.started > until:
                again = _describe_run(following)
                yield f"{_describe_run(run)} failed, and is called again only as {again}"


def retries_are_bounded(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 11b: no handler call has a retry number beyond the limit `Retry.times`."""
    for run in case.trace.runs:
        if run.retry > RETRY.times:
            yield f"{_describe_run(run)} is one call too many"


def no_retry_begins_after_a_drain_or_stop_request(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 11d: no handler is called again after the start of a drain or a stop request."""
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


def retry_number_is_stored_for_the_next_run(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 11c: a pool that releases a session stores the retry number for the next run."""
    for work_id, runs in case.runs.items():
        if has_late_write_of_attempt_metadata(case, work_id) or not any(
            run.behaviour == "retry" for run in runs
        ):
            continue
        for lease in case.leases.get(work_id, ()):
            node = case.find_process_of_lease(lease)
            calls = _list_handler_calls(case, node, lease)
            if not calls:
                continue
            left = _stored_retry_number(case, work_id, lease.began)
            if calls[0].retry != left:
                yield f"{_describe_run(calls[0])} is the first call, but {left} was left to it"
            expected = calls[-1].retry + (calls[-1].result == "retried")
            if (
                _session_was_released(case, node, lease)
                and _stored_retry_number(case, work_id, lease.ended) != expected
            ):
                yield f"{_describe_run(calls[-1])} was released without {expected} for the next run"


def _list_handler_calls(
    case: FinishedSimulation, node: PoolProcess, lease: GrantedLease
) -> list[HandlerRun]:
    """Return the calls of the retrying handler during a lease, in order."""
    return [
        run
        for run in case.runs[lease.work_id]
        if run.node is node
        and run.behaviour == "retry"
        and case.find_last_lease_of_pool(node, lease.work_id, run.started) is lease
    ]


def _may_session_have_ended_by(
    case: FinishedSimulation, node: PoolProcess, lease: GrantedLease, until: float
) -> bool:
    """Return whether the session may have ended by `until`, so that no retry is due."""
    drains = [at for at, event in node.events if isinstance(event, DrainStarted)]
    return (
        node.error is not None
        or min(drains, default=FOREVER) <= until
        or node.crashed <= until
        or node.pool.session_timeout is not None
        or lease.stop_requested <= until
        or (lease.end_kind == "stopped" and lease.stopped_by != lease.worker_id)
        or case.pool_had_fault_during_lease(node, lease)
    )


def _session_was_released(case: FinishedSimulation, node: PoolProcess, lease: GrantedLease) -> bool:
    """Return whether the pool released the session and was able to write metadata before that."""
    return (
        lease.stop_requested == FOREVER
        and not case.pool_had_fault_during_lease(node, lease)
        and not node.abandoned
        and not node.pool.worker_key
        and case.find_denial_time_of_operation(node, "update") == FOREVER
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
    for call in list_writes_of_attempt_metadata(case, work_id):
        if call.arrival_time > at:
            break
        for key, value in call.patch.items():
            standing.pop(key, None)
            if value is not None:
                standing[key] = value
    return int(standing.get(_RETRIES, "0")) if _RELEASED in standing else 0


def _describe_run(run: HandlerRun) -> str:
    return f"{run.node.machine.name}:{run.work_id[-6:]}#{run.retry}@{run.started:.3f}"
