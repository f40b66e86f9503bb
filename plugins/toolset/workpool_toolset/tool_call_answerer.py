"""Executes the tool calls of one session, and sends the answer to each call exactly once.

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
from workpool_toolset.conversation import Conversation, find_answered_call_id
from workpool_toolset.tool_result import ToolResult
from workpool_toolset.tracing import tool_span

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workpool_toolset.call_journal import CallJournal
    from workpool_toolset.toolbox import Toolbox, ToolCall

UNKNOWN_OUTCOME: Final = (
    "the worker was interrupted while this call was running, and it was not run again: "
    "its outcome is unknown; check what it did before repeating it"
)
INTERRUPTED_BY_USER: Final = "interrupted by the user"
RESULT_REFUSED: Final = "the result was refused by the control plane; it may be too large"

JOURNAL_KEY: Final = "workpool.toolset"
"""The key of the item's metadata with the name of the journal of its calls."""

POST_SECONDS: Final = 300.0
"""The seconds for which sending a result is repeated before the session is released."""
REFUSED_SECONDS: Final = 30.0
"""The seconds for which sending is repeated after status 400: a result may precede its call."""
MAX_RETRY_SECONDS: Final = 30.0
_BAD_REQUEST: Final = 400

Ending = Literal["ended", "idle", "interrupted"]


