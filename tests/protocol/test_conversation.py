"""Conversations: clients send events in any order, and the server is killed in between."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.protocol.sqlite_control_plane import ENV, TOKEN
from tests.protocol.test_sqlite import start_server
from workpool.server import APIError
from workpool.server.conversation import Conversation, EventFilter, StoredEvent
from workpool.server.parsing.session_script import parse_script

if TYPE_CHECKING:
    from pathlib import Path

ENTRY = st.fixed_dictionaries(
    {
        "name": st.just("Bash"),
        "custom": st.booleans(),
        "permission": st.sampled_from(["allow", "allow", "ask", "deny"]),
    }
)
USES = {"agent.tool_use", "agent.custom_tool_use"}
RESULTS = {"user.tool_result", "user.custom_tool_result", "agent.tool_result"}


def get_tool_use_id_of_answer(event: StoredEvent) -> str:
    """Return the id of the tool use that this event answers, allows or denies."""
    value = event.value
    return str(value.get("tool_use_id", value.get("custom_tool_use_id")))


class ConversationStateMachine(RuleBasedStateMachine):
    """Hypothesis state machine: clients of a conversation send any event at any time."""

    @initialize(script=st.none() | st.lists(ENTRY, max_size=4))
    def start_session(self, script: list[dict[str, Any]] | None) -> None:
        self.script = None if script is None else parse_script(script)
        self.conversation = Conversation(self.script)
        self.emit_server_events_until_waiting()

    def emit_server_events_until_waiting(self) -> None:
        for _ in range(50):
            if (fields := self.conversation.next_server_event()) is None:
                return
            self.append_event(fields)
        raise AssertionError("the script never waits or ends")

    def append_event(self, fields: dict[str, Any]) -> None:
        event_id = f"evt_{len(self.conversation.events):03}"
        self.conversation.append_event(StoredEvent(event_id, "sess_1", {"id": event_id, **fields}))

    def append_client_events_if_accepted(self, *events: dict[str, Any]) -> bool:
        try:
            self.conversation.validate_client_events(events)
        except APIError:
            return False
        for fields in events:
            self.append_event(fields)
        self.emit_server_events_until_waiting()
        return True

    def list_tool_use_events(self) -> list[StoredEvent]:
        return [event for event in self.conversation.events if event.type in USES]

    def make_tool_result_event(self, pick: int, *, custom: bool) -> dict[str, Any]:
        uses = self.list_tool_use_events()
        use_id = uses[pick % len(uses)].id if uses else "evt_none"
        if custom:
            return {"type": "user.custom_tool_result", "custom_tool_use_id": use_id}
        return {"type": "user.tool_result", "tool_use_id": use_id}

    @rule(picks=st.lists(st.integers(0, 9), min_size=1, max_size=2), custom=st.booleans())
    def send_tool_results(self, picks: list[int], *, custom: bool) -> None:
        self.append_client_events_if_accepted(
            *[self.make_tool_result_event(pick, custom=custom) for pick in picks]
        )

    @rule(pick=st.integers(0, 9), verdict=st.sampled_from(["allow", "deny"]), at_once=st.booleans())
    def send_tool_confirmation(self, pick: int, verdict: str, *, at_once: bool) -> None:
        use_id = self.make_tool_result_event(pick, custom=False)["tool_use_id"]
        said = [{"type": "user.tool_confirmation", "tool_use_id": use_id, "result": verdict}]
        if at_once:
            said.append(self.make_tool_result_event(pick, custom=False))
        self.append_client_events_if_accepted(*said)

    @rule(first=st.booleans())
    def send_message(self, *, first: bool) -> None:
        message = {"type": "user.message", "content": []}
        self.append_client_events_if_accepted(
            message, {"type": "user.interrupt"}
        ) if first else self.append_client_events_if_accepted(message)

    @rule(more=st.booleans())
    def send_interrupt(self, *, more: bool) -> None:
        said = ({"type": "user.interrupt"}, {"type": "user.message", "content": []})
        self.append_client_events_if_accepted(
            *said
        ) if more else self.append_client_events_if_accepted(said[0])

    @rule(custom=st.booleans(), permission=st.sampled_from(["allow", "ask", "deny"]))
    def emit_tool_use(self, permission: str, *, custom: bool) -> None:
        """Append a tool use as the agent does, unless the conversation refuses the tool use.

        Only a conversation that follows a script may refuse a tool use.
        """
        kind = "agent.custom_tool_use" if custom else "agent.tool_use"
        event = {"type": kind, "evaluated_permission": permission}
        try:
            self.conversation.validate_server_events([event])
        except APIError:
            assert self.script is not None
            return
        self.append_event(event)
        self.emit_server_events_until_waiting()

    @invariant()
    def every_tool_use_is_answered_at_most_once(self) -> None:
        answers = [
            get_tool_use_id_of_answer(event)
            for event in self.conversation.events
            if event.type in RESULTS
        ]
        assert len(answers) == len(set(answers))
        assert set(answers) <= {event.id for event in self.list_tool_use_events()}

    @invariant()
    def script_emits_one_tool_use_at_a_time(self) -> None:
        if self.script is not None:
            uses = self.list_tool_use_events()
            assert len(uses) <= len(self.script)
            answers = {
                get_tool_use_id_of_answer(event)
                for event in self.conversation.events
                if event.type in RESULTS
            }
            assert all(use.id in answers for use in uses[:-1])

    @invariant()
    def stop_reason_has_ids_of_waiting_tool_uses(self) -> None:
        answers = {
            get_tool_use_id_of_answer(event)
            for event in self.conversation.events
            if event.type in RESULTS
        }
        allowed = {
            get_tool_use_id_of_answer(event)
            for event in self.conversation.events
            if event.type == "user.tool_confirmation" and event.value["result"] == "allow"
        }
        waiting = [
            use.id
            for use in self.list_tool_use_events()
            if use.id not in answers
            and (use.type == "agent.custom_tool_use" or use.id not in allowed)
            and (use.type == "agent.custom_tool_use" or use.value["evaluated_permission"] == "ask")
        ]
        states = [
            event for event in self.conversation.events if event.type.startswith("session.status")
        ]
        reason = states[-1].value.get("stop_reason", {}) if states else {}
        assert list(reason.get("event_ids", ())) == waiting

    @invariant()
    def replayed_events_give_same_conversation(self) -> None:
        again = Conversation(self.script)
        for event in self.conversation.events:
            again.append_event(event)
        assert again.next_server_event() is None
        for name, value in vars(self.conversation).items():
            assert vars(again)[name] == value, name

    def teardown(self) -> None:
        """Answer every tool use of the script, and check that the script then ends."""
        if getattr(self, "script", None) is None:
            return
        self.append_client_events_if_accepted({"type": "user.message", "content": []})
        for _ in range(len(self.script or ())):
            use = self.list_tool_use_events()[-1]
            self.append_client_events_if_accepted(
                {"type": "user.tool_confirmation", "tool_use_id": use.id, "result": "allow"}
            )
            at = len(self.list_tool_use_events()) - 1
            self.append_client_events_if_accepted(
                self.make_tool_result_event(at, custom=use.type == "agent.custom_tool_use")
            )
        assert self.conversation.events[-1].value.get("stop_reason") == {"type": "end_turn"}
        assert len(self.list_tool_use_events()) == len(self.script or ())


ConversationStateMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=20, deadline=None
)
TestConversation = ConversationStateMachine.TestCase


class ToolUseAnsweringClient:
    """A client that answers the tool uses of a scripted session and records all events."""

    def __init__(self, http: aiohttp.ClientSession, port: int) -> None:
        self.http = http
        self.base = f"http://127.0.0.1:{port}/api/v1/cloud"
        self.known: dict[str, dict[str, Any]] = {}
        self.session_id = ""

    async def send_request(self, method: str, url: str, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with self.http.request(method, url, headers=headers, **options) as response:
            assert response.status == 200
            body = await response.json()
        for event in body["data"] if url.endswith("/events") else ():
            self.known[event["id"]] = event
        return body

    async def start_session(self) -> None:
        script = [{"name": "Bash", "custom": number % 2 == 1} for number in range(400)]
        created = await self.send_request(
            "POST", f"{self.base}/environments/{ENV}/work", json={"script": script}
        )
        self.session_id = created["data"][0]["data"]["id"]

    @property
    def events_url(self) -> str:
        return f"{self.base}/sessions/{self.session_id}/events"

    async def answer_new_tool_uses(self) -> None:
        """Read the events after the last known one, and send a result for each new tool use."""
        last = max(self.known, default=None)
        params = {"limit": "100"} if last is None else {"limit": "100", "after_id": last}
        for event in (await self.send_request("GET", self.events_url, params=params))["data"]:
            if event["type"] in USES:
                custom = event["type"] == "agent.custom_tool_use"
                answer = {
                    "type": "user.custom_tool_result" if custom else "user.tool_result",
                    "custom_tool_use_id" if custom else "tool_use_id": event["id"],
                }
                await self.send_request("POST", self.events_url, json={"events": [answer]})

    async def read_history(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        params = {"limit": "100"}
        while True:
            page = await self.send_request("GET", self.events_url, params=params)
            events += page["data"]
            if not page["has_more"]:
                return events
            params = {"limit": "100", "page": page["next_page"]}


@pytest.mark.trial
async def test_killed_control_plane_keeps_events_of_requests_that_it_answered(
    tmp_path: Path,
) -> None:
    async with aiohttp.ClientSession() as http:
        async with start_server(tmp_path / "work.db") as (process, port):
            clients = [ToolUseAnsweringClient(http, port) for _ in range(4)]
            enough = asyncio.Event()

            async def answer_tool_uses_until_server_is_killed(
                client: ToolUseAnsweringClient,
            ) -> None:
                await client.start_session()
                try:
                    while True:
                        await client.answer_new_tool_uses()
                        if sum(len(each.known) for each in clients) > 300:
                            enough.set()
                except (aiohttp.ClientError, ConnectionError):
                    return

            async with asyncio.TaskGroup() as group:
                for client in clients:
                    group.create_task(answer_tool_uses_until_server_is_killed(client))
                await enough.wait()
                process.send_signal(signal.SIGKILL)
        async with start_server(tmp_path / "work.db") as (_, port):
            for client in clients:
                again = ToolUseAnsweringClient(http, port)
                again.session_id = client.session_id
                events = {event["id"]: event for event in await again.read_history()}
                assert client.known.items() <= events.items()
                answers = [
                    event.get("tool_use_id") or event["custom_tool_use_id"]
                    for event in events.values()
                    if event["type"] in RESULTS
                ]
                assert len(answers) == len(set(answers))
                again.known = {}
                uses = [each for each in events.values() if each["type"] in USES]
                assert [each["id"] for each in uses[:-1]] == answers
                before = len(events)
                again.known = dict(list(events.items())[:-3])
                await again.answer_new_tool_uses()
                assert len(await again.read_history()) > before


class EventListWithReadCounter(list[StoredEvent]):
    """A list of events that counts how often an element is read."""

    reads = 0

    def __getitem__(self, place: Any) -> Any:
        self.reads += 1
        return super().__getitem__(place)


def long_conversation() -> Conversation:
    """Return a conversation of 10,000 events.

    Of each 1,000 events, one is a user message, one is an interrupt, and all others are messages
    of the agent.
    """
    conversation = Conversation()
    rare = {0: "user.message", 1: "user.interrupt"}
    for number in range(10_000):
        kind = rare.get(number % 1000, "agent.message")
        conversation.append_event(StoredEvent(f"evt_{number:05}", "sess_1", {"type": kind}))
    return conversation


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("after", ["", "evt_03000"])
@pytest.mark.parametrize("before", [None, "evt_07001"])
@pytest.mark.parametrize("types", [{"user.message"}, {"user.interrupt", "user.message", "none"}])
def test_page_filtered_by_rare_event_type_reads_few_events(
    types: set[str], before: str | None, after: str, *, newest_first: bool
) -> None:
    conversation = long_conversation()
    wanted = [
        event
        for event in conversation.events
        if event.type in types and after < event.id and (before is None or event.id < before)
    ]
    nearest = wanted[-4:] if newest_first or before is not None else wanted[:4]
    counted = conversation.events = EventListWithReadCounter(conversation.events)
    found = conversation.list_events(
        4,
        after=after,
        before=before,
        wanted=EventFilter(types=frozenset(types), newest_first=newest_first),
    )
    assert list(found) == (nearest[::-1] if newest_first else nearest)
    # 50 reads are enough for 4 events and two binary searches, but not for a scan.
    assert counted.reads < 50
