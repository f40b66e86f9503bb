"""The effect of each event on a conversation, without I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from workpool_toolset.conversation import Conversation

if TYPE_CHECKING:
    from workpool_toolset.tools import ToolCall


class ToolUses:
    """A conversation with two tools of this worker."""

    def __init__(self) -> None:
        self.denied: list[str] = []
        self.now = Conversation("sess_1", self.owns, lambda call: self.denied.append(call.id))

    @staticmethod
    def owns(call: ToolCall) -> bool:
        return call.name == ("weather" if call.custom else "bash")

    def use(self, name: str, tool: str = "bash", *, custom: bool = False, **more: Any) -> ToolUses:
        kind = "agent.custom_tool_use" if custom else "agent.tool_use"
        return self.say(kind, id=name, name=tool, input={"command": "ls"}, **more)

    def say(self, kind: str, **fields: Any) -> ToolUses:
        self.now.apply({"type": kind, **fields})
        return self

    def idle(self, reason: object = "end_turn") -> ToolUses:
        return self.say("session.status_idle", stop_reason={"type": reason})

    @property
    def next(self) -> str | None:
        call = self.now.next()
        return call.id if call else None


def test_tool_calls_are_taken_in_order_until_answered() -> None:
    uses = ToolUses().use("a").use("b", "weather", custom=True).use("c")
    assert uses.next == "a"
    assert [call.id for call in uses.now.runnable()] == ["a", "b", "c"]
    uses.now.close("a")
    assert uses.next == "b"
    uses.say("user.custom_tool_result", custom_tool_use_id="b")
    uses.say("agent.tool_result", tool_use_id="c")
    assert uses.next is None


def test_agent_that_needs_a_confirmation_or_its_user_waits_for_others() -> None:
    uses = ToolUses().use("a", evaluated_permission="ask")
    assert uses.now.waits_for_others
    assert uses.idle("requires_action").now.waits_for_others
    uses.say("user.tool_confirmation", tool_use_id="a", result="allow")
    assert not uses.now.waits_for_others
    uses.now.close("a")
    assert not uses.say("session.status_running").now.waits_for_others
    assert uses.idle().now.waits_for_others
    assert uses.use("browse", custom=True).idle("requires_action").now.waits_for_others


def test_result_that_arrives_before_its_call_answers_call() -> None:
    assert ToolUses().say("user.tool_result", tool_use_id="a").use("a").next is None


def test_call_that_was_answered_is_not_taken_again() -> None:
    uses = ToolUses().use("a")
    uses.now.close("a")
    assert uses.use("a").next is None


def test_calls_of_unknown_tools_are_left_to_others() -> None:
    uses = ToolUses().use("a", "browser").use("b", "bash", custom=True).use("c", "weather")
    assert uses.next is None
    assert uses.idle().now.idle
    assert uses.denied == []
    assert uses.say("agent.mcp_tool_use", id="d", name="bash").next is None


@pytest.mark.parametrize("permission", ["ask", "unknown", 1, {}])
def test_call_with_permission_pending_waits_for_confirmation(permission: object) -> None:
    uses = ToolUses().use("a", evaluated_permission=permission).use("b")
    assert uses.next == "b"
    uses.now.close("b")
    assert not uses.idle().now.idle
    assert uses.say("user.tool_confirmation", tool_use_id="a", result="allow").next == "a"


@pytest.mark.parametrize("verdict", ["deny", "unknown", None])
def test_denied_call_is_never_run(verdict: object) -> None:
    uses = ToolUses().use("a", evaluated_permission="ask")
    uses.say("user.tool_confirmation", tool_use_id="a", result=verdict)
    assert (uses.next, uses.denied) == (None, ["a"])
    uses.say("user.tool_confirmation", tool_use_id="a", result="allow")
    assert uses.use("a").next is None
    assert uses.idle().now.idle
    assert ToolUses().use("a", evaluated_permission="deny").denied == ["a"]


@pytest.mark.parametrize(("verdict", "follows"), [("allow", "a"), ("deny", None)])
def test_confirmation_that_arrives_before_its_call_counts(
    verdict: str, follows: str | None
) -> None:
    uses = ToolUses().say("user.tool_confirmation", tool_use_id="a", result=verdict)
    assert uses.use("a", evaluated_permission="ask").next == follows


def test_denial_of_allowed_call_prevents_its_run() -> None:
    uses = ToolUses().use("a").say("user.tool_confirmation", tool_use_id="a", result="deny")
    assert uses.next is None


@pytest.mark.parametrize(
    ("reason", "idle"),
    [("end_turn", True), ("retries_exhausted", True), (None, True), ("requires_action", False)],
)
def test_conversation_is_idle_after_every_end_of_turn_except_requires_action(
    reason: object, *, idle: bool
) -> None:
    assert ToolUses().idle(reason).now.idle is idle


def test_idle_state_ends_with_new_messages_but_not_with_confirmations() -> None:
    uses = ToolUses().idle()
    assert uses.say("user.tool_confirmation", tool_use_id="x", result="allow").now.idle
    assert uses.say("session.thread_status_terminated", session_thread_id="t").now.idle
    assert not uses.say("user.message").now.idle
    assert uses.idle().now.idle
    assert not uses.say("something.new").now.idle


def test_interrupt_cancels_waiting_calls_but_not_later_ones() -> None:
    uses = ToolUses().use("a").use("b", evaluated_permission="ask").say("user.interrupt").use("c")
    assert uses.now.is_interrupted("a")
    assert uses.now.is_interrupted("b")
    assert not uses.now.is_interrupted("c")
    assert [call.id for call in uses.now.runnable()] == ["c"]
    assert uses.next == "a"  # this call gets an answer but is not run


def test_termination_of_thread_removes_its_calls() -> None:
    uses = ToolUses().use("a", session_thread_id="t").use("b", session_thread_id="u").use("c")
    assert uses.say("session.thread_status_terminated", session_thread_id="t").next == "b"


@pytest.mark.parametrize("kind", ["session.status_terminated", "session.deleted"])
def test_termination_or_deletion_event_ends_conversation(kind: str) -> None:
    uses = ToolUses()
    assert not uses.now.ended
    assert uses.say(kind).now.ended


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"type": None},
        {"type": "agent.tool_use"},
        {"type": "agent.tool_use", "id": "a", "name": ["bash"], "input": "x"},
        {"type": "user.tool_result"},
        {"type": "user.tool_confirmation"},
        {"type": "session.status_idle"},
        {"type": "session.status_idle", "stop_reason": "end_turn"},
        {"type": "session.thread_status_terminated"},
    ],
)
def test_malformed_event_leaves_calls_unchanged(event: dict[str, Any]) -> None:
    uses = ToolUses().use("z", session_thread_id="t")
    uses.now.apply(event)
    assert uses.next == "z"
