"""The handlers of simulated pools. The metadata of an item say what its handler does."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from tests.simulation.simulated_machine import current_machine
from tests.simulation.trace import HandlerRun, HandoffPeriod
from workpool import Release, Retry, Session, handler, hookimpl
from workpool.errors import ControlPlaneError, HandoverError
from workpool.handlers import Handler

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.trace import PoolProcess, Trace
    from workpool.session import HandedLease
    from workpool.wire.items import WorkItem

BEHAVIOUR: Final = "behaviour"
"""Metadata key: a name of `schedule.BEHAVIOURS`."""
SECONDS: Final = "seconds"
"""Metadata key: the duration of the work."""
STUBBORN_SECONDS: Final = 15.0
"""The longest time for which a stubborn handler ignores cancellations."""
SWALLOW_SECONDS: Final = 40.0
"""Time for which a handler goes on after its first cancellation; a second one ends it."""
TIDY_SECONDS: Final = 0.9
"""Duration of a clean-up: less than the second that every lease leaves for it."""
HEALED_SECONDS: Final = 0.05
"""The longest duration of work once all faults have ended."""
WAYS: Final = ("soon", "soon", "late", "fails", "never")
"""The time at which the child of a handoff starts; with `fails` the handler also raises."""
PULSE_SECONDS: Final = 2.0
"""The interval in which a handler reports progress: less than half of each stall timeout."""
HANG_SECONDS: Final = 3.0
"""Number of stall timeouts for which a handler hangs if it is not ended."""
BLOCK_SECONDS: Final = 0.3
"""Time that a handler needs to start a child."""


RETRY: Final = Retry(on=ConnectionError, times=2, backoff=8, backoff_max=12)
"""The retries of the handler with the behaviour `retry`."""
RETRY_SECONDS: Final = 5.0
"""The longest duration of one of its calls."""

_SESSION: ContextVar[str | None] = ContextVar("session", default=None)
"""Set by every handler. A handler that finds it set runs in another session's context."""


@handler
async def run_simulated_session(session: Session) -> Any:
    """Handle an item of a simulated pool by the behaviour that is named in its metadata."""
    return await current_machine().handlers.run_behaviour(session)


@handler(metadata={BEHAVIOUR: "retry"}, retry=RETRY)
async def run_retried_session(session: Session) -> Any:
    """Handle an item with the behaviour `retry`: the pool calls this handler again after errors."""
    return await current_machine().handlers.run_behaviour(session)


class MaxSessionsPlugin:
    """A plugin that supplies a handler with the limit `max_sessions` of the simulated machine.

    It supplies no handler to a pool on a machine without this limit.
    """

    @hookimpl
    def workpool_session_handler(self, item: WorkItem) -> Handler | None:
        limit = current_machine().max_sessions
        if limit is None:
            return None
        call = partial(SimulatedHandlers.run_behaviour, current_machine().handlers)
        return Handler(
            name="simulated.limited",
            call=call,
            max_sessions=limit,
            retry=RETRY if item.metadata[BEHAVIOUR] == "retry" else None,
            plugin="simulated",
        )


PLUGINS: Final = (MaxSessionsPlugin(), run_simulated_session, run_retried_session)
"""The plugins of every simulated pool."""


