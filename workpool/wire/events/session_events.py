"""The events of one session, as a handler lists, sends and streams them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

from workpool.errors import ConflictError, TransientError
from workpool.wire import protocol, request_bodies
from workpool.wire.events.event_calls import EventPageReader, PermissiveSessionGuard
from workpool.wire.events.event_stream import STALL_SECONDS, EventStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from workpool.wire.events.event_calls import EventCalls, SessionEvent, SessionGuard
    from workpool.wire.http.call_options import CallOptions

_ANSWERED_CALL_FIELDS: Final[Mapping[str, str]] = {
    protocol.USER_TOOL_RESULT: "tool_use_id",
    protocol.USER_CUSTOM_TOOL_RESULT: "custom_tool_use_id",
    protocol.USER_TOOL_CONFIRMATION: "tool_use_id",
}
"""Events that the control plane accepts only once, so that sending them again is harmless."""


class SessionEvents:
    """The events of one session: `session.events`, or `WorkClient.events(session_id)`."""

    def __init__(
        self, calls: EventCalls, session_id: str, guard: SessionGuard | None = None
    ) -> None:
        self._calls = calls
        self._session_id = session_id
        self._guard: SessionGuard = guard or PermissiveSessionGuard()

    async def list(self) -> AsyncIterator[SessionEvent]:
        """Iterate over the whole history, oldest first, page by page.

        Raises:
            LeaseLost, SessionEnded: The handler may not use the session anymore.
            ControlPlaneError: A page could not be read.
        """
        pages = EventPageReader(self._calls)
        while not pages.done:
            for event in await self._guard.await_guarded_call(pages.read_next_page):
                yield event

    async def send(self, *events: Mapping[str, Any]) -> Sequence[SessionEvent]:
        """Append events, all of them or none, and return them as they are stored.

        A handler's call is repeated after a failure while the lease lasts, unless that could add an
        event twice: the control plane accepts a result or a confirmation only once, but a message
        each time. A result that was accepted before with the same content counts as sent, since its
        first answer may have been lost.

        Raises:
            TypeError: A value cannot be written as JSON; nothing was sent.
            LeaseLost, SessionEnded: The handler may not use the session anymore; nothing was sent.
            ConflictError: A tool use already has another result, or the session has ended.
            TransientError: There was no clear answer in time; the events may have been stored.
            ControlPlaneError: The control plane refused the call.
        """
        body = request_bodies.make_append_events_body(events)
        repeatable = all(event.get("type") in _ANSWERED_CALL_FIELDS for event in events)
        # Whether an earlier request may have stored the events, although its answer was lost.
        may_be_stored = False

        async def send_events_unless_stored(
            options: CallOptions,
        ) -> Sequence[SessionEvent] | TransientError:
            nonlocal may_be_stored
            if may_be_stored:
                return TransientError("events", None, "no answer in time", reason="timeout")
            may_be_stored = not repeatable
            try:
                return await self._calls.append_events(body, options=options)
            except ConflictError:
                stored = (
                    await self._find_stored_events(orjson.loads(body)["events"])
                    if repeatable
                    else None
                )
                if stored is None:
                    raise
                return stored
            except TransientError as error:
                if may_be_stored and error.may_be_applied:
                    return error
                may_be_stored = False
                raise

        answer = await self._guard.run_write_call(send_events_unless_stored)
        if isinstance(answer, TransientError):
            raise answer
        return answer

    def stream(self, *, stall_seconds: float = STALL_SECONDS) -> EventStream:
        """Follow the session: first its history, then new events; reconnect after a failure.

        `stall_seconds`: the silence after which a connection counts as broken.
        """
        return EventStream(self._calls, self._guard, self._session_id, stall_seconds=stall_seconds)

    async def _find_stored_events(
        self, sent_events: Sequence[SessionEvent]
    ) -> Sequence[SessionEvent] | None:
        """Find the sent events in the session's history, and return them as they are stored there.

        Return None if an event is missing or has another content.
        """
        wanted, stored_by_key = {_make_tool_use_key(event) for event in sent_events}, {}
        async for event in self.list():
            if (
                event["type"] in _ANSWERED_CALL_FIELDS
                and (key := _make_tool_use_key(event)) in wanted
            ):
                stored_by_key[key] = event
        pairs = [(event, stored_by_key.get(_make_tool_use_key(event))) for event in sent_events]
        stored = [
            theirs
            for ours, theirs in pairs
            if theirs is not None and _is_stored_as_sent(ours, theirs)
        ]
        return stored if len(stored) == len(pairs) else None


def _make_tool_use_key(event: Mapping[str, Any]) -> tuple[object, object]:
    kind = event["type"]
    return kind, event.get(_ANSWERED_CALL_FIELDS[kind])


def _is_stored_as_sent(sent: object, stored: object) -> bool:
    """Return whether the stored event has all fields of the sent event, with the same values.

    The control plane may have added fields.
    """
    if isinstance(sent, dict) and isinstance(stored, dict):
        return all(_is_stored_as_sent(value, stored.get(name)) for name, value in sent.items())
    if isinstance(sent, list) and isinstance(stored, list):
        return len(sent) == len(stored) and all(map(_is_stored_as_sent, sent, stored))
    return sent == stored or (not sent and not stored)
