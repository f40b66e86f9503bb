"""The events of one session, and the rules for the control plane's responses to events.

The module uses no clock and no store, and creates no ids. `append_event` adds an event,
`validate_client_events` refuses events that a client may not send, and `next_server_event` returns
the next event of the control plane. All state comes from the events, so that a restart only reads
them again. See workpool/docs/protocol.md, "Events" and "Scripted sessions".
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import orjson

from workpool.server.api_errors import APIError, conflict_error
from workpool.server.timestamps import TimeRange, format_heartbeat_time
from workpool.wire import protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from workpool.server.parsing.session_script import Script
    from workpool.server.stored_item import IdGenerator

EVENT_PREFIX: Final = "evt_"
RESULTS: Final[Mapping[str, str]] = {
    protocol.USER_TOOL_RESULT: "tool_use_id",
    protocol.USER_CUSTOM_TOOL_RESULT: "custom_tool_use_id",
}
"""The events that answer a tool use, with the field that names the tool use."""
TOOL_USES: Final = frozenset({protocol.AGENT_TOOL_USE, protocol.AGENT_CUSTOM_TOOL_USE})


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """One event of a session; `value` is its JSON."""

    id: str
    session_id: str
    value: Mapping[str, Any]

    @property
    def type(self) -> str:
        """The event's type, such as `user.message`."""
        return str(self.value["type"])


class EventFilter(NamedTuple):
    """The filter and sort order of a list of events.

    Attributes:
        types: Only events of these types; None: of all.
        times: Only events at these times.
        newest_first: Whether the list begins with the newest event.
    """

    types: frozenset[str] | None = None
    times: TimeRange = TimeRange()
    newest_first: bool = False


EVERY_EVENT: Final = EventFilter()


@dataclass(slots=True)
class _ToolUse:
    """A tool use of the agent, and its permission: "allow", "ask" or "deny".

    `thread`: the id of the thread that made the tool use; None for the primary thread.
    """

    custom: bool
    permission: str
    thread: str | None = None
    denial: str = "The tool use was denied."

    @property
    def requires_action(self) -> bool:
        """Whether a client must send a result or a confirmation before the agent continues."""
        return self.custom or self.permission == "ask"


