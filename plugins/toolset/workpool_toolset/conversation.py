"""The state of a session's tool calls, computed from its events.

Each event of the session is applied once, in order, whether it is from the history or new. This
module does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from workpool_toolset.toolbox import ToolCall

Event: TypeAlias = Mapping[str, Any]

_RESULTS: Final = {
    "user.tool_result": "tool_use_id",
    "agent.tool_result": "tool_use_id",
    "user.custom_tool_result": "custom_tool_use_id",
}
_CALLS: Final = {"agent.tool_use": False, "agent.custom_tool_use": True}
_INTERRUPT: Final = "user.interrupt"
_CONFIRMATION: Final = "user.tool_confirmation"
_THREAD_ENDED: Final = "session.thread_status_terminated"
_NEEDS_ACTION: Final = "requires_action"
_ENDINGS: Final = frozenset({"session.status_terminated", "session.deleted"})
_KEEPS_CLOCK: Final = frozenset({_CONFIRMATION, _THREAD_ENDED})


@dataclass(slots=True)
class _UnansweredToolCall:
    """An open call: it has no answer yet. `allowed` is None until it is allowed or denied."""

    call: ToolCall
    thread: str | None
    allowed: bool | None
    interrupted: bool = False


@dataclass(slots=True)
class Conversation:
    """The tool calls of one session that this worker must answer.

    Attributes:
        session: The id of the session.
        is_call_for_this_worker: Returns whether a call is for this worker. Other calls are ignored.
        on_denied: Called for each call of this worker that is denied.
        ended: Whether the session was terminated or deleted.
        turn_over: Whether the agent's turn has ended and needs no action.
        agent_idle: Whether the agent waits for a message, a confirmation or a result.
        answered: The ids of the calls that need no answer of this worker anymore.
    """

    session: str
    is_call_for_this_worker: Callable[[ToolCall], bool]
    on_denied: Callable[[ToolCall], None]
    ended: bool = False
    turn_over: bool = False
    agent_idle: bool = False
    answered: set[str] = field(default_factory=set)
    _open: dict[str, _UnansweredToolCall] = field(default_factory=dict)
    _decisions: dict[str, bool] = field(default_factory=dict)

    @property
    def is_idle(self) -> bool:
        """Whether the agent's turn has ended, and no call is open."""
        return self.turn_over and not self._open

    @property
    def waits_for_person_or_application(self) -> bool:
        """Whether the session waits for a person or an application, and not for this worker.

        They must confirm a call, answer a call of their own tools, or begin the next turn.
        """
        undecided = any(one.allowed is None for one in self._open.values())
        return self.next_tool_call() is None and (undecided or self.agent_idle)

    def next_tool_call(self) -> ToolCall | None:
        """Return the oldest open call that is allowed or interrupted, or None if there is none."""
        return next((o.call for o in self._open.values() if o.allowed or o.interrupted), None)

    def runnable_tool_calls(self) -> list[ToolCall]:
        """Return all open calls that are allowed and not interrupted, oldest first."""
        return [o.call for o in self._open.values() if o.allowed and not o.interrupted]

    def is_interrupted(self, call: str) -> bool:
        """Return whether the user has interrupted a call that has no answer yet.

        Args:
            call: The id of the call.
        """
        open_call = self._open.get(call)
        return open_call is not None and open_call.interrupted

    def mark_call_answered(self, call: str) -> None:
        """Remove an open call to which this worker need not send an answer anymore."""
        self.answered.add(call)
        self._open.pop(call, None)

    def apply_event(self, event: Event) -> None:
        """Update the state with one event of the session.

        A malformed or unknown event affects at most whether the session counts as idle.
        """
        kind = str(event.get("type"))
        if kind not in _KEEPS_CLOCK:
            self.agent_idle = kind == "session.status_idle"
            self.turn_over = self.agent_idle and _read_stop_reason_type(event) != _NEEDS_ACTION
        if kind in _CALLS:
            self._add_tool_call(event, custom=_CALLS[kind])
        elif answered := find_answered_call_id(event):
            self.mark_call_answered(answered)
        elif kind == _CONFIRMATION:
            self._apply_permission_decision(
                str(event.get("tool_use_id")), allowed=event.get("result") == "allow"
            )
        elif kind in {_INTERRUPT, _THREAD_ENDED}:
            self._interrupt_or_close_calls(kind, _session_thread_id(event))
        self.ended = self.ended or kind in _ENDINGS

    def _interrupt_or_close_calls(self, kind: str, thread: str | None) -> None:
        """Apply an interrupt or the end of a thread to the open calls.

        An interrupt marks all open calls as interrupted. The end of `thread` removes the thread's
        open calls, which need no answer anymore.
        """
        for name, one in list(self._open.items()):
            if kind == _INTERRUPT:
                one.interrupted = True
            elif thread is not None and one.thread == thread:
                self.mark_call_answered(name)

    def _add_tool_call(self, event: Event, *, custom: bool) -> None:
        id_, name, fields = event.get("id"), event.get("name"), event.get("input")
        call = ToolCall(
            id=id_ if isinstance(id_, str) else "",
            name=name if isinstance(name, str) else "",
            input=fields if isinstance(fields, Mapping) else {},
            custom=custom,
            session=self.session,
        )
        if (
            not call.id
            or call.id in self.answered
            or call.id in self._open
            or not self.is_call_for_this_worker(call)
        ):
            return
        permission = event.get("evaluated_permission", "allow")
        allowed = permission == "allow" if permission in ("allow", "deny") else None
        self._open[call.id] = _UnansweredToolCall(call, _session_thread_id(event), allowed)
        if allowed is None:
            allowed = self._decisions.get(call.id)
        if allowed is not None:
            self._apply_permission_decision(call.id, allowed=allowed)

    def _apply_permission_decision(self, name: str, *, allowed: bool) -> None:
        """Allow or deny a call. The event with the decision may arrive before the call's event."""
        self._decisions.setdefault(name, allowed)
        waiting = self._open.get(name)
        if waiting and not allowed:
            # Remove the denied call from the open calls, because the control plane answers it.
            self.mark_call_answered(name)
            self.on_denied(waiting.call)
        elif waiting:
            waiting.allowed = True


def find_answered_call_id(event: Event) -> str | None:
    """Return the id of the call that this event answers, or None for other events."""
    name = _RESULTS.get(str(event.get("type")))
    return str(event.get(name)) if name else None


def _read_stop_reason_type(event: Event) -> object:
    reason = event.get("stop_reason")
    return reason.get("type") if isinstance(reason, Mapping) else reason


def _session_thread_id(event: Event) -> str | None:
    thread = event.get("session_thread_id")
    return thread if isinstance(thread, str) else None
