"""The events of one session, as a handler uses them: list, send, stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

from workpool.errors import ConflictError, TransientError
from workpool.wire import protocol, request_bodies
from workpool.wire.events.event_calls import Pages, Unguarded
from workpool.wire.events.event_stream import STALL_SECONDS, EventStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from workpool.wire.events.event_calls import EventCalls, Guard, SessionEvent
    from workpool.wire.http.call_options import CallOptions

_ANSWERS: Final[Mapping[str, str]] = {
    protocol.USER_TOOL_RESULT: "tool_use_id",
    protocol.USER_CUSTOM_TOOL_RESULT: "custom_tool_use_id",
    protocol.USER_TOOL_CONFIRMATION: "tool_use_id",
}
"""Events that the control plane accepts only once, so that sending them again is harmless."""


class SessionEvents:
    """`session.events`, and `WorkClient.events(session_id)`."""

    def __init__(self, calls: EventCalls, session_id: str, guard: Guard | None = None) -> None:
        self._calls = calls
        self._session_id = session_id
        self._guard: Guard = guard or Unguarded()

    async def list(self) -> AsyncIterator[SessionEvent]:
        """Iterate over the whole history, oldest first, page by page.

        Raises:
            LeaseLost, SessionEnded: The session is not the handler's anymore.
            ControlPlaneError: A page could not be read.
        """
        pages = Pages(self._calls)
        while not pages.done:
            for event in await self._guard.within(pages.next):
                yield event

    async def send(self, *events: Mapping[str, Any]) -> Sequence[SessionEvent]:
        """Append events, all of them or none, and return them as they are stored.

        A handler's are tried again while the lease lasts, unless that could say something twice:
        results and confirmations are taken once only, a message is not. A result that was accepted
        already, word for word, counts as sent: its first answer may have been lost.

        Raises:
            TypeError: Something that JSON cannot carry; nothing was sent.
            LeaseLost, SessionEnded: The session is not the handler's anymore; nothing was sent.
            ConflictError: A tool use has another result already, or the session is over.
            TransientError: Not settled in time, and perhaps applied.
            ControlPlaneError: Refused.
        """
        body = request_bodies.events(events)
        repeatable = all(event.get("type") in _ANSWERS for event in events)
        doubtful = False  # it was sent, and we do not know what came of it

        async def post(options: CallOptions) -> Sequence[SessionEvent] | TransientError:
            nonlocal doubtful
            if doubtful:
                return TransientError("events", None, "no answer in time", reason="timeout")
            doubtful = not repeatable
            try:
                return await self._calls.post(body, options=options)
            except ConflictError:
                stored = await self._stored(orjson.loads(body)["events"]) if repeatable else None
                if stored is None:
                    raise
                return stored
            except TransientError as error:
                if doubtful and error.reason != "throttled":
                    return error
                doubtful = False
                raise

        answer = await self._guard.carry(post)
        if isinstance(answer, TransientError):
            raise answer
        return answer

    def stream(self, *, stall_seconds: float = STALL_SECONDS) -> EventStream:
        """Follow the session: its history first, then what comes, reconnecting by itself.

        `stall_seconds`: how long the connection may be silent before it is taken for broken.
        """
        return EventStream(self._calls, self._guard, self._session_id, stall_seconds=stall_seconds)

    async def _stored(self, said: Sequence[SessionEvent]) -> Sequence[SessionEvent] | None:
        """All of `said` as the history holds it; None when any of it is not there as we said it."""
        wanted, held = {_key(event) for event in said}, {}
        async for event in self.list():
            if event["type"] in _ANSWERS and (key := _key(event)) in wanted:
                held[key] = event
        pairs = [(event, held.get(_key(event))) for event in said]
        stored = [theirs for ours, theirs in pairs if theirs is not None and _within(ours, theirs)]
        return stored if len(stored) == len(pairs) else None


def _key(event: Mapping[str, Any]) -> tuple[object, object]:
    kind = event["type"]
    return kind, event.get(_ANSWERS[kind])


def _within(ours: object, theirs: object) -> bool:
    """Whether all that we said is there; the control plane may have added to it."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return all(_within(value, theirs.get(name)) for name, value in ours.items())
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_within, ours, theirs))
    return ours == theirs or (not ours and not theirs)