class Conversation:
    """The events of one session in their order, and the state derived from them.

    Attributes:
        events: All events; only `append_event` adds an event.
        status: The status of the last `session.status_…`: "running", "idle" or "terminated".
    """

    def __init__(self, script: Script | None = None) -> None:
        """Create an empty conversation. `script`: the tool uses of a scripted agent, if any."""
        self.events: list[StoredEvent] = []
        # For each event type, the indexes of the events of this type. With them, a list of one type
        # does not read events of other types.
        self._places: dict[str, array[int]] = {}
        self.status: str | None = None
        self._script = script
        self._place = 0  # the index of the next tool use in the script
        self._uses: dict[str, _ToolUse] = {}
        self._open: dict[str, _ToolUse] = {}  # the tool uses that have no result yet
        self._ended_threads: set[str] = set()  # ids of the session's terminated threads
        # The ids of the tool uses that the last event `session.status_idle` waits for.
        self._blocking: tuple[str, ...] = ()
        # `_turn`: whether a user's message waits for the agent's response. `_next_turn`: whether a
        # message that followed an interrupt waits for the end of the interrupted response.
        self._turn = self._next_turn = False
        self._interrupted = False
        self._concluded = False  # whether the agent has sent the last message of its turn

    @property
    def last_event_at(self) -> str | None:
        """The time of the last event; None if there are no events."""
        return _read_event_time(self.events[-1]) if self.events else None

    def list_events(
        self,
        limit: int,
        *,
        after: str = "",
        before: str | None = None,
        wanted: EventFilter = EVERY_EVENT,
    ) -> Sequence[StoredEvent]:
        """Return up to `limit` events that match `wanted`, after or before the given id."""
        start = max(
            bisect_right(self.events, after, key=_read_event_id),
            self._find_start_of_time_range(wanted.times),
        )
        end = self._find_end_of_time_range(wanted.times)
        if before is not None:
            end = min(end, bisect_left(self.events, before, key=_read_event_id))
        backwards = before is not None or wanted.newest_first
        found = islice(
            self._find_indexes_of_types(wanted.types, start, end, backwards=backwards), limit
        )
        nearest = [self.events[place] for place in found]
        return nearest if wanted.newest_first or not backwards else nearest[::-1]

    def _find_start_of_time_range(self, times: TimeRange) -> int:
        after = 0 if times.gt is None else bisect_right(self.events, times.gt, key=_read_event_time)
        since = (
            0 if times.gte is None else bisect_left(self.events, times.gte, key=_read_event_time)
        )
        return max(after, since)

    def _find_end_of_time_range(self, times: TimeRange) -> int:
        end = len(self.events)
        until = (
            end if times.lt is None else bisect_left(self.events, times.lt, key=_read_event_time)
        )
        to = (
            end if times.lte is None else bisect_right(self.events, times.lte, key=_read_event_time)
        )
        return min(until, to)

    def _find_indexes_of_types(
        self, types: frozenset[str] | None, start: int, end: int, *, backwards: bool
    ) -> Iterator[int]:
        """Iterate over the indexes in `range(start, end)` whose events have one of these types.

        The time depends on the number of these events, not on that of all events.
        """
        if types is None:
            places = range(start, end)
            return iter(places[::-1] if backwards else places)
        step = -1 if backwards else 1
        of_types = (self._places[each] for each in types if each in self._places)
        parts = (
            map(each.__getitem__, range(bisect_left(each, start), bisect_left(each, end))[::step])
            for each in of_types
        )
        return merge(*parts, reverse=backwards)

    def find_position_after_event(self, event_id: str) -> int:
        """Return the number of events up to and including `event_id`; 0 if this id is unknown."""
        place = bisect_left(self.events, event_id, key=_read_event_id)
        known = place < len(self.events) and self.events[place].id == event_id
        return place + 1 if known else 0

    def validate_client_events(self, new_events: Sequence[Mapping[str, Any]]) -> None:
        """Raise a 400 or 409 unless the session can accept all of a client's `new_events`."""
        if self.status == "terminated":
            raise conflict_error("the session is terminated")
        answered: set[str] = set()
        allowed: set[str] = set()
        for event in new_events:
            kind = event["type"]
            if kind in RESULTS:
                use_id = event[RESULTS[kind]]
                self._validate_tool_result(
                    use_id, allowed, custom=kind == protocol.USER_CUSTOM_TOOL_RESULT
                )
                if use_id in answered:
                    raise conflict_error("the tool use has a result already")
                answered.add(use_id)
            elif kind == protocol.USER_TOOL_CONFIRMATION:
                use_id = event["tool_use_id"]
                self._validate_tool_confirmation(use_id)
                if use_id in answered | allowed:
                    raise conflict_error("the tool use has been decided on already")
                (allowed if event["result"] == "allow" else answered).add(use_id)

    def _validate_tool_result(self, use_id: str, allowed: set[str], *, custom: bool) -> None:
        use = self._uses.get(use_id)
        if use is None or use.custom != custom:
            raise APIError(400, "the result does not match any tool use of this session")
        self._check_thread_is_open(use)
        if use_id not in self._open or use.permission == "deny":
            raise conflict_error("the tool use has a result already")
        if use.permission == "ask" and use_id not in allowed:
            raise conflict_error("the tool use waits for a confirmation")

    def _validate_tool_confirmation(self, use_id: str) -> None:
        if use_id not in self._uses:
            raise APIError(400, "the confirmation does not match any tool use of this session")
        self._check_thread_is_open(self._uses[use_id])
        if use_id not in self._open or self._uses[use_id].permission != "ask":
            raise conflict_error("the tool use does not wait for a confirmation")

    def _check_thread_is_open(self, use: _ToolUse) -> None:
        if use.thread in self._ended_threads:
            raise conflict_error("the tool use's thread is terminated")

    def validate_server_events(self, new_events: Sequence[Mapping[str, Any]]) -> None:
        """Raise a 400 for events that a caller of `emit_events` may not append to this session."""
        for event in new_events:
            kind = event.get("type")
            if not isinstance(kind, str) or kind.startswith("user."):
                raise APIError(400, "not an event that the server emits", "type")
            if kind in TOOL_USES and self._script is not None:
                raise APIError(400, "a scripted session's tool uses are its script's", "type")

    def append_event(self, event: StoredEvent) -> None:
        """Append an event, whose id must be the greatest so far, and update the derived state."""
        self._places.setdefault(event.type, array("Q")).append(len(self.events))
        self.events.append(event)
        effect = self._EFFECTS.get(event.type)
        if effect is not None:
            effect(self, event)

    def _request_agent_turn(self, _: StoredEvent) -> None:
        if self._interrupted:
            self._next_turn = True
        else:
            self._turn = True

    def _record_interrupt(self, _: StoredEvent) -> None:
        self._interrupted = self._turn or bool(self._open)

    def _add_tool_use(self, event: StoredEvent) -> None:
        value = event.value
        custom = event.type == protocol.AGENT_CUSTOM_TOOL_USE
        thread = _read_session_thread_id(event)
        use = _ToolUse(custom, value.get("evaluated_permission", "allow"), thread)
        self._uses[event.id] = use
        if thread not in self._ended_threads:
            self._open[event.id] = use
        self._place += self._script is not None
        self._concluded = False

    def _close_tool_use(self, event: StoredEvent) -> None:
        self._open.pop(event.value.get(RESULTS.get(event.type, "tool_use_id"), ""), None)

    def _apply_tool_confirmation(self, event: StoredEvent) -> None:
        use = self._uses[event.value["tool_use_id"]]
        use.permission = event.value["result"]
        use.denial = event.value.get("deny_message", use.denial)

    def _end_agent_turn(self, _: StoredEvent) -> None:
        self._concluded = not self._open

    def _set_status_running(self, _: StoredEvent) -> None:
        self.status, self._blocking = "running", ()

    def _set_status_idle(self, event: StoredEvent) -> None:
        self.status, self._blocking = "idle", ()
        reason = event.value.get("stop_reason") or {}
        if reason.get("type") == protocol.REQUIRES_ACTION:
            self._blocking = tuple(reason.get("event_ids", ()))
            return
        self._turn, self._next_turn = self._next_turn, False
        self._interrupted = self._concluded = False

    def _set_status_terminated(self, _: StoredEvent) -> None:
        self.status = "terminated"

    def _end_session_thread(self, event: StoredEvent) -> None:
        """Record that a session thread is terminated.

        Forget the tool uses of the thread that have no result yet: it accepts no results anymore.
        """
        thread = _read_session_thread_id(event)
        if thread is None:
            return
        self._ended_threads.add(thread)
        for use_id in [use_id for use_id, use in self._open.items() if use.thread == thread]:
            del self._open[use_id]

    _EFFECTS: ClassVar[Mapping[str, Callable[[Conversation, StoredEvent], None]]] = {
        protocol.USER_MESSAGE: _request_agent_turn,
        protocol.USER_INTERRUPT: _record_interrupt,
        protocol.AGENT_TOOL_USE: _add_tool_use,
        protocol.AGENT_CUSTOM_TOOL_USE: _add_tool_use,
        protocol.USER_TOOL_RESULT: _close_tool_use,
        protocol.USER_CUSTOM_TOOL_RESULT: _close_tool_use,
        protocol.AGENT_TOOL_RESULT: _close_tool_use,
        protocol.USER_TOOL_CONFIRMATION: _apply_tool_confirmation,
        protocol.AGENT_MESSAGE: _end_agent_turn,
        protocol.STATUS_RUNNING: _set_status_running,
        protocol.STATUS_IDLE: _set_status_idle,
        protocol.STATUS_TERMINATED: _set_status_terminated,
        protocol.THREAD_TERMINATED: _end_session_thread,
    }

    def next_server_event(self) -> dict[str, Any] | None:
        """Return the event that the control plane must append now; None if there is none."""
        if self.status == "terminated":
            return None
        for use_id, use in self._open.items():
            if use.permission == "deny":
                return _make_error_result_event(use_id, use.denial)
            if self._interrupted:
                return _make_error_result_event(use_id, "The tool use was interrupted.")
        if self._interrupted:
            return _make_idle_event(protocol.END_TURN)
        blocking = tuple(use_id for use_id, use in self._open.items() if use.requires_action)
        if blocking != self._blocking:
            return (
                _make_idle_event(protocol.REQUIRES_ACTION, event_ids=blocking)
                if blocking
                else _RUNNING
            )
        return (
            None if self._open or self._script is None else self._next_scripted_event(self._script)
        )

    def _next_scripted_event(self, script: Script) -> dict[str, Any] | None:
        """Return the scripted agent's next event; None if no message waits for a response."""
        if not self.events:
            return {"type": protocol.USER_MESSAGE, "content": _make_text_content("Run the script.")}
        if not self._turn:
            return None
        if self.status != "running":
            return _RUNNING
        if self._place < len(script):
            return _make_tool_use_event(script[self._place])
        if not self._concluded:
            return {
                "type": protocol.AGENT_MESSAGE,
                "content": _make_text_content("The script is done."),
            }
        return _make_idle_event(protocol.END_TURN)