class SimulatedHandlers:
    """The handlers of one simulated pool, with a method for each behaviour of a handler.

    Attributes:
        healed: All faults have ended; all work is short.
    """

    def __init__(
        self,
        trace: Trace,
        node: PoolProcess,
        now: Callable[[], float],
        start_child: Callable[[PoolProcess, HandedLease, float], None],
    ) -> None:
        """Create the handlers. Handoffs call `start_child(node, lease, delay)`."""
        self.healed = False
        self._start_handoff_child = start_child
        self._trace = trace
        self._node = node
        self._now = now
        self._sessions: set[Session] = set()

    async def run_behaviour(self, session: Session) -> Any:
        """Run the behaviour that is named in the item's metadata, and record the run."""
        item = session.item
        name, seconds = item.metadata[BEHAVIOUR], float(item.metadata[SECONDS])
        if self.healed:
            seconds = min(seconds, HEALED_SECONDS)
        first = not any(run.work_id == item.id for run in self._trace.runs)
        run = HandlerRun(
            self._node, item.id, item.session_id, name, self._now(), attempt=session.attempt
        )
        run.retry, run.again = session.retry, session in self._sessions
        self._sessions.add(session)
        run.leaked = _SESSION.get() is not None and not run.again
        _SESSION.set(item.id)
        # A callback of a machine that crashes in the same iteration of the event loop still runs.
        # The handler must not count as running then.
        if self._node.crashed <= run.started:
            run.ended, run.result = run.started, "crashed"
        self._trace.runs.append(run)
        if self._node.machine.halted == "crashed":
            run.ended, run.result = self._now(), "crashed"
        alone = self._node.child or (self.healed and name in {"hand_off", "hang"})
        act = self._run_work_behaviour if alone else getattr(self, f"_run_{name}_behaviour")
        return await self._run_behaviour_and_record_its_end(act, session, run, seconds, first)

    async def _run_behaviour_and_record_its_end(
        self, act: Any, session: Session, run: HandlerRun, seconds: float, first: bool
    ) -> Any:
        """Await `act`, the method of a behaviour, and record in `run` how the handler ended."""
        result = "raised"
        try:
            returned = await act(session, run, seconds, first)
        except asyncio.CancelledError:
            self._record_first_cancellation(run)
            result = "cancelled"
            raise
        except Release:
            result = "released"
            raise
        except ConnectionError:
            result = "retried" if session.retry < RETRY.times else "raised"
            raise
        else:
            result = "returned"
            return returned
        finally:
            if self._node.machine.halted != "crashed" and run.result is None:
                run.ended, run.result, run.stop_seen = self._now(), result, session.stopping

    def _record_first_cancellation(self, run: HandlerRun) -> None:
        run.cancelled_at = min(run.cancelled_at, self._now())

    async def _run_work_behaviour(
        self, _session: Session, _run: HandlerRun, seconds: float, _first: bool
    ) -> Any:
        await asyncio.sleep(seconds)
        return {"done": "yes"}

    async def _run_raise_error_behaviour(
        self, _session: Session, _run: HandlerRun, seconds: float, _first: bool
    ) -> Any:
        await asyncio.sleep(seconds)
        raise ValueError("on purpose")

    async def _run_retry_behaviour(
        self, session: Session, _run: HandlerRun, seconds: float, _first: bool
    ) -> Any:
        """Fail in the first calls for an item. `seconds` determines the number of failures."""
        failures = round(seconds * 1000) % (RETRY.times + 2)
        await asyncio.sleep(min(seconds, RETRY_SECONDS))
        if session.retry < failures:
            raise ConnectionError("on purpose")
        return {"calls": str(session.retry)}

    async def _run_release_behaviour(
        self, _session: Session, _run: HandlerRun, seconds: float, first: bool
    ) -> Any:
        await asyncio.sleep(seconds)
        if first:
            raise Release("not yet", 12)
        return {}

    async def _run_return_wrong_type_behaviour(
        self, _session: Session, _run: HandlerRun, seconds: float, _first: bool
    ) -> Any:
        await asyncio.sleep(seconds)
        return object()

    async def _run_end_early_behaviour(
        self, session: Session, _run: HandlerRun, seconds: float, _first: bool
    ) -> Any:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await session.interrupted()
        if session.draining and not session.stopping:
            raise Release("draining")
        return {"done": "early"}

    async def _run_clean_up_behaviour(
        self, _session: Session, run: HandlerRun, seconds: float, _first: bool
    ) -> Any:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self._record_first_cancellation(run)
            await asyncio.sleep(TIDY_SECONDS)
            raise
        return None

    async def _run_ignore_cancellation_behaviour(
        self, _session: Session, run: HandlerRun, seconds: float, _first: bool
    ) -> Any:
        until = self._now() + seconds
        while self._now() < min(until, run.cancelled_at + STUBBORN_SECONDS):
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:  # a faulty handler ignores its cancellation
                self._record_first_cancellation(run)
        return {"done": "at last"}

    async def _run_swallow_cancellation_behaviour(
        self, _session: Session, run: HandlerRun, seconds: float, _first: bool
    ) -> Any:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:  # a faulty handler ignores its cancellation
            self._record_first_cancellation(run)
            await asyncio.sleep(SWALLOW_SECONDS)
        return {"done": "at last"}

    async def _run_return_at_timeout_behaviour(
        self, _session: Session, run: HandlerRun, seconds: float, _first: bool
    ) -> Any:
        """Sleep until the session timeout cancels the handler, and return a result nevertheless."""
        try:
            await asyncio.sleep(self._node.pool.session_timeout or seconds)
        except asyncio.CancelledError:  # a faulty handler ignores its cancellation
            self._record_first_cancellation(run)
        return {"done": "in time"}

    async def _run_write_metadata_behaviour(
        self, session: Session, run: HandlerRun, seconds: float, _first: bool
    ) -> Any:
        until, count = self._now() + seconds, 0
        while self._now() < until:
            count += 1
            with suppress(ControlPlaneError):
                await session.update_metadata({"count": str(count)})
                run.progressed_at = self._now()
            await asyncio.sleep(2.5)
        return {"count": str(count)}

    async def _run_report_progress_behaviour(
        self, session: Session, run: HandlerRun, seconds: float, _first: bool
    ) -> Any:
        """Work for `seconds`, and report progress every two seconds."""
        until = self._now() + seconds
        while (left := until - self._now()) > 0:
            await asyncio.sleep(min(left, PULSE_SECONDS))
            session.progress()
            run.progressed_at = self._now()
        return {"done": "step by step"}

    async def _run_hang_behaviour(
        self, session: Session, run: HandlerRun, seconds: float, first: bool
    ) -> Any:
        """Report progress, then hang for longer than the pool's stall timeout, if there is one."""
        await self._run_report_progress_behaviour(session, run, seconds / 2, first)
        await asyncio.sleep(HANG_SECONDS * (self._node.pool.stall_timeout or 0.0))
        return {"done": "after all"}

    async def _run_wait_for_person_behaviour(
        self, session: Session, run: HandlerRun, seconds: float, _first: bool
    ) -> Any:
        """Wait within `session.waiting()`, as for a person: this time does not count as a stall."""
        with session.waiting():
            run.waits = True
            await asyncio.sleep(seconds)
        run.waits, run.progressed_at = False, self._now()
        return {"answer": "yes"}

    async def _run_hand_off_behaviour(
        self, session: Session, run: HandlerRun, seconds: float, first: bool
    ) -> Any:
        """Hand the item off to a child that starts soon, late or never; or raise in the handoff."""
        draw, way = divmod(round(seconds * 1000), len(WAYS))
        try:
            async with session.handover() as lease:
                bound = lease.ttl - max(1.0, lease.ttl / 10) - lease.ttl / 4
                late = bound - 1 + draw % 20 / 10
                delays = {"soon": draw % 20 / 10, "late": late, "fails": draw % 20 / 40}
                delay = delays.get(WAYS[way])
                await self._start_child_process_in_handoff(
                    session, run, lease, delay, fails=WAYS[way] == "fails"
                )
        except HandoverError:
            again = (run.work_id, run.session_id, "alone", self._now())
            alone = HandlerRun(self._node, *again, attempt=run.attempt)
            alone.progressed_at = run.progressed_at
            self._trace.runs.append(alone)
            return await self._run_behaviour_and_record_its_end(
                self._run_work_behaviour, session, alone, seconds, first
            )
        return {"ignored": "yes"}

    async def _start_child_process_in_handoff(
        self,
        session: Session,
        run: HandlerRun,
        lease: HandedLease,
        delay: float | None,
        *,
        fails: bool,
    ) -> None:
        """Start the child inside the handoff block, and record the end of the handler's own run."""
        period = HandoffPeriod(self._node, session.item.id, lease.ttl, self._now())
        self._trace.handoff_periods.append(period)
        run.ended, run.result = self._now(), "handed"
        if delay is not None:
            self._start_handoff_child(self._node, lease, delay)
        try:
            await asyncio.sleep(BLOCK_SECONDS)
            if fails:
                raise ValueError("on purpose")
        finally:
            period.left = self._now()
