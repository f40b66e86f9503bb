"""Runs an item that has got a slot: acknowledgement, first heartbeat, handler, completion.

`SessionRunner.run_item` is the main path of the pool; it reads top to bottom. `close_item` ends an
item exactly once, however often it is called. Every acknowledged session ends in exactly one
`SessionFinished`. Lives on the handlers' loop.
See workpool/docs/architecture.md, "The path of one item".
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from workpool.errors import (
    AttemptsExceeded,
    ControlPlaneError,
    NotPermittedError,
    ResultError,
    SessionGoneError,
    TransientError,
)
from workpool.events import (
    ItemReclaimed,
    SessionFailed,
    SessionFinished,
    SessionLost,
    StopRequested,
    current_work_id,
)
from workpool.log_fields import pool_logger
from workpool.logs import readable
from workpool.pool.attempt_number import AttemptNumber, LocalRunCounter
from workpool.pool.completion import (
    COMPLETION_OPTIONS,
    DRAIN_REASON,
    MARK_SECONDS,
    NOTE_LIMIT,
    Completion,
    find_outcome_of_abandoned_session,
    str_without_raising,
)
from workpool.pool.handoff import finish_handoff
from workpool.pool.lease import Lease
from workpool.pool.pool_item import EndReason
from workpool.pool.session_backend import PoolSessionBackend
from workpool.session import PoolRelease, Release, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from workpool.events import ReclaimStage, SessionErrorKind
    from workpool.handlers import Handler
    from workpool.pool.attempt_number import Patch
    from workpool.pool.claim import Claimer
    from workpool.pool.handler_executor import HandlerExecutor
    from workpool.pool.item_requests import ItemSender
    from workpool.pool.pool_context import PoolContext
    from workpool.pool.pool_item import PoolItem
    from workpool.session import Outcome

log = pool_logger(__name__)

ATTEMPT_SECONDS = 10.0
"""Seconds for which the write of a run's number is retried; then the item is released."""
HEALTHCHECK_SECONDS = 10.0
SETTLED: Final = frozenset({"completed", "stopped", "detached"})
"""Outcomes after which this process does not run the item again."""
FAILURES: Final[Mapping[str, SessionErrorKind]] = {
    "failed": "exception",
    "timed_out": "timeout",
    "stalled": "stalled",
}
"""The error kind for each outcome of a failed session, if the error itself has no kind."""
RELEASES: Final = frozenset({EndReason.DRAINED, EndReason.RELEASED})
"""End reasons of runs that do not count as attempts."""