def extend_conversation(
    conversation: Conversation,
    session_id: str,
    new_events: Sequence[Mapping[str, Any]],
    ids: IdGenerator,
    now: int,
) -> list[StoredEvent]:
    """Append `new_events` and the control plane's responses to them; return all appended events."""
    events: list[StoredEvent] = []
    waiting = iter(new_events)
    while (fields := next(waiting, None) or conversation.next_server_event()) is not None:
        event_id = EVENT_PREFIX + ids.generate_id_digits(now)
        value = {"id": event_id, **fields, "processed_at": format_heartbeat_time(now)}
        events.append(StoredEvent(event_id, session_id, value))
        conversation.append_event(events[-1])
    return events


def copy_events(new_events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a deep copy of events; raises a 400 if they cannot be written as JSON."""
    try:
        content = orjson.dumps({"data": list(new_events)}, default=dict)
    except orjson.JSONEncodeError as error:
        raise APIError(400, f"events cannot be written as JSON: {error}", "events") from None
    copy: list[dict[str, Any]] = orjson.loads(content)["data"]
    return copy


_RUNNING: Final = {"type": protocol.STATUS_RUNNING}


def _read_event_id(event: StoredEvent) -> str:
    return event.id


def _read_event_time(event: StoredEvent) -> str:
    return str(event.value["processed_at"])


def _read_session_thread_id(event: StoredEvent) -> str | None:
    """Return the id of the thread that an event names; None for the primary thread."""
    thread = event.value.get("session_thread_id")
    return thread if isinstance(thread, str) else None


def _make_text_content(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _make_idle_event(reason: str, **more: object) -> dict[str, Any]:
    return {"type": protocol.STATUS_IDLE, "stop_reason": {"type": reason, **more}}


def _make_tool_use_event(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": protocol.AGENT_CUSTOM_TOOL_USE if entry["custom"] else protocol.AGENT_TOOL_USE,
        "name": entry["name"],
        "input": entry["input"],
        "evaluated_permission": entry["permission"],
    }


def _make_error_result_event(use_id: str, why: str) -> dict[str, Any]:
    return {
        "type": protocol.AGENT_TOOL_RESULT,
        "tool_use_id": use_id,
        "content": _make_text_content(why),
        "is_error": True,
    }
