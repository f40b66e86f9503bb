"""The events of a session: listing and sending them, and scripted sessions.

See workpool/docs/protocol.md, "Events" and "Scripted sessions".
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from tests.protocol.conftest import CLOUD, ENV, LIMITED, OTHER, TOKEN, ApiClient, HttpAnswer
from workpool.server import APIError, ControlPlane, SqliteStore

if TYPE_CHECKING:
    from pathlib import Path

    import aiohttp

    from tests.manual_clock import ManualClock

BASH: dict[str, Any] = {"name": "Bash", "input": {"command": "ls"}}
CUSTOM: dict[str, Any] = {"name": "weather", "input": {"city": "Ulm"}, "custom": True}
START_TIME = "2026-03-01T12:00:00.000000Z"
TEXT = [{"type": "text", "text": "hello"}]


def events_path(api: ApiClient, session_id: str, suffix: str = "/events") -> str:
    written = session_id if api.dialect == "qoder" else session_id.replace("sess_", "session_")
    return f"{api.base_url}/sessions/{written}{suffix}"


async def event_history(api: ApiClient, session_id: str) -> list[dict[str, Any]]:
    answer = await api("GET", events_path(api, session_id), params={"limit": "100"})
    assert answer.status == 200
    assert answer.body["has_more"] is False
    events: list[dict[str, Any]] = answer.body["data"]
    return events


async def list_event_types(api: ApiClient, session_id: str) -> list[str]:
    return [event["type"] for event in await event_history(api, session_id)]


async def send_events(api: ApiClient, session_id: str, *events: object) -> HttpAnswer:
    return await api("POST", events_path(api, session_id), json={"events": events})


async def session_status(api: ApiClient, session_id: str) -> str:
    word: str = (await api("GET", events_path(api, session_id, ""))).body["status"]
    return word


def tool_result(use: dict[str, Any], text: str = "done", **more: object) -> dict[str, Any]:
    custom = use["type"] == "agent.custom_tool_use"
    return {
        "type": "user.custom_tool_result" if custom else "user.tool_result",
        "custom_tool_use_id" if custom else "tool_use_id": use["id"],
        "content": [{"type": "text", "text": text}],
        **more,
    }


def create_scripted_session(api: ApiClient, *entries: dict[str, Any]) -> str:
    (item,) = api.plane.enqueue(script=entries)
    return item.session_id


async def last_event_of_type(api: ApiClient, session_id: str, kind: str) -> dict[str, Any]:
    return [event for event in await event_history(api, session_id) if event["type"] == kind][-1]


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_scripted_session_emits_events_from_first_to_last(api: ApiClient) -> None:
    body = {"script": [BASH, {"name": "Read", "input": {"file_path": "a"}, "permission": "allow"}]}
    created = await api("POST", api.work_url(), json=body)
    assert created.status == 200
    session_id = created.body["data"][0]["data"]["id"].replace("session_", "sess_")

    message, running, first = await event_history(api, session_id)
    assert message == {
        "id": message["id"],
        "type": "user.message",
        "content": [{"type": "text", "text": "Run the script."}],
        "processed_at": START_TIME,
    }
    assert running == {
        "id": running["id"],
        "type": "session.status_running",
        "processed_at": START_TIME,
    }
    assert first == {
        "id": first["id"],
        "type": "agent.tool_use",
        "name": "Bash",
        "input": {"command": "ls"},
        "evaluated_permission": "allow",
        "processed_at": START_TIME,
    }
    assert await session_status(api, session_id) == "running"

    sent = await send_events(api, session_id, tool_result(first, is_error=False))
    assert sent.status == 200
    (stored,) = sent.body["data"]
    assert stored == {
        "id": stored["id"],
        "type": "user.tool_result",
        "tool_use_id": first["id"],
        "content": [{"type": "text", "text": "done"}],
        "is_error": False,
        "processed_at": START_TIME,
    }
    second = await last_event_of_type(api, session_id, "agent.tool_use")
    assert (second["name"], second["input"]) == ("Read", {"file_path": "a"})
    await send_events(api, session_id, tool_result(second))

    events = await event_history(api, session_id)
    assert [event["type"] for event in events] == [
        "user.message",
        "session.status_running",
        "agent.tool_use",
        "user.tool_result",
        "agent.tool_use",
        "user.tool_result",
        "agent.message",
        "session.status_idle",
    ]
    assert events[-1]["stop_reason"] == {"type": "end_turn"}
    ids = [event["id"] for event in events]
    assert ids == sorted(set(ids))
    assert all(name.startswith("evt_") and len(name) == 36 for name in ids)
    assert await session_status(api, session_id) == "idle"


async def test_scripted_session_without_tool_uses_becomes_idle_at_once(api: ApiClient) -> None:
    assert await list_event_types(api, create_scripted_session(api)) == [
        "user.message",
        "session.status_running",
        "agent.message",
        "session.status_idle",
    ]


async def test_scripted_sessions_of_one_enqueue_call_proceed_independently(
    api: ApiClient,
) -> None:
    first, second = (item.session_id for item in api.plane.enqueue(2, script=[BASH]))
    await send_events(
        api, first, tool_result(await last_event_of_type(api, first, "agent.tool_use"))
    )
    assert (await list_event_types(api, first))[-1] == "session.status_idle"
    assert (await list_event_types(api, second))[-1] == "agent.tool_use"


async def test_scripted_session_waits_for_result_of_custom_tool_use(api: ApiClient) -> None:
    session_id = create_scripted_session(api, CUSTOM, BASH)
    use, idle = (await event_history(api, session_id))[2:]
    assert (use["type"], use["name"]) == ("agent.custom_tool_use", "weather")
    assert idle["type"] == "session.status_idle"
    assert idle["stop_reason"] == {"type": "requires_action", "event_ids": [use["id"]]}
    assert await session_status(api, session_id) == "idle"
    wrong = {"type": "user.tool_result", "tool_use_id": use["id"]}
    assert (await send_events(api, session_id, wrong)).status == 400
    assert (await send_events(api, session_id, tool_result(use))).status == 200
    assert (await list_event_types(api, session_id))[4:] == [
        "user.custom_tool_result",
        "session.status_running",
        "agent.tool_use",
    ]


async def test_scripted_session_waits_for_confirmation_of_tool_use_that_asks_permission(
    api: ApiClient,
) -> None:
    session_id = create_scripted_session(api, {**BASH, "permission": "ask"})
    use, idle = (await event_history(api, session_id))[2:]
    assert use["evaluated_permission"] == "ask"
    assert idle["stop_reason"] == {"type": "requires_action", "event_ids": [use["id"]]}
    early = await send_events(api, session_id, tool_result(use))
    assert (early.status, early.error["type"]) == (409, "conflict_error")
    allow = {"type": "user.tool_confirmation", "tool_use_id": use["id"], "result": "allow"}
    assert (await send_events(api, session_id, allow)).status == 200
    again = await send_events(api, session_id, allow)
    assert (again.status, again.error["type"]) == (409, "conflict_error")
    assert (await list_event_types(api, session_id))[-1] == "session.status_running"
    assert (await send_events(api, session_id, tool_result(use))).status == 200
    assert (await list_event_types(api, session_id))[-2:] == [
        "agent.message",
        "session.status_idle",
    ]


@pytest.mark.parametrize("verdicts", [("allow", "deny"), ("deny", "allow"), ("allow", "allow")])
async def test_batch_with_two_confirmations_of_one_tool_use_is_409(
    api: ApiClient, verdicts: tuple[str, str]
) -> None:
    session_id = create_scripted_session(api, {**BASH, "permission": "ask"})
    use = await last_event_of_type(api, session_id, "agent.tool_use")
    decision = {"type": "user.tool_confirmation", "tool_use_id": use["id"]}
    answer = await send_events(
        api, session_id, *({**decision, "result": word} for word in verdicts)
    )
    assert (answer.status, answer.error["type"]) == (409, "conflict_error")
    assert len(await event_history(api, session_id)) == 4


async def test_denied_tool_use_is_answered_by_server(api: ApiClient) -> None:
    session_id = create_scripted_session(
        api, {**BASH, "permission": "ask"}, {**BASH, "permission": "deny"}
    )
    use = await last_event_of_type(api, session_id, "agent.tool_use")
    deny = {
        "type": "user.tool_confirmation",
        "tool_use_id": use["id"],
        "result": "deny",
        "deny_message": "not on a Sunday",
    }
    assert (await send_events(api, session_id, deny)).status == 200
    events = await event_history(api, session_id)
    assert [event["type"] for event in events[4:]] == [
        "user.tool_confirmation",
        "agent.tool_result",
        "session.status_running",
        "agent.tool_use",
        "agent.tool_result",
        "agent.message",
        "session.status_idle",
    ]
    assert events[5] == {
        "id": events[5]["id"],
        "type": "agent.tool_result",
        "tool_use_id": use["id"],
        "content": [{"type": "text", "text": "not on a Sunday"}],
        "is_error": True,
        "processed_at": START_TIME,
    }
    assert events[7]["evaluated_permission"] == "deny"
    assert events[8]["tool_use_id"] == events[7]["id"]
    late = await send_events(api, session_id, tool_result(use))
    assert (late.status, late.error["type"]) == (409, "conflict_error")


async def test_scripted_session_ends_turn_on_interrupt_and_continues_on_message(
    api: ApiClient,
) -> None:
    session_id = create_scripted_session(api, BASH, BASH)
    use = await last_event_of_type(api, session_id, "agent.tool_use")
    assert (await send_events(api, session_id, {"type": "user.interrupt"})).status == 200
    events = await event_history(api, session_id)
    assert [event["type"] for event in events[3:]] == [
        "user.interrupt",
        "agent.tool_result",
        "session.status_idle",
    ]
    assert events[-1]["stop_reason"] == {"type": "end_turn"}
    assert (await send_events(api, session_id, tool_result(use))).status == 409
    assert (await send_events(api, session_id, {"type": "user.interrupt"})).status == 200
    assert (await list_event_types(api, session_id))[-1] == "user.interrupt"
    await send_events(api, session_id, {"type": "user.message", "content": TEXT})
    assert (await list_event_types(api, session_id))[-2:] == [
        "session.status_running",
        "agent.tool_use",
    ]


async def test_interrupt_with_message_begins_new_turn(api: ApiClient) -> None:
    session_id = create_scripted_session(api, {**BASH, "permission": "ask"}, BASH)
    message = {"type": "user.message", "content": TEXT}
    assert (await send_events(api, session_id, {"type": "user.interrupt"}, message)).status == 200
    assert (await list_event_types(api, session_id))[4:] == [
        "user.interrupt",
        "user.message",
        "agent.tool_result",
        "session.status_idle",
        "session.status_running",
        "agent.tool_use",
    ]


async def test_scripted_session_answers_message_after_end_of_its_script(api: ApiClient) -> None:
    session_id = create_scripted_session(api)
    await send_events(api, session_id, {"type": "user.message", "content": TEXT})
    assert (await list_event_types(api, session_id))[4:] == [
        "user.message",
        "session.status_running",
        "agent.message",
        "session.status_idle",
    ]


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_batch_with_one_invalid_event_is_refused_completely(api: ApiClient) -> None:
    session_id = create_scripted_session(api, BASH)
    use = await last_event_of_type(api, session_id, "agent.tool_use")
    before = await event_history(api, session_id)
    message = {"type": "user.message", "content": TEXT}
    unknown = {"type": "user.tool_result", "tool_use_id": "evt_" + "0" * 32}
    for batch, code, kind in (
        ([message, {"type": "agent.message"}], 400, "invalid_request_error"),
        ([message, unknown], 400, "invalid_request_error"),
        ([tool_result(use), tool_result(use)], 409, "conflict_error"),
        ([tool_result(use), {"type": "user.message"}], 400, "invalid_request_error"),
    ):
        answer = await send_events(api, session_id, *batch)
        assert (answer.status, answer.error["type"]) == (code, kind)
    assert await event_history(api, session_id) == before
    assert (await send_events(api, session_id, message, tool_result(use))).status == 200


async def test_second_result_for_tool_use_is_409(api: ApiClient) -> None:
    session_id = create_scripted_session(api, BASH, BASH)
    use = await last_event_of_type(api, session_id, "agent.tool_use")
    await send_events(api, session_id, tool_result(use))
    for text in ("done", "something else"):
        answer = await send_events(api, session_id, tool_result(use, text))
        assert (answer.status, answer.error["type"]) == (409, "conflict_error")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"[]", None),
        (b"{}", "events"),
        (b'{"events": {}}', "events"),
        (b'{"events": []}', "events"),
        (b'{"events": [1]}', "events"),
        (b'{"events": [{}]}', "type"),
        (b'{"events": [{"type": []}]}', "type"),
        (b'{"events": [{"type": "agent.tool_use", "name": "Bash"}]}', "type"),
        (b'{"events": [{"type": "session.status_idle"}]}', "type"),
        (b'{"events": [{"type": "user.unheard_of"}]}', "type"),
        (b'{"events": [{"type": "user.message"}]}', "content"),
        (b'{"events": [{"type": "user.message", "content": []}]}', "content"),
        (b'{"events": [{"type": "user.message", "content": "hi"}]}', "content"),
        (b'{"events": [{"type": "user.message", "content": [{"type": "text"}]}]}', "content"),
        (b'{"events": [{"type": "user.tool_result"}]}', "tool_use_id"),
        (b'{"events": [{"type": "user.tool_result", "tool_use_id": 1}]}', "tool_use_id"),
        (b'{"events": [{"type": "user.tool_result", "tool_use_id": "e", "is_error": 1}]}',
         "is_error"),
        (b'{"events": [{"type": "user.tool_result", "tool_use_id": "e", "content": [1]}]}',
         "content"),
        (b'{"events": [{"type": "user.custom_tool_result", "tool_use_id": "e"}]}',
         "custom_tool_use_id"),
        (b'{"events": [{"type": "user.tool_confirmation", "tool_use_id": "e"}]}', "result"),
        (b'{"events": [{"type": "user.tool_confirmation", "tool_use_id": "e", "result": "yes"}]}',
         "result"),
        (b'{"events": [{"type": "user.tool_confirmation", "tool_use_id": "e", "result": "allow",'
         b' "deny_message": "no"}]}', "deny_message"),
        (b'{"events": [{"type": "user.tool_confirmation", "tool_use_id": "e", "result": "allow"}]}',
         None),
        (b'{"events": [' + b",".join([b'{"type": "user.interrupt"}'] * 101) + b"]}", "events"),
        (b'{"events": [{"type": "user.message", "content": [{"type": "x", "x": '
         + b"[" * 260 + b"]" * 260 + b"}]}]}", "events"),
    ],
)  # fmt: skip
async def test_malformed_events_are_400_and_append_nothing(
    api: ApiClient, body: bytes, param: str | None
) -> None:
    session_id = create_scripted_session(api, BASH)
    answer = await api("POST", events_path(api, session_id), data=body)
    assert answer.status == 400
    assert answer.error.get("param") == param
    assert len(await event_history(api, session_id)) == 3


async def test_unknown_fields_of_event_are_dropped(api: ApiClient) -> None:
    session_id = create_scripted_session(api)
    message = {"type": "user.message", "content": TEXT, "id": "evt_mine", "colour": "red"}
    (stored,) = (await send_events(api, session_id, message)).body["data"]
    assert set(stored) == {"id", "type", "content", "processed_at"}
    assert stored["id"] != "evt_mine"


async def test_reading_and_sending_session_events_needs_token_for_the_environment(
    api: ApiClient, http_session: aiohttp.ClientSession
) -> None:
    mine, theirs = (
        api.plane.enqueue(environment_id=name, script=[BASH])[0].session_id for name in (ENV, OTHER)
    )
    for token, session_id, code in (
        (None, mine, 401),
        ("wrong", mine, 401),
        (LIMITED, mine, 200),
        (LIMITED, theirs, 403),
        (TOKEN, theirs, 200),
        (TOKEN, "sess_" + "0" * 32, 404),
        (TOKEN, "nonsense", 404),
    ):
        as_them = ApiClient(api.plane, http_session, api.dialect, token)
        assert (await as_them("GET", events_path(api, session_id))).status == code
        sent = await as_them(
            "POST", events_path(api, session_id), json={"events": [{"type": "user.interrupt"}]}
        )
        assert sent.status == code
        assert code == 200 or (
            (await as_them("GET", events_path(api, session_id, "/events/stream"))).status == code
        )


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_event_list_can_be_read_forward_and_backward_page_by_page(api: ApiClient) -> None:
    session_id = create_scripted_session(api)
    for _ in range(5):
        await send_events(api, session_id, {"type": "user.message", "content": TEXT})
    url = events_path(api, session_id)
    whole = await event_history(api, session_id)
    assert len(whole) == 24
    ids = [event["id"] for event in whole]

    page = (await api("GET", url)).body
    assert page["data"] == whole[:20]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[0], ids[19], True)
    rest = (await api("GET", url, params={"page": page["next_page"]})).body
    assert rest["data"] == whole[20:]
    assert (rest["has_more"], rest["next_page"]) == (False, None)

    after = (await api("GET", url, params={"after_id": ids[21], "limit": "1"})).body
    assert (after["data"], after["has_more"]) == ([whole[22]], True)
    before = (await api("GET", url, params={"before_id": ids[3], "limit": "2"})).body
    assert (before["data"], before["has_more"]) == (whole[1:3], True)
    first = (await api("GET", url, params={"page": before["next_page"], "limit": "2"})).body
    assert (first["data"], first["has_more"]) == (whole[:1], False)
    none = (await api("GET", url, params={"after_id": ids[-1]})).body
    assert none == {
        "data": [], "first_id": None, "last_id": None, "has_more": False, "next_page": None
    }  # fmt: skip


async def test_session_without_events_has_empty_history(api: ApiClient) -> None:
    (item,) = api.plane.enqueue()
    assert await event_history(api, item.session_id) == []
    assert await session_status(api, item.session_id) == "idle"


@pytest.mark.parametrize(
    "params",
    [{"limit": "0"}, {"limit": "x"}, {"page": "x"}, {"after_id": "work_" + "0" * 32},
     {"before_id": "evt_x"}, {"page": "after-evt_" + "0" * 32, "after_id": "evt_" + "0" * 32}],
)  # fmt: skip
async def test_invalid_cursor_of_event_list_is_400(api: ApiClient, params: dict[str, str]) -> None:
    assert (
        await api("GET", events_path(api, create_scripted_session(api)), params=params)
    ).status == 400


async def list_event_texts(api: ApiClient, session_id: str, *params: tuple[str, str]) -> list[str]:
    """Read a list of events in pages of two and return their texts."""
    texts, page = [], None
    while True:
        query = [*params, ("limit", "2"), *([("page", page)] if page else [])]
        answer = await api("GET", events_path(api, session_id), params=query)
        assert answer.status == 200
        ids = [event["id"] for event in answer.body["data"]]
        assert (answer.body["first_id"], answer.body["last_id"]) == (
            (ids[0], ids[-1]) if ids else (None, None)
        )
        texts += [event["content"][0]["text"] for event in answer.body["data"]]
        page = answer.body["next_page"]
        assert answer.body["has_more"] is (page is not None)
        if page is None:
            return texts


@pytest.fixture
def id_of_session_with_five_events(api: ApiClient, clock: ManualClock) -> str:
    """Return the id of a session with five events, whose texts are "0" to "4".

    Their times are one second apart.
    """
    (item,) = api.plane.enqueue()
    for number in range(5):
        kind = "agent.message" if number % 2 == 0 else "agent.thinking"
        content = [{"type": "text", "text": str(number)}]
        api.plane.emit(item.session_id, {"type": kind, "content": content})
        clock.advance(1)
    return item.session_id


async def test_events_in_descending_order_are_listed_newest_first(
    api: ApiClient, id_of_session_with_five_events: str
) -> None:
    assert await list_event_texts(api, id_of_session_with_five_events, ("order", "desc")) == [
        "4",
        "3",
        "2",
        "1",
        "0",
    ]
    assert await list_event_texts(api, id_of_session_with_five_events, ("order", "asc")) == [
        "0",
        "1",
        "2",
        "3",
        "4",
    ]


@pytest.mark.parametrize("name", ["types", "types[]"])
async def test_events_are_filtered_by_type(
    api: ApiClient, id_of_session_with_five_events: str, name: str
) -> None:
    assert await list_event_texts(api, id_of_session_with_five_events, (name, "agent.message")) == [
        "0",
        "2",
        "4",
    ]
    assert await list_event_texts(
        api, id_of_session_with_five_events, (name, "agent.message"), ("order", "desc")
    ) == ["4", "2", "0"]
    both = [(name, "agent.message"), (name, "agent.thinking")]
    assert await list_event_texts(api, id_of_session_with_five_events, *both) == [
        "0",
        "1",
        "2",
        "3",
        "4",
    ]
    assert (
        await list_event_texts(api, id_of_session_with_five_events, (name, "agent.unknown")) == []
    )


@pytest.mark.parametrize(
    ("bounds", "texts"),
    [
        ({"gt": "2026-03-01T12:00:01Z"}, ["2", "3", "4"]),
        ({"gte": "2026-03-01T12:00:01.000000+00:00"}, ["1", "2", "3", "4"]),
        ({"lt": "2026-03-01T13:00:03+01:00"}, ["0", "1", "2"]),
        ({"lte": "2026-03-01T12:00:03.000Z"}, ["0", "1", "2", "3"]),
        ({"gt": "2026-03-01T12:00:00Z", "gte": "2026-03-01T12:00:02Z",
          "lt": "2026-03-01T12:00:04Z", "lte": "2026-03-01T12:00:03Z"}, ["2", "3"]),
        ({"gt": "2026-03-01T12:00:03Z", "lt": "2026-03-01T12:00:01Z"}, []),
        ({"gt": "0001-01-01T00:00:00Z", "lt": "9999-12-31T23:59:59Z"}, ["0", "1", "2", "3", "4"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_events_are_filtered_by_time(
    api: ApiClient,
    id_of_session_with_five_events: str,
    bounds: dict[str, str],
    texts: list[str],
    order: str,
) -> None:
    params = [(f"created_at[{name}]", value) for name, value in bounds.items()]
    expected = texts if order == "asc" else texts[::-1]
    assert (
        await list_event_texts(api, id_of_session_with_five_events, *params, ("order", order))
        == expected
    )


async def test_filtered_event_list_before_an_id_returns_matching_event_closest_to_id(
    api: ApiClient, id_of_session_with_five_events: str
) -> None:
    last_id = (await event_history(api, id_of_session_with_five_events))[-1]["id"]
    params = {"before_id": last_id, "types": "agent.message", "limit": "1"}
    answer = await api("GET", events_path(api, id_of_session_with_five_events), params=params)
    assert [event["content"][0]["text"] for event in answer.body["data"]] == ["2"]
    assert answer.body["has_more"] is True


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("order", "ascending"),
        ("order", ""),
        ("created_at[gt]", "yesterday"),
        ("created_at[lte]", "2026-03-01T12:00:00"),
        ("created_at[gte]", "0001-01-01T00:00:00+01:00"),
        ("created_at[lt]", ""),
    ],
)
async def test_malformed_event_filter_is_400_and_names_parameter(
    api: ApiClient, name: str, value: str
) -> None:
    answer = await api("GET", events_path(api, create_scripted_session(api)), params={name: value})
    assert (answer.status, answer.error["param"]) == (400, name)


async def test_event_list_with_both_after_id_and_descending_order_is_400(
    api: ApiClient, id_of_session_with_five_events: str
) -> None:
    first_id = (await event_history(api, id_of_session_with_five_events))[0]["id"]
    params = {"after_id": first_id, "order": "desc"}
    assert (
        await api("GET", events_path(api, id_of_session_with_five_events), params=params)
    ).status == 400


async def test_idle_event_lists_tool_use_that_still_needs_a_result(
    api: ApiClient,
) -> None:
    (item,) = api.plane.enqueue()
    one, two, three = api.plane.emit(
        item.session_id,
        {"type": "agent.custom_tool_use", "name": "weather", "input": {}},
        {"type": "agent.tool_use", "name": "Bash", "input": {}, "evaluated_permission": "ask"},
        {"type": "agent.tool_use", "name": "Bash", "input": {}},
    )
    idle = await last_event_of_type(api, item.session_id, "session.status_idle")
    assert idle["stop_reason"] == {
        "type": "requires_action", "event_ids": [one["id"], two["id"]]
    }  # fmt: skip
    # `event_ids` does not contain the third tool use, which needs no action of a client. So the
    # result for this tool use does not end the wait.
    await send_events(api, item.session_id, tool_result(dict(three)))
    assert (await last_event_of_type(api, item.session_id, "session.status_idle"))["id"] == idle[
        "id"
    ]
    await send_events(api, item.session_id, tool_result(dict(one)))
    idle = await last_event_of_type(api, item.session_id, "session.status_idle")
    assert idle["stop_reason"] == {"type": "requires_action", "event_ids": [two["id"]]}
    allow = {"type": "user.tool_confirmation", "tool_use_id": two["id"], "result": "allow"}
    await send_events(api, item.session_id, allow, tool_result(dict(two)))
    assert (await list_event_types(api, item.session_id))[-3:] == [
        "user.tool_confirmation",
        "user.tool_result",
        "session.status_running",
    ]
    assert await session_status(api, item.session_id) == "running"


async def test_event_to_terminated_session_is_409(api: ApiClient) -> None:
    session_id = create_scripted_session(api, BASH)
    api.plane.emit(session_id, {"type": "session.status_terminated"})
    assert await session_status(api, session_id) == "terminated"
    answer = await send_events(api, session_id, {"type": "user.interrupt"})
    assert (answer.status, answer.error["type"]) == (409, "conflict_error")


THREAD_ENDS = {"type": "session.thread_status_terminated", "session_thread_id": "sthr_1"}


@pytest.mark.parametrize("kind", ["agent.tool_use", "agent.custom_tool_use"])
async def test_tool_result_for_terminated_session_thread_is_409(api: ApiClient, kind: str) -> None:
    (item,) = api.plane.enqueue()
    use = {"type": kind, "name": "bash", "input": {}, "session_thread_id": "sthr_1"}
    (before,) = api.plane.emit(item.session_id, use)
    (_, after) = api.plane.emit(item.session_id, THREAD_ENDS, use)
    for call in (before, after):
        answer = await send_events(api, item.session_id, tool_result(dict(call)))
        assert (answer.status, answer.error["type"]) == (409, "conflict_error")
        assert "thread" in answer.error["message"]


async def test_tool_confirmation_for_terminated_session_thread_is_409(api: ApiClient) -> None:
    (item,) = api.plane.enqueue()
    use = {"type": "agent.tool_use", "name": "bash", "input": {}, "evaluated_permission": "ask"}
    (asked,) = api.plane.emit(item.session_id, {**use, "session_thread_id": "sthr_1"})
    api.plane.emit(item.session_id, THREAD_ENDS)
    allow = {"type": "user.tool_confirmation", "tool_use_id": asked["id"], "result": "allow"}
    assert (await send_events(api, item.session_id, allow)).status == 409


async def test_session_after_end_of_agent_thread_waits_for_tool_uses_of_other_agent_threads(
    api: ApiClient,
) -> None:
    (item,) = api.plane.enqueue()
    use = {"type": "agent.custom_tool_use", "name": "weather", "input": {}}
    _, other = api.plane.emit(item.session_id, {**use, "session_thread_id": "sthr_1"}, use)
    api.plane.emit(item.session_id, THREAD_ENDS)
    idle = await last_event_of_type(api, item.session_id, "session.status_idle")
    assert idle["stop_reason"] == {"type": "requires_action", "event_ids": [other["id"]]}
    assert (await send_events(api, item.session_id, tool_result(dict(other)))).status == 200
    assert await session_status(api, item.session_id) == "running"


async def test_event_with_malformed_thread_id_belongs_to_primary_thread(api: ApiClient) -> None:
    (item,) = api.plane.enqueue()
    use = {"type": "agent.tool_use", "name": "bash", "input": {}, "session_thread_id": []}
    (call,) = api.plane.emit(item.session_id, use)
    api.plane.emit(item.session_id, {**THREAD_ENDS, "session_thread_id": []})
    assert (await send_events(api, item.session_id, tool_result(dict(call)))).status == 200


@pytest.mark.parametrize(
    "event",
    [{}, {"type": 1}, {"type": "user.message"}, {"type": "agent.tool_use", "name": "Bash"},
     {"type": "agent.message", "content": object()}],
)  # fmt: skip
async def test_control_plane_emits_no_event_that_is_malformed_or_not_of_an_agent(
    qoder_api: ApiClient, event: dict[str, Any]
) -> None:
    session_id = create_scripted_session(qoder_api, BASH)
    with pytest.raises(APIError):
        qoder_api.plane.emit(session_id, event)
    assert len(qoder_api.plane.events(session_id)) == 3


async def test_running_event_does_not_change_session_status_while_item_state_is_stopping(
    api: ApiClient,
) -> None:
    work_id = await api.create_item_in_state("stopping")
    session_id = api.plane.operations.get_item(ENV, work_id).session_id
    api.plane.emit(session_id, {"type": "session.status_running"})
    written = "canceling" if api.dialect == "qoder" else "running"
    assert await session_status(api, session_id) == written


async def test_terminated_session_stays_terminated_while_item_state_is_stopping(
    api: ApiClient,
) -> None:
    work_id = await api.create_item_in_state("stopping")
    session_id = api.plane.operations.get_item(ENV, work_id).session_id
    api.plane.emit(session_id, {"type": "session.status_terminated"})
    assert await session_status(api, session_id) == "terminated"


async def test_enqueue_of_scripted_session_in_cloud_environment_is_refused(
    qoder_api: ApiClient,
) -> None:
    with pytest.raises(APIError):
        qoder_api.plane.enqueue(environment_id=CLOUD, script=[BASH])


def control_plane_with_database(file: Path, clock: ManualClock) -> ControlPlane:
    return ControlPlane(
        environments=(ENV,), tokens={TOKEN: None}, store=SqliteStore(file), now=clock
    )


async def test_scripted_session_continues_after_restart(
    tmp_path: Path, clock: ManualClock, http_session: aiohttp.ClientSession
) -> None:
    file = tmp_path / "work.db"
    script = [{**BASH, "permission": "ask"}, BASH, CUSTOM]
    async with control_plane_with_database(file, clock) as plane:
        api = ApiClient(plane, http_session, "qoder")
        session_id = create_scripted_session(api, *script)
        before = await event_history(api, session_id)
    for place in range(3):
        async with control_plane_with_database(file, clock) as plane:
            api = ApiClient(plane, http_session, "qoder")
            assert await event_history(api, session_id) == before
            uses = [event for event in before if event["type"].endswith("tool_use")]
            assert len(uses) == place + 1
            if uses[-1]["evaluated_permission"] == "ask":
                confirmed = {
                    "type": "user.tool_confirmation",
                    "tool_use_id": uses[-1]["id"],
                    "result": "allow",
                }
                assert (await send_events(api, session_id, confirmed)).status == 200
            assert (await send_events(api, session_id, tool_result(uses[-1]))).status == 200
            assert (await send_events(api, session_id, tool_result(uses[-1]))).status == 409
            before = await event_history(api, session_id)
    assert before[-1]["stop_reason"] == {"type": "end_turn"}


async def test_restarted_control_plane_appends_events_that_were_lost_in_a_crash(
    tmp_path: Path, clock: ManualClock, http_session: aiohttp.ClientSession
) -> None:
    file = tmp_path / "work.db"
    async with control_plane_with_database(file, clock) as plane:
        session_id = create_scripted_session(ApiClient(plane, http_session, "qoder"), BASH)
    with closing(sqlite3.connect(file)) as connection:
        # A crash can leave a session and its item in the database file, but not their events.
        connection.execute("DELETE FROM event")
        connection.commit()
    async with control_plane_with_database(file, clock) as plane:
        said = [event["type"] for event in plane.events(session_id)]
        assert said == ["user.message", "session.status_running", "agent.tool_use"]


DOWNGRADES = {
    2: """ALTER TABLE session DROP COLUMN title; ALTER TABLE session DROP COLUMN agent;
          ALTER TABLE session DROP COLUMN archived_at; DROP TABLE environment;
          DROP TABLE signing_key; PRAGMA user_version = 2;""",
    1: """DROP TABLE event; ALTER TABLE session DROP COLUMN script; PRAGMA user_version = 1;""",
}


@pytest.mark.parametrize("version", [1, 2])
async def test_database_of_older_version_is_migrated(
    tmp_path: Path, clock: ManualClock, http_session: aiohttp.ClientSession, version: int
) -> None:
    file = tmp_path / "work.db"
    async with control_plane_with_database(file, clock) as plane:
        (item,) = plane.enqueue(metadata={"k": "v"})
    with closing(sqlite3.connect(file)) as connection:
        for older, script in DOWNGRADES.items():
            if older >= version:
                connection.executescript(script)
    async with control_plane_with_database(file, clock) as plane:
        api = ApiClient(plane, http_session, "qoder")
        assert (await api.claim_item())["id"] == item.id
        assert (await api("GET", events_path(api, item.session_id, ""))).body["metadata"] == {
            "k": "v"
        }
        message = {"type": "user.message", "content": TEXT}
        assert (await send_events(api, item.session_id, message)).status == 200
    async with control_plane_with_database(file, clock) as plane:
        assert [event["type"] for event in plane.events(item.session_id)] == ["user.message"]


async def test_stored_event_is_independent_copy_of_sent_object(
    qoder_api: ApiClient,
) -> None:
    given: dict[str, Any] = {"command": ["ls"]}
    session_id = create_scripted_session(
        qoder_api, {"name": "Bash", "input": MappingProxyType(given)}
    )
    event: dict[str, Any] = {"type": "agent.thinking", "more": MappingProxyType(given)}
    qoder_api.plane.emit(session_id, event)
    given["command"].append("-l")
    use, thought = (await event_history(qoder_api, session_id))[2:]
    assert use["input"] == thought["more"] == {"command": ["ls"]}