class SessionRunner:
    """Runs items: acknowledges each, calls its handler, and completes the session.

    Args:
        context: The context of the pool.
        claimer: Acknowledges items and sends first heartbeats.
        sender: Sends the requests for items.
        executor: Calls handlers.
        on_finished: Called with the outcome and the seconds of each session that has ended.
        on_closed: Called once for each item, when it has ended.

    Attributes:
        on_claimed: Called for each claimed session, whose lease was held when its handler could
            start; None: no function.
        unstarted: The number of items in a row that ended without a call of a handler: their claim
            failed, or they were health checks.
    """

    def __init__(
        self,
        context: PoolContext,
        claimer: Claimer,
        sender: ItemSender,
        executor: HandlerExecutor,
        on_finished: Callable[[PoolItem, Outcome, float], None],
        on_closed: Callable[[PoolItem], None],
    ) -> None:
        self.on_claimed: Callable[[], None] | None = None
        self.unstarted = 0
        self._context = context
        self._claimer = claimer
        self._sender = sender
        self._executor = executor
        self.completion = Completion(context, sender)
        self._runs = LocalRunCounter()
        self._on_finished = on_finished
        self._on_closed = on_closed

    async def run_item(self, item: PoolItem) -> None:
        """Acknowledge an item, call its handler, and complete the session."""
        current_work_id.set(item.id)
        outcome: Outcome | None = None
        try:
            if not await self._acknowledge_item(item):
                return
            if item.handler is None:
                await self._stop_healthcheck_item(item)
                return
            session = await self._begin_session(item)
            if item.end_reason is None:
                await self._execute_handler(item, item.handler, session)
            item.advance_state("ended")
            outcome = await self.completion.complete_session(item)
        finally:
            self.close_item(item, outcome)

    def close_item(self, item: PoolItem, outcome: Outcome | None = None) -> None:
        """End an item: stop its heartbeats, report the outcome, and free its slot.

        Without an outcome, the session is abandoned: its outcome follows from its lease. A second
        call has no effect.
        """
        if item.state == "closed":
            return
        item.advance_state("closed")
        if item.handler_task is None:
            self.unstarted += 1
        if item.mark_task is not None:
            item.mark_task.cancel()
        if item.handler_task is not None:
            # The handler of an abandoned session still runs. If it runs on a thread, this
            # cancellation ends the wait for the thread.
            item.handler_task.cancel()
        if item.has_lease:
            self._context.renewer.remove_lease(item.lease)
        if item.session is not None:
            self._report_session_end(
                item, item.session, outcome or find_outcome_of_abandoned_session(item)
            )
            # Break the reference cycle of session and item. Otherwise both would stay in memory
            # until the next garbage collection.
            item.session = None
        self._on_closed(item)

    def handle_lease_change(self, item: PoolItem) -> None:
        """Cancel or notify the handler of an item after the lease renewer has changed the lease."""
        lease, session = item.lease, item.session
        if lease.closed or session is None:
            return  # No handler is left to cancel after the end of the session.
        item.notify_waiters()
        if lease.status != "held":
            self._sender.abort_waits_for_answers(item)
        if lease.status == "lost":
            self._executor.cancel_handler(item, EndReason.LOST)
        elif lease.status == "stopped":
            self._executor.cancel_handler(item, EndReason.STOPPED)
        elif lease.stop_requested:
            self._interrupt_after_stop_request(item, session)

    async def _acknowledge_item(self, item: PoolItem) -> bool:
        now = self._context.clock()
        clock_offset = self._context.renewer.pauses.wall_clock_offset(now)
        if item.parents_heartbeat is None:
            result = await self._claimer.acknowledge_item(item, now)
            if result == "conflict":
                self._report_lost_item(item, "ack")
            if result != "ok":
                return False
            item.advance_state("acknowledged")
        settings = self._context.settings
        item.lease = Lease(
            item.work_item,
            item.acked_at,
            ttl=settings.lease_ttl,
            request_timeout=settings.request_timeout,
            polled_at=item.polled_at,
            parents_heartbeat=item.parents_heartbeat,
        )
        item.lease.clock_offset = clock_offset
        return True

    async def _begin_session(self, item: PoolItem) -> Session:
        """Create the session, send its first heartbeat, and record reasons not to call the handler.

        Writes the number of the run if the item was run before.
        """
        lease, redelivered = item.lease, item.held_before
        attempt = item.attempt = AttemptNumber(item.work_item.metadata, redelivered=redelivered)
        session = item.session = Session(
            item.work_item,
            PoolSessionBackend(item, self._context, self._sender),
            redelivered=redelivered,
            attempt=attempt.number,
            retry=attempt.retry,
        )
        if self._context.draining:
            await self.completion.mark_released_session_as_no_attempt(
                item, DRAIN_REASON, MARK_SECONDS
            )
        await self._claimer.send_first_heartbeats(item)
        self._context.renewer.add_lease(lease, item)
        item.add_end_reason(item.find_end_reason_of_lease(self._context.clock()))
        must_count = self._must_count_runs_locally() or bool(attempt.make_run_number_metadata())
        if must_count and item.end_reason is None and not self._context.draining:
            await self._write_run_number_if_needed(item, session, attempt)
            item.add_end_reason(item.find_end_reason_of_lease(self._context.clock()))
        if self.on_claimed is not None and item.end_reason is not EndReason.LOST:
            item.counts_towards_exit_limit = True
            self.on_claimed()
        if lease.stop_requested:
            self._interrupt_after_stop_request(item, session)
        if self._context.draining:
            item.add_end_reason(EndReason.DRAINED)
        return session

    async def _execute_handler(self, item: PoolItem, handler: Handler, session: Session) -> None:
        item.advance_state("started")
        self.unstarted = 0
        await self._executor.run_handler(item, handler, session)
        if item.mark_task is not None:
            await _wait_for_release_mark(item.mark_task)
        if item.handoff is not None:
            await finish_handoff(item, item.handoff, self._context.renewer)
        item.add_end_reason(item.find_end_reason_of_lease(self._context.clock()))

    def _interrupt_after_stop_request(self, item: PoolItem, session: Session) -> None:
        """Interrupt the session because of a stop request, and report the request once."""
        if not session.stopping:
            self._context.observe(StopRequested, item.work_item)
            session.interrupt(stopping=True)
            grace = self._context.settings.stop_grace
            self._executor.cancel_handler_later(item, EndReason.STOP_REQUESTED, grace)

    def _must_count_runs_locally(self) -> bool:
        """Return whether `_runs` must count the runs, because the pool may not write metadata."""
        return "update" in self._context.optional.refused

    async def _write_run_number_if_needed(
        self, item: PoolItem, session: Session, attempt: AttemptNumber
    ) -> None:
        """Write the number of this run to the metadata, unless it is there or may not be written.

        If the number is greater than `max_attempts`, end the session instead.
        """
        counts_itself = self._must_count_runs_locally()
        if counts_itself:
            attempt.set_number_from_local_count(self._runs.number_of_runs(item.id))
            session.attempt = attempt.number
        patch = {} if counts_itself else attempt.make_run_number_metadata()
        limit = self._context.settings.max_attempts
        if limit and attempt.number > limit:
            item.error = AttemptsExceeded(f"attempt {attempt.number} of {limit}")
            item.add_end_reason(EndReason.RAISED)
        elif patch:
            await self._write_run_number_to_metadata(item, session, attempt, patch)

    async def _write_run_number_to_metadata(
        self, item: PoolItem, session: Session, attempt: AttemptNumber, patch: Patch
    ) -> None:
        try:
            await self.completion.write_metadata(
                item, patch, COMPLETION_OPTIONS._replace(seconds=ATTEMPT_SECONDS)
            )
            attempt.clear_written_run_number()
        except SessionGoneError:
            item.add_end_reason(EndReason.LOST)
        except TransientError as error:
            # Do not run an item whose runs cannot be counted: if it crashes the worker, workers
            # would run it again and again without end.
            log.warning(
                "attempt not counted: %s", error, extra={"work_id": item.id, "error": str(error)}
            )
            item.error = PoolRelease("not started: its attempt could not be counted")
            item.add_end_reason(EndReason.RELEASED)
        except NotPermittedError:
            # The pool may not write the run number to the metadata. Call this method again: it now
            # takes the number from `_runs`, which counts the runs in this process.
            await self._write_run_number_if_needed(item, session, attempt)
        except ControlPlaneError as error:
            log.warning(
                "attempt refused: %s", error, extra={"work_id": item.id, "error": str(error)}
            )

    async def _stop_healthcheck_item(self, item: PoolItem) -> None:
        """Complete a health check: stop its item after the ack, without calling a handler."""
        if item.lease.unsettled:
            await self._claimer.send_first_heartbeats(item)
        try:
            await self.completion.stop_item(item, seconds=HEALTHCHECK_SECONDS)
        except (ControlPlaneError, SessionGoneError) as error:
            log.warning(
                "health check not stopped: %s",
                error,
                extra={"work_id": item.id, "error": str(error)},
            )

    def _report_session_end(self, item: PoolItem, session: Session, outcome: Outcome) -> None:
        if outcome == "lease_lost" and item.lease.is_loss_confirmed:
            self._report_lost_item(item, "run" if item.lease.begun else "start")
        if outcome == "lease_lost":
            self._context.observe(SessionLost, item.work_item, item.lease.loss)
        elif outcome in FAILURES:
            self._context.observe(
                SessionFailed, item.work_item, find_session_error_kind(item, outcome)
            )
        if (
            outcome not in SETTLED
            and item.end_reason not in RELEASES
            and item.handler_task is not None
        ):
            self._runs.count_item_run(item.id)
        session.outcome = outcome
        seconds = self._context.clock() - item.acked_at
        _log_session_end(item, session, outcome, seconds)
        self._on_finished(item, outcome, seconds)
        self._context.observe(
            SessionFinished, session, item.handler_label, outcome, seconds, item.error
        )

    def _report_lost_item(self, item: PoolItem, stage: ReclaimStage) -> None:
        """Report that an answer of the control plane shows that another worker has the item."""
        stage = "drain" if self._context.draining else stage
        log.info(
            "item reclaimed",
            extra={
                "work_id": item.id,
                "session_id": item.session_id,
                "direction": "lost",
                "stage": stage,
            },
        )
        self._context.observe(ItemReclaimed, item.work_item, "lost", stage)


