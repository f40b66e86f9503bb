"""The events of a session, listed, sent and scripted, as literal JSON.

See workpool/docs/protocol.md, "Events" and "Scripted sessions".
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from tests.protocol.conftest import CLOUD, ENV, LIMITED, OTHER, TOKEN, Answer, Api
from workpool.server import APIError, ControlPlane, SqliteStore

if TYPE_CHECKING:
    from pathlib import Path

    import aiohttp

    from tests.protocol.conftest import Clock

BASH: dict[str, Any] = {"name": "Bash", "input": {"command": "ls"}}
CUSTOM: dict[str, Any] = {"name": "weather", "input": {"city": "Ulm"}, "custom": True}
TIME = "2026-03-01T12:00:00.000000Z"
TEXT = [{"type": "text", "text": "hello"}]


def path(api: Api, session_id: str, suffix: str = "/events") -> str:
    written = session_id if api.dialect == "qoder" else session_id.replace("sess_", "session_")
    return f"{api.base}/sessions/{written}{suffix}"


async def history(api: Api, session_id: str) -> list[dict[str, Any]]:
    answer = await api("GET", path(api, session_id), params={"limit": "100"})
    assert answer.status == 200
    assert answer.body["has_more"] is False
    events: list[dict[str, Any]] = answer.body["data"]
    return events


async def types(api: Api, session_id: str) -> list[str]:
    return [event["type"] for event in await history(api, session_id)]


async def send(api: Api, session_id: str, *events: object) -> Answer:
    return await api("POST", path(api, session_id), json={"events": events})


async def status(api: Api, session_id: str) -> str:
    word: str = (await api("GET", path(api, session_id, ""))).body["status"]
    return word


def result(use: dict[str, Any], text: str = "done", **more: object) -> dict[str, Any]:
    custom = use["type"] == "agent.custom_tool_use"
    return {
        "type": "user.custom_tool_result" if custom else "user.tool_result",
        "custom_tool_use_id" if custom else "tool_use_id": use["id"],
        "content": [{"type": "text", "text": text}],
        **more,
    }


def scripted(api: Api, *entries: dict[str, Any]) -> str:
    (item,) = api.plane.enqueue(script=entries)
    return item.session_id


async def last(api: Api, session_id: str, kind: str) -> dict[str, Any]:
    return [event for event in await history(api, session_id) if event["type"] == kind][-1]


# -- scripted sessions -------------------------------------------------------------------------


@pytest.mark.usefixtures("both_stores")
async def test_scripted_session_emits_events_from_first_to_last(api: Api) -> None:
    body = {"script": [BASH, {"name": "Read", "input": {"file_path": "a"}, "permission": "allow"}]}
    created = await api("POST", api.work(), json=body)
    assert created.status == 200
    session_id = created.body["data"][0]["data"]["id"].replace("session_", "sess_")

    message, running, first = await history(api, session_id)
    assert message == {
        "id": message["id"],
        "type": "user.message",
        "content": [{"type": "text", "text": "Run the script."}],
        "processed_at": TIME,
    }
    assert running == {"id": running["id"], "type": "session.status_running", "processed_at": TIME}
    assert first == {
        "id": first["id"],
        "type": "agent.tool_use",
        "name": "Bash",
        "input": {"command": "ls"},
        "evaluated_permission": "allow",
        "processed_at": TIME,
    }
    assert await status(api, session_id) == "running"

    sent = await send(api, session_id, result(first, is_error=False))
    assert sent.status == 200
    (stored,) = sent.body["data"]
    assert stored == {
        "id": stored["id"],
        "type": "user.tool_result",
        "tool_use_id": first["id"],
        "content": [{"type": "text", "text": "done"}],
        "is_error": False,
        "processed_at": TIME,
    }
    second = await last(api, session_id, "agent.tool_use")
    assert (second["name"], second["input"]) == ("Read", {"file_path": "a"})
    await send(api, session_id, result(second))

    events = await history(api, session_id)
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
    assert await status(api, session_id) == "idle"


async def test_empty_script_ends_turn_at_once(api: Api) -> None:
    assert await types(api, scripted(api)) == [
        "user.message",
        "session.status_running",
        "agent.message",
        "session.status_idle",
    ]


async def test_each_session_of_one_enqueue_runs_script_separately(api: Api) -> None:
    first, second = (item.session_id for item in api.plane.enqueue(2, script=[BASH]))
    await send(api, first, result(await last(api, first, "agent.tool_use")))
    assert (await types(api, first))[-1] == "session.status_idle"
    assert (await types(api, second))[-1] == "agent.tool_use"


async def test_script_waits_for_result_of_custom_tool_use(api: Api) -> None:
    session_id = scripted(api, CUSTOM, BASH)
    use, idle = (await history(api, session_id))[2:]
    assert (use["type"], use["name"]) == ("agent.custom_tool_use", "weather")
    assert idle["type"] == "session.status_idle"
    assert idle["stop_reason"] == {"type": "requires_action", "event_ids": [use["id"]]}
    assert await status(api, session_id) == "idle"
    wrong = {"type": "user.tool_result", "tool_use_id": use["id"]}
    assert (await send(api, session_id, wrong)).status == 400
    assert (await send(api, session_id, result(use))).status == 200
    assert (await types(api, session_id))[4:] == [
        "user.custom_tool_result",
        "session.status_running",
        "agent.tool_use",
    ]


async def test_script_waits_for_confirmation_of_tool_use_with_permission_ask(api: Api) -> None:
    session_id = scripted(api, {**BASH, "permission": "ask"})
    use, idle = (await history(api, session_id))[2:]
    assert use["evaluated_permission"] == "ask"
    assert idle["stop_reason"] == {"type": "requires_action", "event_ids": [use["id"]]}
    early = await send(api, session_id, result(use))
    assert (early.status, early.error["type"]) == (409, "conflict_error")
    allow = {"type": "user.tool_confirmation", "tool_use_id": use["id"], "result": "allow"}
    assert (await send(api, session_id, allow)).status == 200
    again = await send(api, session_id, allow)
    assert (again.status, again.error["type"]) == (409, "conflict_error")
    assert (await types(api, session_id))[-1] == "session.status_running"
    assert (await send(api, session_id, result(use))).status == 200
    assert (await types(api, session_id))[-2:] == ["agent.message", "session.status_idle"]


@pytest.mark.parametrize("verdicts", [("allow", "deny"), ("deny", "allow"), ("allow", "allow")])
async def test_batch_with_two_confirmations_of_one_tool_use_is_409(
    api: Api, verdicts: tuple[str, str]
) -> None:
    session_id = scripted(api, {**BASH, "permission": "ask"})
    use = await last(api, session_id, "agent.tool_use")
    decision = {"type": "user.tool_confirmation", "tool_use_id": use["id"]}
    answer = await send(api, session_id, *({**decision, "result": word} for word in verdicts))
    assert (answer.status, answer.error["type"]) == (409, "conflict_error")
    assert len(await history(api, session_id)) == 4


async def test_denied_tool_use_is_answered_by_server(api: Api) -> None:
    session_id = scripted(api, {**BASH, "permission": "ask"}, {**BASH, "permission": "deny"})
    use = await last(api, session_id, "agent.tool_use")
    deny = {
        "type": "user.tool_confirmation",
        "tool_use_id": use["id"],
        "result": "deny",
        "deny_message": "not on a Sunday",
    }
    assert (await send(api, session_id, deny)).status == 200
    events = await history(api, session_id)
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
        "processed_at": TIME,
    }
    assert events[7]["evaluated_permission"] == "deny"
    assert events[8]["tool_use_id"] == events[7]["id"]
    late = await send(api, session_id, result(use))
    assert (late.status, late.error["type"]) == (409, "conflict_error")


async def test_interrupt_ends_turn_and_message_continues_script(api: Api) -> None:
    session_id = scripted(api, BASH, BASH)
    use = await last(api, session_id, "agent.tool_use")
    assert (await send(api, session_id, {"type": "user.interrupt"})).status == 200
    events = await history(api, session_id)
    assert [event["type"] for event in events[3:]] == [
        "user.interrupt",
        "agent.tool_result",
        "session.status_idle",
    ]
    assert events[-1]["stop_reason"] == {"type": "end_turn"}
    assert (await send(api, session_id, result(use))).status == 409
    assert (await send(api, session_id, {"type": "user.interrupt"})).status == 200
    assert (await types(api, session_id))[-1] == "user.interrupt"  # nothing was interrupted
    await send(api, session_id, {"type": "user.message", "content": TEXT})
    assert (await types(api, session_id))[-2:] == ["session.status_running", "agent.tool_use"]


async def test_interrupt_with_message_begins_new_turn(api: Api) -> None:
    session_id = scripted(api, {**BASH, "permission": "ask"}, BASH)
    message = {"type": "user.message", "content": TEXT}
    assert (await send(api, session_id, {"type": "user.interrupt"}, message)).status == 200
    assert (await types(api, session_id))[4:] == [
        "user.interrupt",
        "user.message",
        "agent.tool_result",
        "session.status_idle",
        "session.status_running",
        "agent.tool_use",
    ]


async def test_message_after_end_of_script_is_answered(api: Api) -> None:
    session_id = scripted(api)
    await send(api, session_id, {"type": "user.message", "content": TEXT})
    assert (await types(api, session_id))[4:] == [
        "user.message",
        "session.status_running",
        "agent.message",
        "session.status_idle",
    ]


# -- sending -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("both_stores")
async def test_batch_with_one_invalid_event_is_refused_completely(api: Api) -> None:
    session_id = scripted(api, BASH)
    use = await last(api, session_id, "agent.tool_use")
    before = await history(api, session_id)
    message = {"type": "user.message", "content": TEXT}
    unknown = {"type": "user.tool_result", "tool_use_id": "evt_" + "0" * 32}
    for batch, code, kind in (
        ([message, {"type": "agent.message"}], 400, "invalid_request_error"),
        ([message, unknown], 400, "invalid_request_error"),
        ([result(use), result(use)], 409, "conflict_error"),
        ([result(use), {"type": "user.message"}], 400, "invalid_request_error"),
    ):
        answer = await send(api, session_id, *batch)
        assert (answer.status, answer.error["type"]) == (code, kind)
    assert await history(api, session_id) == before
    assert (await send(api, session_id, message, result(use))).status == 200


async def test_second_result_for_tool_use_is_409(api: Api) -> None:
    session_id = scripted(api, BASH, BASH)
    use = await last(api, session_id, "agent.tool_use")
    await send(api, session_id, result(use))
    for text in ("done", "something else"):
        answer = await send(api, session_id, result(use, text))
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
    api: Api, body: bytes, param: str | None
) -> None:
    session_id = scripted(api, BASH)
    answer = await api("POST", path(api, session_id), data=body)
    assert answer.status == 400
    assert answer.error.get("param") == param
    assert len(await history(api, session_id)) == 3


async def test_unknown_fields_of_event_are_dropped(api: Api) -> None:
    session_id = scripted(api)
    message = {"type": "user.message", "content": TEXT, "id": "evt_mine", "colour": "red"}
    (stored,) = (await send(api, session_id, message)).body["data"]
    assert set(stored) == {"id", "type", "content", "processed_at"}
    assert stored["id"] != "evt_mine"


async def test_events_can_be_read_and_sent_with_permission_only(
    api: Api, http: aiohttp.ClientSession
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
        as_them = Api(api.plane, http, api.dialect, token)
        assert (await as_them("GET", path(api, session_id))).status == code
        sent = await as_them(
            "POST", path(api, session_id), json={"events": [{"type": "user.interrupt"}]}
        )
        assert sent.status == code
        assert code == 200 or (
            (await as_them("GET", path(api, session_id, "/events/stream"))).status == code
        )


# -- listing -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("both_stores")
async def test_event_pages_are_listed_in_both_directions(api: Api) -> None:
    session_id = scripted(api)
    for _ in range(5):
        await send(api, session_id, {"type": "user.message", "content": TEXT})
    url = path(api, session_id)
    whole = await history(api, session_id)
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


async def test_session_without_events_has_empty_history(api: Api) -> None:
    (item,) = api.plane.enqueue()
    assert await history(api, item.session_id) == []
    assert await status(api, item.session_id) == "idle"


@pytest.mark.parametrize(
    "params",
    [{"limit": "0"}, {"limit": "x"}, {"page": "x"}, {"after_id": "work_" + "0" * 32},
     {"before_id": "evt_x"}, {"page": "after-evt_" + "0" * 32, "after_id": "evt_" + "0" * 32}],
)  # fmt: skip
async def test_invalid_position_in_event_list_is_400(api: Api, params: dict[str, str]) -> None:
    assert (await api("GET", path(api, scripted(api)), params=params)).status == 400


# -- which events a list answers, and in which order ------------------------------------------


async def listed(api: Api, session_id: str, *params: tuple[str, str]) -> list[str]:
    """Return the texts of the agent's messages, read in pages of two."""
    texts, page = [], None
    while True:
        query = [*params, ("limit", "2"), *([("page", page)] if page else [])]
        answer = await api("GET", path(api, session_id), params=query)
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
def told(api: Api, clock: Clock) -> str:
    """Return a session with messages "0" to "4", one a second, alternating with thinking events."""
    (item,) = api.plane.enqueue()
    for number in range(5):
        kind = "agent.message" if number % 2 == 0 else "agent.thinking"
        content = [{"type": "text", "text": str(number)}]
        api.plane.emit(item.session_id, {"type": kind, "content": content})
        clock.advance(1)
    return item.session_id


