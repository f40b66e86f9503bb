"""The open tool calls of a session: calls for this worker that are allowed and not answered yet.

Computes only. Each event of the session is applied once, in order, whether it is from the history
or new. Nothing here waits, sends or executes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from workpool_toolset.tools import ToolCall

Event: TypeAlias = Mapping[str, Any]

_RESULTS: Final = {
    "user.tool_result": "tool_use_id",
    "agent.tool_result": "tool_use_id",
    "user.custom_tool_result": "custom_tool_use_id",
}
_CALLS: Final = {"agent.tool_use": False, "agent.custom_tool_use": True}
_INTERRUPT: Final = "user.interrupt"
_VERDICT: Final = "user.tool_confirmation"
_THREAD_ENDED: Final = "session.thread_status_terminated"
_NEEDS_ACTION: Final = "requires_action"
_ENDINGS: Final = frozenset({"session.status_terminated", "session.deleted"})
_KEEPS_CLOCK: Final = frozenset({_VERDICT, _THREAD_ENDED})


@dataclass(slots=True)
class _OpenCall:
    """A call without an answer; `allowed` is None until it is decided."""

    call: ToolCall
    thread: str | None
    allowed: bool | None
    interrupted: bool = False


@dataclass(slots=True)
class Conversation:
    """The state of the tool calls of one session.

    Attributes:
        session: The id of the session.
        owns: Returns whether a call is for this worker; other calls are ignored.
        denied: Called for each call of this worker that will never run.
        ended: Whether the session has ended for good.
        turn_over: Whether the last event says that the agent waits for no action.
        agent_idle: Whether the last event says that the agent waits for something.
        answered: The ids of calls that need no answer of this worker.
    """

    session: str
    owns: Callable[[ToolCall], bool]
    denied: Callable[[ToolCall], None]
    ended: bool = False
    turn_over: bool = False
    agent_idle: bool = False
    answered: set[str] = field(default_factory=set)
    _open: dict[str, _OpenCall] = field(default_factory=dict)
    _verdicts: dict[str, bool] = field(default_factory=dict)

    @property
    def is_idle(self) -> bool:
        """Whether the agent's turn is over, and no call waits to run or for a decision."""
        return self.turn_over and not self._open

    @property
    def waits_for_others(self) -> bool:
        """Whether a person or an application must act next.

        They must decide on a call, answer one of their own tools, or begin the next turn.
        """
        undecided = any(one.allowed is None for one in self._open.values())
        return self.next_call() is None and (undecided or self.agent_idle)

    def next_call(self) -> ToolCall | None:
        """Return the oldest call to answer now; it stays until `close`."""
        return next((o.call for o in self._open.values() if o.allowed or o.interrupted), None)

    def runnable_calls(self) -> list[ToolCall]:
        """Return all calls to answer now, oldest first."""
        return [o.call for o in self._open.values() if o.allowed and not o.interrupted]

    def is_interrupted(self, call: str) -> bool:
        """Return whether the user interrupted this call."""
        found = self._open.get(call)
        return found is not None and found.interrupted

    def close_call(self, call: str) -> None:
        """Remove a call that needs nothing more."""
        self.answered.add(call)
        self._open.pop(call, None)

    def apply(self, event: Event) -> None:
        """Apply one event. A malformed or unknown one affects only the idle time."""
        kind = str(event.get("type"))
        if kind not in _KEEPS_CLOCK:
            self.agent_idle = kind == "session.status_idle"
            self.turn_over = self.agent_idle and _stop_reason(event) != _NEEDS_ACTION
        if kind in _CALLS:
            self._add_call(event, custom=_CALLS[kind])
        elif answered := answered_call(event):
            self.close_call(answered)
        elif kind == _VERDICT:
            self._apply_decision(
                str(event.get("tool_use_id")), allowed=event.get("result") == "allow"
            )
        elif kind in {_INTERRUPT, _THREAD_ENDED}:
            self._cancel_calls(kind, _thread_id(event))
        self.ended = self.ended or kind in _ENDINGS

    def _cancel_calls(self, kind: str, thread: str | None) -> None:
        """Apply a user's interrupt or the end of a thread, each of which ends its calls."""
        for name, one in list(self._open.items()):
            if kind == _INTERRUPT:
                one.interrupted = True
            elif thread is not None and one.thread == thread:
                self.close_call(name)

    def _add_call(self, event: Event, *, custom: bool) -> None:
        id_, name, given = event.get("id"), event.get("name"), event.get("input")
        call = ToolCall(
            id=id_ if isinstance(id_, str) else "",
            name=name if isinstance(name, str) else "",
            input=given if isinstance(given, Mapping) else {},
            custom=custom,
            session=self.session,
        )
        if not call.id or call.id in self.answered or call.id in self._open or not self.owns(call):
            return
        permission = event.get("evaluated_permission", "allow")
        allowed = permission == "allow" if permission in ("allow", "deny") else None
        self._open[call.id] = _OpenCall(call, _thread_id(event), allowed)
        if allowed is None:
            allowed = self._verdicts.get(call.id)
        if allowed is not None:
            self._apply_decision(call.id, allowed=allowed)

    def _apply_decision(self, name: str, *, allowed: bool) -> None:
        """Apply a decision of the server or a person, which may precede its call."""
        self._verdicts.setdefault(name, allowed)
        waiting = self._open.get(name)
        if waiting and not allowed:
            self.close_call(name)  # the control plane answers this call
            self.denied(waiting.call)
        elif waiting:
            waiting.allowed = True


def answered_call(event: Event) -> str | None:
    """Return the id of the call that this event answers, or None."""
    name = _RESULTS.get(str(event.get("type")))
    return str(event.get(name)) if name else None


def _stop_reason(event: Event) -> object:
    reason = event.get("stop_reason")
    return reason.get("type") if isinstance(reason, Mapping) else reason


def _thread_id(event: Event) -> str | None:
    thread = event.get("session_thread_id")
    return thread if isinstance(thread, str) else None