def find_session_error_kind(item: PoolItem, outcome: Outcome) -> SessionErrorKind:
    """Return the kind of error by which a session failed."""
    if isinstance(item.error, AttemptsExceeded):
        return "attempts_exceeded"
    if isinstance(item.error, ResultError):
        return "result_refused"
    return FAILURES[outcome]


def _log_session_end(item: PoolItem, session: Session, outcome: Outcome, seconds: float) -> None:
    if not log.isEnabledFor(logging.INFO):
        return
    fields: dict[str, object] = {
        "work_id": item.id,
        "session_id": item.session_id,
        "handler": item.handler_label,
        "outcome": outcome,
        "seconds": round(seconds, 3),
        "attempt": session.attempt,
    }
    if isinstance(item.error, Release):
        fields["reason"] = readable(str_without_raising(item.error.reason), NOTE_LIMIT)
    log.info("session ended", extra=fields | session.trace_fields)


async def _wait_for_release_mark(task: asyncio.Task[None]) -> None:
    """Wait for the task in which a drain writes the release mark to the item's metadata.

    If the task is not done after `MARK_SECONDS`, cancel it: a release mark that was written after
    the metadata of the completion would overwrite them.
    """
    await asyncio.wait({task}, timeout=MARK_SECONDS)
    task.cancel()