async def test_events_in_descending_order_are_listed_to_the_oldest(api: Api, told: str) -> None:
    assert await listed(api, told, ("order", "desc")) == ["4", "3", "2", "1", "0"]
    assert await listed(api, told, ("order", "asc")) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("name", ["types", "types[]"])
async def test_events_are_filtered_by_type(api: Api, told: str, name: str) -> None:
    assert await listed(api, told, (name, "agent.message")) == ["0", "2", "4"]
    assert await listed(api, told, (name, "agent.message"), ("order", "desc")) == ["4", "2", "0"]
    both = [(name, "agent.message"), (name, "agent.thinking")]
    assert await listed(api, told, *both) == ["0", "1", "2", "3", "4"]
    assert await listed(api, told, (name, "agent.unknown")) == []


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
    api: Api, told: str, bounds: dict[str, str], texts: list[str], order: str
) -> None:
    params = [(f"created_at[{name}]", value) for name, value in bounds.items()]
    expected = texts if order == "asc" else texts[::-1]
    assert await listed(api, told, *params, ("order", order)) == expected


async def test_before_id_with_filter_returns_nearest_events_in_ascending_order(
    api: Api, told: str
) -> None:
    last_id = (await history(api, told))[-1]["id"]
    params = {"before_id": last_id, "types": "agent.message", "limit": "1"}
    answer = await api("GET", path(api, told), params=params)
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
async def test_malformed_event_filter_is_400_and_named(api: Api, name: str, value: str) -> None:
    answer = await api("GET", path(api, scripted(api)), params={name: value})
    assert (answer.status, answer.error["param"]) == (400, name)


