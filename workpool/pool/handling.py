"""Running one handler: its task, the wrapping contexts, and the timers that interrupt it.

Owns nothing about the item: it is told to cancel, with a cause, and reports how the handler ended.
Cancelled is not ended: only the handler's own return ends it (design §1, Run).
"""

from __future__ import annotations

import asyncio
import io
import logging
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workpool.pool.claim import Cause
from workpool.pool.finish import mapping_of, release_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from workpool.handlers import Handler
    from workpool.pool.claim import Claim
    from workpool.pool.parts import Parts
    from workpool.session import Session

log = logging.getLogger(__name__)

STUCK_SECONDS = 10.0
LEAVE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class _Raised:
    """What a handler raised, carried as a value: raised, it would take its siblings down."""

    error: BaseException


class Handling:
    """Runs handlers in tasks of `group`. Lives on the handlers' loop.

    Attributes:
        stuck: Claims whose handler has ignored its cancellation for `STUCK_SECONDS`.
        on_stuck: Called whenever there is one more of them.
    """

    def __init__(self, parts: Parts, group: asyncio.TaskGroup) -> None:
        self.stuck: set[Claim] = set()
        self.on_stuck: Callable[[], None] | None = None
        self._session_timeout = parts.settings.session_timeout
        self._stop_grace = parts.settings.stop_grace
        self._plugins = parts.plugins
        self._group = group
        self._timers: dict[Claim, list[asyncio.TimerHandle]] = {}

    async def run(self, claim: Claim, handler: Handler) -> None:
        """Call the handler and wait for its end, however long; note the cause of it."""
        name = f"{claim.label} {claim.item.id}"
        running = claim.running = self._group.create_task(self._call(claim, handler), name=name)
        timers = self._timers[claim] = []
        try:
            timeout = self._session_timeout if handler.timeout is None else handler.timeout
            if timeout is not None:
                timers.append(self._later(timeout, claim, Cause.TIMED_OUT))
            if claim.session.stopping:
                timers.append(self._later(self._stop_grace, claim, Cause.STOP_REQUESTED))
            await ended(running)
        finally:
            del self._timers[claim]
            for timer in timers:
                timer.cancel()
            self.stuck.discard(claim)
        self._note_end(claim, running)

    def request_stop(self, claim: Claim) -> None:
        """Tell the session that an operator wants an end, and cancel it after `stop_grace`."""
        claim.session.interrupt(stopping=True)
        timers = self._timers.get(claim)
        if timers is not None:
            timers.append(self._later(self._stop_grace, claim, Cause.STOP_REQUESTED))

    def cancel(self, claim: Claim, cause: Cause) -> None:
        """Cancel the handler now; watch whether it obeys."""
        if claim.cancel(cause):
            log.info("handler cancelled work_id=%s cause=%s", claim.item.id, cause.name.lower())
            loop = asyncio.get_running_loop()
            self._timers[claim].append(loop.call_later(STUCK_SECONDS, self._report_stuck, claim))

    def _later(self, seconds: float, claim: Claim, cause: Cause) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, self.cancel, claim, cause)

    def _report_stuck(self, claim: Claim) -> None:
        stack = io.StringIO()
        if claim.running is not None:
            claim.running.print_stack(file=stack)
        log.critical(
            "handler ignores its cancellation work_id=%s handler=%s seconds=%.0f\n%s",
            claim.item.id,
            claim.label,
            STUCK_SECONDS,
            stack.getvalue(),
        )
        self.stuck.add(claim)
        if self.on_stuck is not None:
            self.on_stuck()

    async def _call(self, claim: Claim, handler: Handler) -> Mapping[str, str] | _Raised:
        # An eager task runs before whoever makes it has it; its session must be in force by then.
        claim.running = asyncio.current_task()
        try:
            # Read here, where an error is the handler's: its mapping may be code of its own.
            return mapping_of(await self._inside(claim.session, handler))
        except (asyncio.CancelledError, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - SystemExit, too, cannot end the pool
            return _Raised(error)

    async def _inside(self, session: Session, handler: Handler) -> object:
        contexts = self._plugins.contexts(session)
        if not contexts:
            return await handler.call(session)
        async with AsyncExitStack() as stack:
            for _, context in contexts:
                await stack.enter_async_context(context)
            return await handler.call(session)
        return None  # a context has swallowed what was raised

    def _note_end(self, claim: Claim, task: asyncio.Task[Mapping[str, str] | _Raised]) -> None:
        if task.cancelled():
            if not claim.cancelled:  # a CancelledError that leaked from somewhere
                self._note_error(claim, asyncio.CancelledError("leaked from the handler"))
            return
        returned = task.result()
        if isinstance(returned, _Raised):
            self._note_error(claim, returned.error)
        else:
            claim.result = returned
            claim.causes.add(Cause.RETURNED)

    def _note_error(self, claim: Claim, error: BaseException) -> None:
        release = release_of(error)
        claim.error = error if release is None else release
        if release is not None:
            claim.causes.add(Cause.RELEASED)
            log.info("released by its handler work_id=%s", claim.item.id)
            return
        claim.causes.add(Cause.RAISED)
        log.error(
            "handler failed work_id=%s handler=%s", claim.item.id, claim.label, exc_info=error
        )


def ended(task: asyncio.Task[object]) -> asyncio.Future[None]:
    """Done once the task is; cancelling the wait does not cancel it. A lighter `asyncio.wait`."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(_: asyncio.Task[object]) -> None:
        if not future.done():  # whoever waited has been cancelled
            future.set_result(None)

    task.add_done_callback(end)
    return future


@asynccontextmanager
async def handler_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group for handlers that may be left behind.

    A handler that ignores its cancellation would hold up a group that the pool must leave, so this
    one lives in a task of its own: the one kind of task that may outlive the pool, and only then.
    """
    opened, closing = asyncio.Event(), asyncio.Event()
    group = asyncio.TaskGroup()

    async def host() -> None:
        async with group:
            opened.set()
            await closing.wait()

    task = asyncio.get_running_loop().create_task(host(), name="workpool-handlers")
    try:
        await opened.wait()
        yield group
    finally:
        closing.set()
        if (await asyncio.wait({task}, timeout=LEAVE_SECONDS))[1]:
            task.cancel()
            await asyncio.wait({task}, timeout=LEAVE_SECONDS)