class ToolCallAnswerer:
    """Answers the tool calls of one session until the session ends, is idle or is interrupted.

    Args:
        session: The session.
        toolbox: The tools.
        journal: The open journal of the session.
        max_idle: The seconds to wait after the end of a turn; infinite: until the session ends.
    """

    def __init__(
        self, session: Session, toolbox: Toolbox, journal: CallJournal, max_idle: float
    ) -> None:
        self._session = session
        self._toolbox = toolbox
        self._journal = journal
        self._max_idle = max_idle
        self._conversation = Conversation(
            session.id, toolbox.is_call_for_this_worker, self._log_denied_call
        )
        self._changed = asyncio.Event()
        self._caught_up = False
        self._journal_named = False
        self._idle_since: float | None = None
        self._running: tuple[ToolCall, asyncio.Timeout] | None = None

    async def answer_calls_of_session(self) -> None:
        """Answer calls until the session ends, is idle or is interrupted.

        Raises:
            Release: The pool drains, and another worker will continue the session.
            LeaseLost, SessionEnded, ControlPlaneError: A request for the session failed.
        """
        try:
            async with asyncio.TaskGroup() as group:
                others = [
                    group.create_task(self._read_session_events(), name="toolset-reader"),
                    group.create_task(self._wake_answerer_on_interrupt(), name="toolset-watch"),
                ]
                ending = await self._answer_tool_calls()
                for other in others:
                    other.cancel()
        except BaseExceptionGroup as group_error:
            error = innermost(group_error)
            raise error from error.__cause__
        self._session.log.info("toolset: %s", ending)
        if ending == "interrupted" and not self._session.stopping:
            raise Release("the pool is draining")

    async def _read_session_events(self) -> None:
        async with self._session.events.stream() as stream:
            async for event in stream:
                self._conversation.apply_event(event)
                self._session.progress()
                self._caught_up = stream.caught_up
                self._update_idle_time_and_running_call()
                if answered := find_answered_call_id(event):
                    with release_on_journal_error():
                        await self._journal.delete_result(answered)
        self._conversation.ended = self._caught_up = True
        self._update_idle_time_and_running_call()

    async def _wake_answerer_on_interrupt(self) -> None:
        await self._session.interrupted()
        self._changed.set()

    def _update_idle_time_and_running_call(self) -> None:
        """Update the state after a change of the conversation, and wake `_answer_tool_calls`.

        Update the time since which the session is idle. Cancel a running call that needs no result
        anymore.
        """
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
                self._running = None
        self._changed.set()

    async def _answer_tool_calls(self) -> Ending:
        while True:
            self._changed.clear()
            if self._session.stopping or self._session.draining:
                return "interrupted"
            if self._conversation.ended and self._caught_up:
                return "ended"
            call = await self._next_tool_call()
            if call:
                await self._answer_tool_call(call)
            elif not await self._wait_for_conversation_change():
                return "idle"

    async def _next_tool_call(self) -> ToolCall | None:
        # Wait until the whole history is read, because unread events may contain results of calls.
        if not self._caught_up:
            return None
        if not self._journal_named:
            self._journal_named = True
            await self._write_journal_name_to_item()
        return self._conversation.next_tool_call()

    async def _write_journal_name_to_item(self) -> None:
        """Write the name of this machine's journal to the item's metadata.

        If the item's last run was on another machine, the open calls may have begun there. First
        record these calls as begun in this machine's journal, so that they are not executed again.
        If the name were written first, these calls would look after a crash as if they had never
        begun.
        """
        stored_name, name = self._session.item.metadata.get(JOURNAL_KEY), self._journal.name
        elsewhere = self._journal.is_new if stored_name is None else stored_name != name
        if self._session.redelivered and elsewhere:
            with release_on_journal_error():
                for call in self._conversation.runnable_tool_calls():
                    await self._journal.begin_call(call.id)
        if stored_name == name:
            return
        try:
            await self._session.update_metadata({JOURNAL_KEY: name})
        except NotPermittedError:
            # The control plane refused the write. Continue, although the item's metadata lack the
            # journal's name. The pool has already logged the refusal.
            pass
        except TransientError as error:
            raise Release("the item cannot name its journal") from error

    async def _wait_for_conversation_change(self) -> bool:
        """Wait for a change, and return True. Return False after `max_idle` idle seconds."""
        since = self._idle_since if self._caught_up and math.isfinite(self._max_idle) else None
        others_next = self._caught_up and self._conversation.waits_for_person_or_application
        try:
            async with asyncio.timeout_at(None if since is None else since + self._max_idle):
                with self._session.waiting() if others_next else contextlib.nullcontext():
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def _answer_tool_call(self, call: ToolCall) -> None:
        self._raise_if_lease_ended()
        with release_on_journal_error():
            known = await self._journal.begin_call(call.id)
        if known != "new":
            self._session.log.info(
                "toolset: the call was begun before", extra={"tool": call.name, "call_id": call.id}
            )
        if isinstance(known, ToolResult):
            result = known
        elif known == "begun":
            result = ToolResult.from_error(UNKNOWN_OUTCOME)
        elif self._conversation.is_interrupted(call.id):
            result = ToolResult.from_error(INTERRUPTED_BY_USER)
        else:
            # Check the lease again, because it may have expired while the journal was written.
            self._raise_if_lease_ended()
            with tool_span(call) as record:
                result = await self._execute_tool_call(call)
                record(result)
            await self._store_result(call, result)
        if call.id not in self._conversation.answered:
            await self._send_result_or_error(call, result)
        self._conversation.mark_call_answered(call.id)
        self._update_idle_time_and_running_call()

    async def _store_result(self, call: ToolCall, result: ToolResult) -> None:
        try:
            await self._journal.store_result(call.id, result)
        except OSError:
            # Continue without a stored result, because the result can still be sent. If the worker
            # crashes before it has sent the result, the outcome of the call is unknown.
            self._session.log.exception("toolset: result not kept", extra={"call_id": call.id})

    def _raise_if_lease_ended(self) -> None:
        if self._session.lease_remaining <= 0:
            raise LeaseLost(self._session.item.id)

    async def _execute_tool_call(self, call: ToolCall) -> ToolResult:
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            async with asyncio.timeout(None) as scope:
                self._running = call, scope
                # Cancel the call at once if an interrupt arrived while the journal was written.
                self._update_idle_time_and_running_call()
                result = await self._toolbox.run_tool_call(call)
        except TimeoutError:
            result = ToolResult.from_error(INTERRUPTED_BY_USER)
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

    async def _send_result_or_error(self, call: ToolCall, result: ToolResult) -> None:
        """Send a result until it is stored. Send an error if the service refuses the result."""
        for candidate in (result, ToolResult.from_error(RESULT_REFUSED)):
            try:
                await self._send_result_with_retries(call, candidate)
            except ConflictError:
                # Nothing to do: the result is already stored, and the answer to an earlier request
                # was lost.
                return
            except RefusedError:
                self._session.log.exception("toolset: result refused", extra={"call_id": call.id})
            else:
                return

    async def _send_result_with_retries(self, call: ToolCall, result: ToolResult) -> None:
        clock = asyncio.get_running_loop().time
        started, pause = clock(), 1.0
        while True:
            limit = POST_SECONDS
            try:
                await self._session.events.send(_make_result_event(call, result))
            except TransientError as error:
                failure: TransientError | RefusedError = error
            except RefusedError as error:
                failure = error
                limit = REFUSED_SECONDS if error.status == _BAD_REQUEST else 0.0
            else:
                return
            # Stop if an event has shown that the control plane has stored the result.
            if call.id in self._conversation.answered:
                return
            if clock() - started >= limit:
                if isinstance(failure, TransientError):
                    raise Release("results cannot be sent")
                raise failure
            await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - no secret
            pause = min(pause * 2, MAX_RETRY_SECONDS)

    def _log_denied_call(self, call: ToolCall) -> None:
        # Log only denials that are new. Denials in the history were logged by an earlier run.
        if self._caught_up:
            self._session.log.info(
                "toolset: the call was denied", extra={"tool": call.name, "call_id": call.id}
            )


@contextlib.contextmanager
def release_on_journal_error() -> Iterator[None]:
    """Convert an `OSError` to `Release`, because no call may run without the journal."""
    try:
        yield
    except OSError as error:
        raise Release(f"the journal cannot be kept: {error.strerror}") from error


def _make_result_event(call: ToolCall, result: ToolResult) -> dict[str, Any]:
    kind, name = "user.tool_result", "tool_use_id"
    if call.custom:
        kind, name = "user.custom_tool_result", "custom_tool_use_id"
    return {"type": kind, name: call.id, "content": result.content, "is_error": result.is_error}