async def test_after_id_in_descending_order_is_400(api: Api, told: str) -> None:
    first_id = (await history(api, told))[0]["id"]
    params = {"after_id": first_id, "order": "desc"}
    assert (await api("GET", path(api, told), params=params)).status == 400


# -- the agent's side, played by whoever embeds ------------------------------------------------


async def test_partly_resolved_action_is_announced_again_with_remaining_calls(api: Api) -> None:
    (item,) = api.plane.enqueue()
    one, two, three = api.plane.emit(
        item.session_id,
        {"type": "agent.custom_tool_use", "name": "weather", "input": {}},
        {"type": "agent.tool_use", "name": "Bash", "input": {}, "evaluated_permission": "ask"},
        {"type": "agent.tool_use", "name": "Bash", "input": {}},
    )
    idle = await last(api, item.session_id, "session.status_idle")
    assert idle["stop_reason"] == {
        "type": "requires_action", "event_ids": [one["id"], two["id"]]
    }  # fmt: skip
    # the result of another worker, for which the session does not wait
    await send(api, item.session_id, result(dict(three)))
    assert (await last(api, item.session_id, "session.status_idle"))["id"] == idle["id"]
    await send(api, item.session_id, result(dict(one)))
    idle = await last(api, item.session_id, "session.status_idle")
    assert idle["stop_reason"] == {"type": "requires_action", "event_ids": [two["id"]]}
    allow = {"type": "user.tool_confirmation", "tool_use_id": two["id"], "result": "allow"}
    await send(api, item.session_id, allow, result(dict(two)))  # the confirmation allows the result
    assert (await types(api, item.session_id))[-3:] == [
        "user.tool_confirmation",
        "user.tool_result",
        "session.status_running",
    ]
    assert await status(api, item.session_id) == "running"


