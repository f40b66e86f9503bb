"""The run of one session: it reads the events and answers each tool call exactly once.

Two tasks share the conversation: one reads and applies events, the other answers calls, one at a
time. Neither blocks the other. A cancellation (lost lease, deadline of a drain) may end both at any
await, because the journal has all begun calls and their results. See plugins/toolset/README.md,
"Exactly once".
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from typing import TYPE_CHECKING, Any, Final, Literal

from workpool import Release, Session
from workpool.errors import (
    ConflictError,
    LeaseLost,
    NotPermittedError,
    RefusedError,
    TransientError,
    innermost,
)
from workpool_toolset.conversation import Conversation, answered_call
from workpool_toolset.results import Result
from workpool_toolset.tracing import tool_span

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workpool_toolset.journal import CallJournal
    from workpool_toolset.tools import Toolbox, ToolCall

UNKNOWN: Final = (
    "the worker was interrupted while this call was running, and it was not run again: "
    "its outcome is unknown; check what it did before repeating it"
)
INTERRUPTED: Final = "interrupted by the user"
REFUSED: Final = "the result was refused by the control plane; it may be too large"

JOURNAL: Final = "workpool.toolset"
"""The metadata of the item with the name of the journal of its calls."""

POST_SECONDS: Final = 300.0
"""Seconds for which a result is sent again before the session is released."""
REFUSED_SECONDS: Final = 30.0
"""Seconds for which a 400 is tried again: a result may arrive before its call."""
WAIT_MAX_SECONDS: Final = 30.0
_BAD_REQUEST: Final = 400

Ending = Literal["ended", "idle", "interrupted"]


class SessionAnswerer:
    """Answers one session's tool calls until it ends, is idle, or is asked to stop.

    Args:
        session: The session.
        toolbox: The tools.
        journal: The open journal of the session.
        max_idle: Seconds to wait after the end of a turn; infinite: until the session ends.
    """

    def __init__(
        self, session: Session, toolbox: Toolbox, journal: CallJournal, max_idle: float
    ) -> None:
        self._session = session
        self._toolbox = toolbox
        self._journal = journal
        self._max_idle = max_idle
        self._conversation = Conversation(session.id, toolbox.owns, self._answer_denied)
        self._changed = asyncio.Event()
        self._caught_up = False
        self._joined = False
        self._idle_since: float | None = None
        self._running: tuple[ToolCall, asyncio.Timeout] | None = None

    async def run(self) -> None:
        """Run until the session needs nothing more.

        Raises:
            Release: The pool drains, so another worker continues.
            LeaseLost, SessionEnded, ControlPlaneError: As calls of the session raise them.
        """
        try:
            async with asyncio.TaskGroup() as group:
                others = [
                    group.create_task(self._read_events(), name="toolset-reader"),
                    group.create_task(self._watch_session(), name="toolset-watch"),
                ]
                ending = await self._answer_calls()
                for other in others:
                    other.cancel()
        except BaseExceptionGroup as group_error:
            error = innermost(group_error)
            raise error from error.__cause__  # Raises the error in the group instead of the group.
        self._session.log.info("toolset: %s", ending)
        if ending == "interrupted" and not self._session.stopping:
            raise Release("the pool is draining")

    async def _read_events(self) -> None:
        async with self._session.events.stream() as stream:
            async for event in stream:
                self._conversation.apply(event)
                self._session.progress()
                self._caught_up = stream.caught_up
                self._apply_change()
                if answered := answered_call(event):
                    with journal_errors_as_release():
                        await self._journal.forget(answered)
        self._conversation.ended = self._caught_up = True
        self._apply_change()

    async def _watch_session(self) -> None:
        await self._session.interrupted()
        self._changed.set()

    def _apply_change(self) -> None:
        """Apply a change: restart the idle time, stop interrupted calls, wake the other task."""
        now = asyncio.get_running_loop().time()
        if not self._conversation.is_idle:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        if self._running:
            call, scope = self._running
            gone = call.id in self._conversation.answered
            if gone or self._conversation.ended or self._conversation.is_interrupted(call.id):
                scope.reschedule(now)
                self._running = None  # One cancellation is enough.
        self._changed.set()

    async def _answer_calls(self) -> Ending:
        while True:
            self._changed.clear()
            if self._session.stopping or self._session.draining:
                return "interrupted"
            if self._conversation.ended and self._caught_up:
                return "ended"
            call = await self._next_call()
            if call:
                await self._answer_call(call)
            elif not await self._wait_for_change():
                return "idle"

    async def _next_call(self) -> ToolCall | None:
        if not self._caught_up:  # The result may be among the events that are not read yet.
            return None
        if not self._joined:
            self._joined = True
            await self._join_session()
        return self._conversation.next_call()

    async def _join_session(self) -> None:
        """Skip calls that another machine may have begun, then name this journal in the metadata.

        In this order: after a crash in between, the calls of the other machine would look like
        those of this one.
        """
        named, ours = self._session.item.metadata.get(JOURNAL), self._journal.name
        elsewhere = self._journal.new if named is None else named != ours
        if self._session.redelivered and elsewhere:
            with journal_errors_as_release():
                for call in self._conversation.runnable_calls():
                    await self._journal.begin(call.id)
        if named == ours:
            return
        try:
            await self._session.update_metadata({JOURNAL: ours})
        except NotPermittedError:
            pass  # The pool has logged the error; the name is only in the state directory.
        except TransientError as error:
            raise Release("the item cannot name its journal") from error

    async def _wait_for_change(self) -> bool:
        """Wait for a change; return False once the session was idle for `max_idle` seconds."""
        since = self._idle_since if self._caught_up and math.isfinite(self._max_idle) else None
        others_next = self._caught_up and self._conversation.waits_for_others
        try:
            async with asyncio.timeout_at(None if since is None else since + self._max_idle):
                with self._session.waiting() if others_next else contextlib.nullcontext():
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def _answer_call(self, call: ToolCall) -> None:
        self._check_lease()
        with journal_errors_as_release():
            known = await self._journal.begin(call.id)
        if known != "new":
            self._session.log.info(
                "toolset: the call was begun before", extra={"tool": call.name, "call_id": call.id}
            )
        if isinstance(known, Result):
            result = known
        elif known == "begun":
            result = Result.error(UNKNOWN)
        elif self._conversation.is_interrupted(call.id):
            result = Result.error(INTERRUPTED)
        else:
            self._check_lease()  # Writing the journal may have taken long.
            with tool_span(call) as record:
                result = await self._execute_call(call)
                record(result)
            await self._keep_result(call, result)
        if call.id not in self._conversation.answered:
            await self._post_result(call, result)
        self._conversation.close_call(call.id)
        self._apply_change()

    async def _keep_result(self, call: ToolCall, result: Result) -> None:
        try:
            await self._journal.finish(call.id, result)
        except OSError:  # The result is sent anyway; after a crash its call counts as unknown.
            self._session.log.exception("toolset: result not kept", extra={"call_id": call.id})

    def _check_lease(self) -> None:
        if self._session.lease_remaining <= 0:
            raise LeaseLost(self._session.item.id)

    async def _execute_call(self, call: ToolCall) -> Result:
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            async with asyncio.timeout(None) as scope:
                self._running = call, scope
                self._apply_change()  # An interrupt may have arrived while the journal was written.
                result = await self._toolbox.run(call)
        except TimeoutError:
            result = Result.error(INTERRUPTED)
        finally:
            self._running = None
        self._session.progress()
        outcome = "error" if result.is_error else "ok"
        self._session.log.info(
            "toolset: tool ended",
            extra={
                "tool": call.name,
                "call_id": call.id,
                "result": outcome,
                "seconds": round(clock() - started, 3),
            },
        )
        return result

    async def _post_result(self, call: ToolCall, result: Result) -> None:
        """Send a result until it is stored. A refused one is replaced once, then dropped."""
        for candidate in (result, Result.error(REFUSED)):
            try:
                await self._send_result(call, candidate)
            except ConflictError:  # An earlier request was applied, but its answer was lost.
                return
            except RefusedError:
                self._session.log.exception("toolset: result refused", extra={"call_id": call.id})
            else:
                return

    async def _send_result(self, call: ToolCall, result: Result) -> None:
        clock = asyncio.get_running_loop().time
        started, pause = clock(), 1.0
        while True:
            bound = POST_SECONDS
            try:
                await self._session.events.send(_result_event(call, result))
            except TransientError as error:
                failure: TransientError | RefusedError = error
            except RefusedError as error:
                failure = error
                bound = REFUSED_SECONDS if error.status == _BAD_REQUEST else 0.0
            else:
                return
            if call.id in self._conversation.answered:  # The stream has shown the result.
                return
            if clock() - started >= bound:
                if isinstance(failure, TransientError):
                    raise Release("results cannot be sent")
                raise failure
            await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - spreads retries, no secret
            pause = min(pause * 2, WAIT_MAX_SECONDS)

    def _answer_denied(self, call: ToolCall) -> None:
        # A call is denied only once, although the history may be read several times.
        if self._caught_up:
            self._session.log.info(
                "toolset: the call was denied", extra={"tool": call.name, "call_id": call.id}
            )


@contextlib.contextmanager
def journal_errors_as_release() -> Iterator[None]:
    """Turn an unwritable journal into a release of the session: no call runs without a journal."""
    try:
        yield
    except OSError as error:
        raise Release(f"the journal cannot be kept: {error.strerror}") from error


def _result_event(call: ToolCall, result: Result) -> dict[str, Any]:
    kind, name = "user.tool_result", "tool_use_id"
    if call.custom:
        kind, name = "user.custom_tool_result", "custom_tool_use_id"
    return {"type": kind, name: call.id, "content": result.content, "is_error": result.is_error}
