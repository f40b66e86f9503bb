"""Tests of `Conversation`: how each session event changes the open tool calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from workpool_toolset.conversation import Conversation

if TYPE_CHECKING:
    from workpool_toolset.toolbox import ToolCall


class ConversationTestbed:
    """A `Conversation` of a worker with two tools, and methods that apply events to it."""

    def __init__(self) -> None:
        self.denied: list[str] = []
        self.now = Conversation(
            "sess_1", self.is_call_for_this_worker, lambda call: self.denied.append(call.id)
        )

    @staticmethod
    def is_call_for_this_worker(call: ToolCall) -> bool:
        return call.name == ("weather" if call.custom else "bash")

    def add_tool_use(
        self, name: str, tool: str = "bash", *, custom: bool = False, **more: Any
    ) -> ConversationTestbed:
        kind = "agent.custom_tool_use" if custom else "agent.tool_use"
        return self.apply_event(kind, id=name, name=tool, input={"command": "ls"}, **more)

    def apply_event(self, kind: str, **fields: Any) -> ConversationTestbed:
        self.now.apply_event({"type": kind, **fields})
        return self

    def end_turn(self, reason: object = "end_turn") -> ConversationTestbed:
        return self.apply_event("session.status_idle", stop_reason={"type": reason})

    @property
    def next_tool_call(self) -> str | None:
        call = self.now.next_tool_call()
        return call.id if call else None


def test_next_tool_call_is_oldest_call_without_answer() -> None:
    uses = (
        ConversationTestbed()
        .add_tool_use("a")
        .add_tool_use("b", "weather", custom=True)
        .add_tool_use("c")
    )
    assert uses.next_tool_call == "a"
    assert [call.id for call in uses.now.runnable_tool_calls()] == ["a", "b", "c"]
    uses.now.mark_call_answered("a")
    assert uses.next_tool_call == "b"
    uses.apply_event("user.custom_tool_result", custom_tool_use_id="b")
    uses.apply_event("agent.tool_result", tool_use_id="c")
    assert uses.next_tool_call is None


def test_conversation_waits_for_person_to_confirm_call_or_send_message() -> None:
    uses = ConversationTestbed().add_tool_use("a", evaluated_permission="ask")
    assert uses.now.waits_for_person_or_application
    assert uses.end_turn("requires_action").now.waits_for_person_or_application
    uses.apply_event("user.tool_confirmation", tool_use_id="a", result="allow")
    assert not uses.now.waits_for_person_or_application
    uses.now.mark_call_answered("a")
    assert not uses.apply_event("session.status_running").now.waits_for_person_or_application
    assert uses.end_turn().now.waits_for_person_or_application
    assert (
        uses.add_tool_use("browse", custom=True)
        .end_turn("requires_action")
        .now.waits_for_person_or_application
    )


def test_call_needs_no_answer_if_result_arrives_before_tool_use_event() -> None:
    assert (
        ConversationTestbed()
        .apply_event("user.tool_result", tool_use_id="a")
        .add_tool_use("a")
        .next_tool_call
        is None
    )


def test_answered_call_stays_answered_when_its_tool_use_event_arrives_again() -> None:
    uses = ConversationTestbed().add_tool_use("a")
    uses.now.mark_call_answered("a")
    assert uses.add_tool_use("a").next_tool_call is None


def test_calls_of_unknown_tools_are_left_to_other_clients() -> None:
    uses = (
        ConversationTestbed()
        .add_tool_use("a", "browser")
        .add_tool_use("b", "bash", custom=True)
        .add_tool_use("c", "weather")
    )
    assert uses.next_tool_call is None
    assert uses.end_turn().now.is_idle
    assert uses.denied == []
    assert uses.apply_event("agent.mcp_tool_use", id="d", name="bash").next_tool_call is None


@pytest.mark.parametrize("permission", ["ask", "unknown", 1, {}])
def test_tool_call_without_granted_permission_is_skipped_until_user_allows_it(
    permission: object,
) -> None:
    uses = (
        ConversationTestbed().add_tool_use("a", evaluated_permission=permission).add_tool_use("b")
    )
    assert uses.next_tool_call == "b"
    uses.now.mark_call_answered("b")
    assert not uses.end_turn().now.is_idle
    assert (
        uses.apply_event("user.tool_confirmation", tool_use_id="a", result="allow").next_tool_call
        == "a"
    )


@pytest.mark.parametrize("verdict", ["deny", "unknown", None])
def test_denied_call_is_never_run(verdict: object) -> None:
    uses = ConversationTestbed().add_tool_use("a", evaluated_permission="ask")
    uses.apply_event("user.tool_confirmation", tool_use_id="a", result=verdict)
    assert (uses.next_tool_call, uses.denied) == (None, ["a"])
    uses.apply_event("user.tool_confirmation", tool_use_id="a", result="allow")
    assert uses.add_tool_use("a").next_tool_call is None
    assert uses.end_turn().now.is_idle
    assert ConversationTestbed().add_tool_use("a", evaluated_permission="deny").denied == ["a"]


@pytest.mark.parametrize(("verdict", "follows"), [("allow", "a"), ("deny", None)])
def test_call_is_allowed_or_denied_by_confirmation_that_arrived_first(
    verdict: str, follows: str | None
) -> None:
    uses = ConversationTestbed().apply_event(
        "user.tool_confirmation", tool_use_id="a", result=verdict
    )
    assert uses.add_tool_use("a", evaluated_permission="ask").next_tool_call == follows


def test_automatically_permitted_call_is_not_run_after_person_denied_it() -> None:
    uses = (
        ConversationTestbed()
        .add_tool_use("a")
        .apply_event("user.tool_confirmation", tool_use_id="a", result="deny")
    )
    assert uses.next_tool_call is None


@pytest.mark.parametrize(
    ("reason", "idle"),
    [("end_turn", True), ("retries_exhausted", True), (None, True), ("requires_action", False)],
)
def test_conversation_is_idle_after_turn_unless_stop_reason_is_requires_action(
    reason: object, *, idle: bool
) -> None:
    assert ConversationTestbed().end_turn(reason).now.is_idle is idle


def test_message_ends_idle_state_but_confirmation_does_not() -> None:
    uses = ConversationTestbed().end_turn()
    assert uses.apply_event("user.tool_confirmation", tool_use_id="x", result="allow").now.is_idle
    assert uses.apply_event("session.thread_status_terminated", session_thread_id="t").now.is_idle
    assert not uses.apply_event("user.message").now.is_idle
    assert uses.end_turn().now.is_idle
    assert not uses.apply_event("something.new").now.is_idle


def test_interrupt_applies_to_unanswered_calls_but_not_to_later_calls() -> None:
    uses = (
        ConversationTestbed()
        .add_tool_use("a")
        .add_tool_use("b", evaluated_permission="ask")
        .apply_event("user.interrupt")
        .add_tool_use("c")
    )
    assert uses.now.is_interrupted("a")
    assert uses.now.is_interrupted("b")
    assert not uses.now.is_interrupted("c")
    assert [call.id for call in uses.now.runnable_tool_calls()] == ["c"]
    # The worker must still answer the interrupted call "a", with an error.
    assert uses.next_tool_call == "a"


def test_termination_of_agent_thread_closes_open_calls_of_that_thread() -> None:
    uses = (
        ConversationTestbed()
        .add_tool_use("a", session_thread_id="t")
        .add_tool_use("b", session_thread_id="u")
        .add_tool_use("c")
    )
    assert (
        uses.apply_event("session.thread_status_terminated", session_thread_id="t").next_tool_call
        == "b"
    )


@pytest.mark.parametrize("kind", ["session.status_terminated", "session.deleted"])
def test_termination_or_deletion_event_ends_conversation(kind: str) -> None:
    uses = ConversationTestbed()
    assert not uses.now.ended
    assert uses.apply_event(kind).now.ended


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
    uses = ConversationTestbed().add_tool_use("z", session_thread_id="t")
    uses.now.apply_event(event)
    assert uses.next_tool_call == "z"