async def test_event_to_terminated_session_is_409(api: Api) -> None:
    session_id = scripted(api, BASH)
    api.plane.emit(session_id, {"type": "session.status_terminated"})
    assert await status(api, session_id) == "terminated"
    answer = await send(api, session_id, {"type": "user.interrupt"})
    assert (answer.status, answer.error["type"]) == (409, "conflict_error")


THREAD_ENDS = {"type": "session.thread_status_terminated", "session_thread_id": "sthr_1"}


@pytest.mark.parametrize("kind", ["agent.tool_use", "agent.custom_tool_use"])
async def test_result_for_call_of_terminated_thread_is_409(api: Api, kind: str) -> None:
    (item,) = api.plane.enqueue()
    use = {"type": kind, "name": "bash", "input": {}, "session_thread_id": "sthr_1"}
    (before,) = api.plane.emit(item.session_id, use)
    (_, after) = api.plane.emit(item.session_id, THREAD_ENDS, use)
    for call in (before, after):
        answer = await send(api, item.session_id, result(dict(call)))
        assert (answer.status, answer.error["type"]) == (409, "conflict_error")
        assert "thread" in answer.error["message"]


async def test_confirmation_for_call_of_terminated_thread_is_409(api: Api) -> None:
    (item,) = api.plane.enqueue()
    use = {"type": "agent.tool_use", "name": "bash", "input": {}, "evaluated_permission": "ask"}
    (asked,) = api.plane.emit(item.session_id, {**use, "session_thread_id": "sthr_1"})
    api.plane.emit(item.session_id, THREAD_ENDS)
    allow = {"type": "user.tool_confirmation", "tool_use_id": asked["id"], "result": "allow"}
    assert (await send(api, item.session_id, allow)).status == 409


