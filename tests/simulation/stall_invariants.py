"""Invariants 12a and 12b: a pool ends the sessions whose handlers make no progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from workpool.events import SessionFinished

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.simulation.finished_simulation import FinishedSimulation

MARGIN_SECONDS: Final = 0.05
"""Drift of clocks."""
UNNOTICED_PART: Final = 0.25
"""The part of a stall timeout for which a halt of the machine may count as silence."""


def handlers_without_progress_are_cancelled(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 12a: a handler that reports no progress for `stall_timeout` is cancelled.

    If its machine was halted shortly before its last progress, the pool cannot tell how much of the
    delay of its next check came after the progress: the end may come one check later.
    """
    for run in case.trace.runs:
        limit = run.node.pool.stall_timeout
        until = run.time_of_end_or_cancellation
        if limit is None or run.waits or run.node.was_machine_halted(run.progressed_at, until):
            continue
        halted_before = run.node.was_machine_halted(run.progressed_at - limit, run.progressed_at)
        latest = run.progressed_at + limit * (1 + UNNOTICED_PART * halted_before)
        if min(until, run.node.crashed) > latest + MARGIN_SECONDS:
            name = f"{run.node.machine.name}:{run.behaviour}({run.work_id[-6:]})"
            yield f"{name} ran until {until:.3f}, silent since {run.progressed_at:.3f}"


def sessions_with_progress_do_not_end_as_stalled(case: FinishedSimulation) -> Iterator[str]:
    """Invariant 12b: a session ends as `stalled` only after `stall_timeout` s without progress.

    Time in which its machine was halted does not count, but for a small part.
    """
    for node in case.trace.nodes:
        for at, event in node.events:
            if not isinstance(event, SessionFinished) or event.outcome != "stalled":
                continue
            work_id = event.session.item.id
            run = max(
                (run for run in case.runs[work_id] if run.node is node and run.started <= at),
                key=lambda run: run.started,
            )
            halted = node.seconds_of_machine_halts(run.progressed_at, run.cancelled_at)
            silence = run.cancelled_at - run.progressed_at - halted
            least = (node.pool.stall_timeout or 0.0) * (1 - UNNOTICED_PART * bool(halted))
            if run.waits or silence < least - MARGIN_SECONDS:
                name = f"{node.machine.name}:{run.behaviour}({work_id[-6:]})"
                yield f"{name} is stalled at {at:.3f}, silent since {run.progressed_at:.3f}"
