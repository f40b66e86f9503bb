"""Lists the events of one simulation line by line, to find the cause of a violation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulation.trace import FOREVER
from workpool.events import PollFinished

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.simulation.finished_simulation import FinishedSimulation
    from tests.simulation.schedule import Schedule


def format_simulation_as_lines(schedule: Schedule, case: FinishedSimulation) -> Iterator[str]:
    """Yield the schedule, and then all events in order of time, except polls without a fault."""
    yield f"faults {schedule.fault_share} of {', '.join(schedule.fault_kinds)}"
    yield f"control plane: {schedule.control_plane}"
    yield from (str(pool) for pool in schedule.pools)
    lines = [
        *_format_actions_as_lines(schedule),
        *_format_history_as_lines(case),
        *_format_calls_as_lines(case),
        *_format_handler_runs_as_lines(case),
        *_format_pool_events_as_lines(case),
    ]
    for at, line in sorted(lines, key=lambda each: each[0]):
        yield f"{at:10.4f}  {line}"


def _format_actions_as_lines(schedule: Schedule) -> Iterator[tuple[float, str]]:
    for action in schedule.actions:
        yield action.at, f"ACTION   {action}"


def _format_history_as_lines(case: FinishedSimulation) -> Iterator[tuple[float, str]]:
    names = {node.worker_id: f"pool {node.machine.name}" for node in case.trace.nodes}
    for record in case.history:
        who = names.get(str(record.worker_id), str(record.worker_id))
        yield record.time, f"HISTORY  {record.work_id[-6:]} {record.kind} {record.state} by {who}"


def _format_calls_as_lines(case: FinishedSimulation) -> Iterator[tuple[float, str]]:
    for call in case.trace.sent:
        name = f"pool {call.node.machine.name} {call.op} {str(call.work_id)[-6:]}"
        if call.op != "poll" or call.fault is not None:
            fault = "" if call.fault is None else f"  {call.fault}"
            yield call.at, f"SENT     {name}{fault}"
            if call.answered_at < FOREVER:
                yield call.answered_at, f"ANSWERED {name} {call.answer}"


def _format_handler_runs_as_lines(case: FinishedSimulation) -> Iterator[tuple[float, str]]:
    for run in case.trace.runs:
        name = f"pool {run.node.machine.name} {run.work_id[-6:]} {run.behaviour} {run.attempt}"
        yield run.started, f"HANDLER  {name} starts"
        for at, what in ((run.cancelled_at, "is cancelled"), (run.ended, f"ends: {run.result}")):
            if at < FOREVER:
                yield at, f"HANDLER  {name} {what}"


def _format_pool_events_as_lines(case: FinishedSimulation) -> Iterator[tuple[float, str]]:
    for node in case.trace.nodes:
        name = f"pool {node.machine.name}"
        yield node.started, f"POOL     {name} starts as {node.worker_id}"
        for at, event in node.events:
            if not isinstance(event, PollFinished):
                what = getattr(event, "outcome", getattr(event, "result", ""))
                yield at, f"EVENT    {name} {type(event).__name__} {what}"
        for since, until in node.machine.pauses:
            yield since, f"POOL     {name} is halted until {until:.4f}"
        for at, what in ((node.crashed, "crashes"), (node.closed, f"has closed {node.error}")):
            if at < FOREVER:
                yield at, f"POOL     {name} {what}"
