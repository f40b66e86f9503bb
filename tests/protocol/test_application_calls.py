"""The calls of applications for environments and sessions, in the anthropic dialect."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.protocol.conftest import CLOUD, ENV, LIMITED, OTHER, TOKEN, ApiClient, HttpAnswer
from tests.protocol.test_stream import open_stream
from workpool.server import ControlPlane, SqliteStore
from workpool.server.environments import ENVIRONMENTS_MAX
from workpool.server.index_engine import SCAN_ROWS
from workpool.testing import Faults

if TYPE_CHECKING:
    from pathlib import Path

    import aiohttp

    from tests.manual_clock import ManualClock

START_TIME = "2026-03-01T12:00:00Z"
SELF_HOSTED = {"name": "mine", "config": {"type": "self_hosted"}}
MESSAGE = {"type": "user.message", "content": [{"type": "text", "text": "hello"}]}


async def post_json(api: ApiClient, path: str, body: object = None) -> HttpAnswer:
    options = {} if body is None else {"json": body}
    return await api("POST", f"{api.base_url}{path}", **options)


async def get_json(api: ApiClient, path: str, *params: tuple[str, str]) -> HttpAnswer:
    return await api("GET", f"{api.base_url}{path}", params=list(params))


async def create_session(api: ApiClient, **fields: object) -> dict[str, Any]:
    answer = await post_json(
        api, "/sessions", {"agent": "agent_1", "environment_id": ENV, **fields}
    )
    assert answer.status == 200
    session: dict[str, Any] = answer.body
    return session


async def list_all_ids(api: ApiClient, path: str, *params: tuple[str, str]) -> list[str]:
    """Read a list in pages of two and return its ids."""
    ids: list[str] = []
    page = None
    while True:
        more = [("limit", "2"), *([("page", page)] if page else [])]
        answer = await get_json(api, path, *params, *more)
        assert answer.status == 200
        ids += [each["id"] for each in answer.body["data"]]
        page = answer.body["next_page"]
        if page is None:
            return ids


async def test_created_environment_is_served_at_once(anthropic_api: ApiClient) -> None:
    body = {**SELF_HOSTED, "description": "for tests", "metadata": {"team": "a"}}
    environment = (await post_json(anthropic_api, "/environments", body)).body
    assert environment == {
        "id": environment["id"],
        "type": "environment",
        "name": "mine",
        "description": "for tests",
        "config": {"type": "self_hosted"},
        "metadata": {"team": "a"},
        "created_at": START_TIME,
        "updated_at": START_TIME,
        "archived_at": None,
    }
    environment_id = environment["id"]
    assert (await get_json(anthropic_api, f"/environments/{environment_id}")).body == environment
    assert (await anthropic_api.poll(environment_id)).body is None
    session = await create_session(anthropic_api, environment_id=environment_id)
    item = (await anthropic_api.poll(environment_id)).body
    assert item["data"] == {"type": "session", "id": session["id"]}


async def test_environment_list_includes_initial_environments(anthropic_api: ApiClient) -> None:
    new = (await post_json(anthropic_api, "/environments", SELF_HOSTED)).body["id"]
    assert await list_all_ids(anthropic_api, "/environments") == sorted([ENV, OTHER, CLOUD, new])
    config = (await get_json(anthropic_api, f"/environments/{CLOUD}")).body["config"]
    assert (config["type"], config["networking"]) == ("cloud", {"type": "unrestricted"})


async def test_token_of_one_environment_cannot_read_or_create_other_environments(
    anthropic_api: ApiClient,
) -> None:
    anthropic_api.token = LIMITED
    assert await list_all_ids(anthropic_api, "/environments") == [ENV]
    assert (await get_json(anthropic_api, f"/environments/{OTHER}")).status == 403
    assert (await post_json(anthropic_api, "/environments", SELF_HOSTED)).status == 403
    body = {"agent": "agent_1", "environment_id": OTHER}
    assert (await post_json(anthropic_api, "/sessions", body)).status == 403


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "mine"}, "config"),
        ({"name": "mine", "config": {"type": "cloud"}}, "config"),
        ({"config": {"type": "self_hosted"}}, "name"),
        ({**SELF_HOSTED, "name": 1}, "name"),
        ({**SELF_HOSTED, "name": "x" * 4097}, "name"),
        ({**SELF_HOSTED, "metadata": {"k": 1}}, "metadata"),
        ({**SELF_HOSTED, "metadata": []}, "metadata"),
        ({**SELF_HOSTED, "metadata": {"k" * 65: ""}}, "metadata"),
        ({**SELF_HOSTED, "description": {}}, "description"),
    ],
)
async def test_malformed_environment_is_400(
    anthropic_api: ApiClient, body: object, param: str
) -> None:
    answer = await post_json(anthropic_api, "/environments", body)
    assert (answer.status, answer.error["param"]) == (400, param)


async def test_creation_of_environment_above_maximum_number_is_400(
    anthropic_api: ApiClient,
) -> None:
    for number in range(ENVIRONMENTS_MAX):
        anthropic_api.plane.operations.create_environment(str(number), None, {})
    assert (await post_json(anthropic_api, "/environments", SELF_HOSTED)).status == 400


async def test_created_session_has_item_with_its_metadata(anthropic_api: ApiClient) -> None:
    session = await create_session(
        anthropic_api,
        agent={"type": "agent", "id": "agent_1", "version": 7},
        title="report",
        metadata={"job": "report"},
        resources=[],
        vault_ids=[],
        initial_events=[MESSAGE],
    )
    assert session["id"].startswith("session_")
    assert (session["type"], session["status"], session["environment_id"]) == (
        "session", "idle", ENV
    )  # fmt: skip
    assert (session["title"], session["metadata"]) == ("report", {"job": "report"})
    agent = session["agent"]
    assert (agent["type"], agent["id"], agent["version"]) == ("agent", "agent_1", 7)
    assert (session["created_at"], session["archived_at"]) == (START_TIME, None)
    assert (await get_json(anthropic_api, f"/sessions/{session['id']}")).body == session

    item = await anthropic_api.claim_item()
    assert item["data"] == {"type": "session", "id": session["id"]}
    assert item["metadata"] == {"job": "report"}
    (event,) = (await get_json(anthropic_api, f"/sessions/{session['id']}/events")).body["data"]
    assert (event["type"], event["content"]) == ("user.message", MESSAGE["content"])


@pytest.mark.usefixtures("allow_polls_of_one_minute")
async def test_creation_of_session_wakes_waiting_poll(anthropic_api: ApiClient) -> None:
    async def poll_for_one_minute() -> HttpAnswer:
        return await anthropic_api.poll(params={"block_ms": "60000"})

    async with asyncio.TaskGroup() as group:
        polling = group.create_task(poll_for_one_minute())
        session = await create_session(anthropic_api)
    assert polling.result().body["data"]["id"] == session["id"]


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_message_to_session_without_unfinished_item_creates_item(
    anthropic_api: ApiClient,
) -> None:
    session = await create_session(anthropic_api, metadata={"job": "report"})
    url = f"/sessions/{session['id']}/events"
    assert (await post_json(anthropic_api, url, {"events": [MESSAGE]})).status == 200
    first = await anthropic_api.claim_item()
    # The message created no second item, because the session has an unfinished item.
    assert (await anthropic_api.poll()).body is None
    await anthropic_api.stop(first["id"], json={"force": True})
    assert (
        await post_json(anthropic_api, url, {"events": [{"type": "user.interrupt"}]})
    ).status == 200
    assert (await anthropic_api.poll()).body is None
    assert (await post_json(anthropic_api, url, {"events": [MESSAGE, MESSAGE]})).status == 200
    second = await anthropic_api.claim_item()
    assert second["id"] > first["id"]
    assert (second["data"], second["metadata"]) == (first["data"], {"job": "report"})
    assert (await anthropic_api.poll()).body is None
    assert (await get_json(anthropic_api, f"/sessions/{session['id']}")).body["metadata"] == {
        "job": "report"
    }


async def test_message_that_server_refuses_creates_no_item(anthropic_api: ApiClient) -> None:
    session_id = (await create_session(anthropic_api))["id"]
    await anthropic_api.stop((await anthropic_api.claim_item())["id"], json={"force": True})
    wrong = {"type": "user.tool_result", "tool_use_id": "evt_unknown"}
    url = f"/sessions/{session_id}/events"
    assert (await post_json(anthropic_api, url, {"events": [MESSAGE, wrong]})).status == 400
    await post_json(anthropic_api, f"/sessions/{session_id}/archive")
    assert (await post_json(anthropic_api, url, {"events": [MESSAGE]})).status == 409
    assert (await anthropic_api.poll()).body is None


async def test_message_in_qoder_dialect_creates_no_item(qoder_api: ApiClient) -> None:
    work_id = await qoder_api.create_item_in_state("stopped")
    session_id = (await qoder_api.get(work_id)).body["data"]["id"]
    sent = await post_json(qoder_api, f"/sessions/{session_id}/events", {"events": [MESSAGE]})
    assert sent.status == 200
    assert (await qoder_api.poll()).body is None


async def test_session_created_with_script_runs_script_after_initial_events(
    anthropic_api: ApiClient,
) -> None:
    script = [{"name": "bash", "input": {"command": "ls"}}]
    session = await create_session(anthropic_api, script=script, initial_events=[MESSAGE])
    events = (await get_json(anthropic_api, f"/sessions/{session['id']}/events")).body["data"]
    assert [event["type"] for event in events] == [
        "user.message",
        "session.status_running",
        "agent.tool_use",
    ]
    assert events[0]["content"] == MESSAGE["content"]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"agent": None}, 400, "agent"),
        ({"agent": ""}, 400, "agent"),
        ({"agent": {"type": "agent"}}, 400, "agent"),
        ({"agent": {"id": "agent_1", "version": "7"}}, 400, "agent"),
        ({"environment_id": None}, 400, "environment_id"),
        ({"environment_id": "env_unknown"}, 404, None),
        ({"environment_id": CLOUD}, 400, None),
        ({"title": 1}, 400, "title"),
        ({"metadata": {"k": 1}}, 400, "metadata"),
        ({"metadata": {"k" * 64: "v" * 512}}, 200, None),
        ({"metadata": {"k" * 65: ""}}, 400, "metadata"),
        ({"metadata": {"k": "v" * 513}}, 400, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, 400, "metadata"),
        ({"initial_events": {}}, 200, None),
        ({"initial_events": [{}]}, 400, "type"),
        ({"initial_events": [MESSAGE] * 51}, 400, "initial_events"),
        ({"initial_events": [{"type": "user.interrupt"}]}, 400, "initial_events"),
        ({"resources": [{"type": "file", "file_id": "f"}]}, 400, "resources"),
        ({"vault_ids": ["vlt_1"]}, 400, "vault_ids"),
        ({"budget": {"max_list_cost": "1"}}, 400, "budget"),
        ({"script": {}}, 400, "script"),
    ],
)
async def test_invalid_session_is_refused(
    anthropic_api: ApiClient, fields: dict[str, object], status: int, param: str | None
) -> None:
    body = {"agent": "agent_1", "environment_id": ENV, **fields}
    answer = await post_json(anthropic_api, "/sessions", body)
    assert answer.status == status
    assert param is None or answer.error["param"] == param
    assert len(anthropic_api.plane.history) == (status == 200)


async def test_sessions_are_listed_newest_first_by_default(anthropic_api: ApiClient) -> None:
    ids = [(await create_session(anthropic_api))["id"] for _ in range(5)]
    assert await list_all_ids(anthropic_api, "/sessions") == ids[::-1]
    assert await list_all_ids(anthropic_api, "/sessions", ("order", "asc")) == ids


async def test_sessions_are_filtered_by_time_status_agent_and_archive(
    anthropic_api: ApiClient, clock: ManualClock
) -> None:
    first = (await create_session(anthropic_api, agent="agent_a"))["id"]
    clock.advance(1)
    second = (await create_session(anthropic_api, agent={"id": "agent_b", "version": 2}))["id"]
    clock.advance(1)
    third = (await create_session(anthropic_api, initial_events=[MESSAGE], script=[]))["id"]
    await post_json(anthropic_api, f"/sessions/{first}/archive")
    lists = {
        (): [third, second],
        (("include_archived", "true"),): [third, second, first],
        (("include_archived", "true"), ("statuses[]", "terminated")): [first],
        (("statuses", "idle"), ("statuses", "running")): [third, second],
        (("created_at[gte]", "2026-03-01T12:00:02Z"),): [third],
        (("created_at[lt]", "2026-03-01T12:00:02Z"),): [second],
        (("agent_id", "agent_b"),): [second],
        (("agent_id", "agent_b"), ("agent_version", "1")): [],
        (("deployment_id", "depl_1"),): [],
    }
    assert {
        params: await list_all_ids(anthropic_api, "/sessions", *params) for params in lists
    } == lists


async def test_list_of_many_sessions_does_not_delay_other_calls(
    anthropic_api: ApiClient,
) -> None:
    for _ in range(10 * SCAN_ROWS):
        anthropic_api.plane.enqueue()
    ended: list[str] = []

    async def list_sessions() -> None:
        answer = await get_json(anthropic_api, "/sessions", ("agent_id", "agent_unknown"))
        assert (answer.status, answer.body["data"]) == (200, [])
        ended.append("list")

    async def poll_three_items() -> None:
        for _ in range(3):
            assert (await anthropic_api.poll()).body is not None
        ended.append("poll")

    async with asyncio.TaskGroup() as group:
        group.create_task(list_sessions())
        group.create_task(poll_three_items())
    assert ended == ["poll", "list"]


async def test_sessions_of_other_environments_are_hidden_from_limited_token(
    anthropic_api: ApiClient,
) -> None:
    await create_session(anthropic_api, environment_id=OTHER)
    own = (await create_session(anthropic_api))["id"]
    anthropic_api.token = LIMITED
    assert await list_all_ids(anthropic_api, "/sessions") == [own]


@pytest.mark.parametrize(
    ("name", "value"),
    [("order", "up"), ("include_archived", "1"), ("created_at[gt]", "x"), ("page", "x")],
)
async def test_malformed_filter_of_sessions_is_400(
    anthropic_api: ApiClient, name: str, value: str
) -> None:
    answer = await get_json(anthropic_api, "/sessions", (name, value))
    assert (answer.status, answer.error["param"]) == (400, name)


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_archived_session_is_terminated_and_accepts_no_event(
    anthropic_api: ApiClient,
) -> None:
    session_id = (await create_session(anthropic_api))["id"]
    item = await anthropic_api.claim_item()
    own = session_id.replace("session_", "sess_")
    async with open_stream(anthropic_api, own) as reader:
        archived = (await post_json(anthropic_api, f"/sessions/{session_id}/archive")).body
        assert (await reader.read_event())["type"] == "session.status_terminated"
    assert (archived["status"], archived["archived_at"]) == ("terminated", START_TIME)
    assert (await get_json(anthropic_api, f"/sessions/{session_id}")).body == archived
    assert await anthropic_api.item_state(item["id"]) == "stopped"
    sent = await post_json(anthropic_api, f"/sessions/{session_id}/events", {"events": [MESSAGE]})
    assert sent.status == 409
    again = await post_json(anthropic_api, f"/sessions/{session_id}/archive")
    assert (again.status, again.body) == (200, archived)


@pytest.mark.parametrize(("state", "then"), [("starting", "stopping"), ("active", "stopping")])
async def test_archive_of_session_with_leased_item_changes_item_state_to_stopping(
    anthropic_api: ApiClient, state: str, then: str
) -> None:
    work_id = await anthropic_api.create_item_in_state(state)
    session_id = (await anthropic_api.get(work_id)).body["data"]["id"]
    assert (await post_json(anthropic_api, f"/sessions/{session_id}/archive")).status == 200
    assert await anthropic_api.item_state(work_id) == then


async def test_archive_of_unknown_session_is_404(anthropic_api: ApiClient) -> None:
    assert (await post_json(anthropic_api, "/sessions/session_unknown/archive")).status == 404


async def test_environments_and_sessions_survive_restart(
    tmp_path: Path, clock: ManualClock, http_session: aiohttp.ClientSession
) -> None:
    def open_control_plane() -> ControlPlane:
        store = SqliteStore(tmp_path / "work.db")
        return ControlPlane(environments=(ENV,), tokens={TOKEN: None}, store=store, now=clock)

    async with open_control_plane() as first:
        api = ApiClient(first, http_session, "anthropic")
        environment = (await post_json(api, "/environments", SELF_HOSTED)).body
        session = await create_session(api, environment_id=environment["id"], title="kept")
        archived = await create_session(api, agent={"id": "agent_2", "version": 3})
        archived = (await post_json(api, f"/sessions/{archived['id']}/archive")).body
    async with open_control_plane() as second:
        api = ApiClient(second, http_session, "anthropic")
        assert (await get_json(api, f"/environments/{environment['id']}")).body == environment
        for before in (session, archived):
            assert (await get_json(api, f"/sessions/{before['id']}")).body == before
        item = await api.claim_item(environment=environment["id"])
        assert item["data"]["id"] == session["id"]
        newer = (await post_json(api, "/environments", SELF_HOSTED)).body
        assert newer["id"] > environment["id"]


@pytest.mark.parametrize("path", ["/environments", "/sessions"])
async def test_application_calls_in_qoder_dialect_are_404(qoder_api: ApiClient, path: str) -> None:
    assert (await get_json(qoder_api, path)).status == 404


async def test_token_in_x_api_key_header_is_accepted_only_in_anthropic_dialect(
    anthropic_api: ApiClient, qoder_api: ApiClient
) -> None:
    for api, status in ((anthropic_api, 200), (qoder_api, 401)):
        api.token, api.extra_headers = None, {"X-Api-Key": TOKEN}
        assert (await api.poll()).status == status
    anthropic_api.extra_headers = {"X-Api-Key": "wrong"}
    assert (await anthropic_api.poll()).status == 401
    anthropic_api.token = "wrong"  # noqa: S105 - it opens nothing
    anthropic_api.extra_headers = {"X-Api-Key": TOKEN}
    assert (await anthropic_api.poll()).status == 401


async def test_application_calls_are_not_recorded_as_worker_calls(
    http_session: aiohttp.ClientSession,
) -> None:
    faults = Faults()
    async with ControlPlane(
        environments=(ENV,), tokens={TOKEN: None}, middlewares=[faults.middleware]
    ) as plane:
        api = ApiClient(plane, http_session, "anthropic")
        session_id = (await create_session(api))["id"]
        await post_json(api, "/environments", SELF_HOSTED)
        for path in ("/environments", f"/environments/{ENV}", "/sessions"):
            assert (await get_json(api, path)).status == 200
        await post_json(api, f"/sessions/{session_id}/archive")
        assert faults.seen == []
        await get_json(api, f"/sessions/{session_id}")
        await api("GET", api.work_url())
        assert [request.op for request in faults.seen] == ["session", "list"]