async def test_termination_of_thread_ends_wait_for_its_calls_only(api: Api) -> None:
    (item,) = api.plane.enqueue()
    use = {"type": "agent.custom_tool_use", "name": "weather", "input": {}}
    _, other = api.plane.emit(item.session_id, {**use, "session_thread_id": "sthr_1"}, use)
    api.plane.emit(item.session_id, THREAD_ENDS)
    idle = await last(api, item.session_id, "session.status_idle")
    assert idle["stop_reason"] == {"type": "requires_action", "event_ids": [other["id"]]}
    assert (await send(api, item.session_id, result(dict(other)))).status == 200
    assert await status(api, item.session_id) == "running"


async def test_event_with_malformed_thread_belongs_to_primary_thread(api: Api) -> None:
    (item,) = api.plane.enqueue()
    use = {"type": "agent.tool_use", "name": "bash", "input": {}, "session_thread_id": []}
    (call,) = api.plane.emit(item.session_id, use)
    api.plane.emit(item.session_id, {**THREAD_ENDS, "session_thread_id": []})
    assert (await send(api, item.session_id, result(dict(call)))).status == 200


@pytest.mark.parametrize(
    "event",
    [{}, {"type": 1}, {"type": "user.message"}, {"type": "agent.tool_use", "name": "Bash"},
     {"type": "agent.message", "content": object()}],
)  # fmt: skip
async def test_event_that_no_agent_sends_is_refused(qoder: Api, event: dict[str, Any]) -> None:
    session_id = scripted(qoder, BASH)
    with pytest.raises(APIError):
        qoder.plane.emit(session_id, event)
    assert len(qoder.plane.events(session_id)) == 3


async def test_session_of_stopping_item_has_status_of_item(api: Api) -> None:
    work_id = await api.bring_to("stopping")
    session_id = api.plane.operations.get(ENV, work_id).session_id
    api.plane.emit(session_id, {"type": "session.status_running"})
    written = "canceling" if api.dialect == "qoder" else "running"
    assert await status(api, session_id) == written


async def test_terminated_session_of_stopping_item_stays_terminated(api: Api) -> None:
    work_id = await api.bring_to("stopping")
    session_id = api.plane.operations.get(ENV, work_id).session_id
    api.plane.emit(session_id, {"type": "session.status_terminated"})
    assert await status(api, session_id) == "terminated"


async def test_script_in_cloud_environment_is_refused(qoder: Api) -> None:
    with pytest.raises(APIError):
        qoder.plane.enqueue(environment_id=CLOUD, script=[BASH])


# -- SQLite ------------------------------------------------------------------------------------


def plane_on(file: Path, clock: Clock) -> ControlPlane:
    return ControlPlane(
        environments=(ENV,), tokens={TOKEN: None}, store=SqliteStore(file), now=clock
    )


async def test_scripted_session_continues_after_restart(
    tmp_path: Path, clock: Clock, http: aiohttp.ClientSession
) -> None:
    file = tmp_path / "work.db"
    script = [{**BASH, "permission": "ask"}, BASH, CUSTOM]
    async with plane_on(file, clock) as plane:
        api = Api(plane, http, "qoder")
        session_id = scripted(api, *script)
        before = await history(api, session_id)
    for place in range(3):
        async with plane_on(file, clock) as plane:
            api = Api(plane, http, "qoder")
            assert await history(api, session_id) == before
            uses = [event for event in before if event["type"].endswith("tool_use")]
            assert len(uses) == place + 1
            if uses[-1]["evaluated_permission"] == "ask":
                confirmed = {
                    "type": "user.tool_confirmation",
                    "tool_use_id": uses[-1]["id"],
                    "result": "allow",
                }
                assert (await send(api, session_id, confirmed)).status == 200
            assert (await send(api, session_id, result(uses[-1]))).status == 200
            assert (await send(api, session_id, result(uses[-1]))).status == 409
            before = await history(api, session_id)
    assert before[-1]["stop_reason"] == {"type": "end_turn"}


async def test_event_missing_after_crash_is_appended_at_start(
    tmp_path: Path, clock: Clock, http: aiohttp.ClientSession
) -> None:
    file = tmp_path / "work.db"
    async with plane_on(file, clock) as plane:
        session_id = scripted(Api(plane, http, "qoder"), BASH)
    with closing(sqlite3.connect(file)) as connection:  # keep only the session and its item
        connection.execute("DELETE FROM event")
        connection.commit()
    async with plane_on(file, clock) as plane:
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
    tmp_path: Path, clock: Clock, http: aiohttp.ClientSession, version: int
) -> None:
    file = tmp_path / "work.db"
    async with plane_on(file, clock) as plane:
        (item,) = plane.enqueue(metadata={"k": "v"})
    with closing(sqlite3.connect(file)) as connection:
        for older, script in DOWNGRADES.items():
            if older >= version:
                connection.executescript(script)
    async with plane_on(file, clock) as plane:
        api = Api(plane, http, "qoder")
        assert (await api.claim())["id"] == item.id
        assert (await api("GET", path(api, item.session_id, ""))).body["metadata"] == {"k": "v"}
        message = {"type": "user.message", "content": TEXT}
        assert (await send(api, item.session_id, message)).status == 200
    async with plane_on(file, clock) as plane:
        assert [event["type"] for event in plane.events(item.session_id)] == ["user.message"]


# -- events from an embedder -------------------------------------------------------------------


async def test_stored_event_does_not_change_with_object_of_sender(qoder: Api) -> None:
    given: dict[str, Any] = {"command": ["ls"]}
    session_id = scripted(qoder, {"name": "Bash", "input": MappingProxyType(given)})
    event: dict[str, Any] = {"type": "agent.thinking", "more": MappingProxyType(given)}
    qoder.plane.emit(session_id, event)
    given["command"].append("-l")
    use, thought = (await history(qoder, session_id))[2:]
    assert use["input"] == thought["more"] == {"command": ["ls"]}
