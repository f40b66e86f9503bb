"""The `secret` of an item in the anthropic dialect, and the calls that the token in it allows."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.protocol.conftest import ENV, OTHER, TOKEN, ApiClient, HttpAnswer
from tests.protocol.test_events import BASH, events_path
from workpool.server import ControlPlane, SqliteStore

if TYPE_CHECKING:
    from pathlib import Path

    import aiohttp

    from tests.manual_clock import ManualClock

MESSAGE = {"type": "user.message", "content": [{"type": "text", "text": "hello"}]}
SELF_HOSTED = {"name": "mine", "config": {"type": "self_hosted"}}


def decode_token_of_item(item: dict[str, Any]) -> str:
    padding = "=" * (-len(item["secret"]) % 4)
    content = json.loads(base64.urlsafe_b64decode(item["secret"] + padding))
    assert set(content) == {"sessions_token"}
    token: str = content["sessions_token"]
    return token


async def claim_item_with_token(
    api: ApiClient, environment: str = ENV
) -> tuple[dict[str, Any], ApiClient]:
    """Create and poll an item. Return the item, and a client that has only its token."""
    api.plane.enqueue(script=[BASH], environment_id=environment)
    item = (await api.poll(environment)).body
    return item, ApiClient(api.plane, api.http, "anthropic", token=decode_token_of_item(item))


def session_path(api: ApiClient, item: dict[str, Any], suffix: str = "/events") -> str:
    return events_path(api, item["data"]["id"].replace("session_", "sess_"), suffix)


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_item_token_allows_calls_for_item_from_ack_to_stop(anthropic_api: ApiClient) -> None:
    item, own = await claim_item_with_token(anthropic_api)
    assert (await own.ack(item["id"])).status == 200
    assert (await own.heartbeat(item["id"], "NO_HEARTBEAT")).status == 200
    session = await own("GET", session_path(own, item, ""))
    assert (session.status, session.body["id"]) == (200, item["data"]["id"])
    events = await own("GET", session_path(own, item))
    assert events.status == 200
    sent = await own("POST", session_path(own, item), json={"events": [MESSAGE]})
    assert sent.status == 200
    headers = {"Authorization": f"Bearer {own.token}"}
    async with own.http.get(session_path(own, item, "/events/stream"), headers=headers) as answer:
        assert answer.status == 200
    assert (await own.stop(item["id"], json={"force": True})).status == 204


async def make_forbidden_calls_with_item_token(
    own: ApiClient, item: dict[str, Any], other: dict[str, Any]
) -> list[HttpAnswer]:
    """Make every call that the token of `item` does not allow; return the answers."""
    base, work_id = own.base_url, item["id"]
    events = {"events": [MESSAGE]}
    return [
        await own.poll(),
        await own("GET", own.work_url()),
        await own("POST", own.work_url(), json={}),
        await own("GET", own.work_url("/stats")),
        await own.get(work_id),
        await own.update(work_id, json={"metadata": {}}),
        await own.ack(other["id"]),
        await own.heartbeat(other["id"]),
        await own.stop(other["id"], json={"force": True}),
        await own.stop("work_unknown"),
        await own("GET", session_path(own, other, "")),
        await own("GET", session_path(own, other)),
        await own("POST", session_path(own, other), json=events),
        await own("GET", session_path(own, other, "/events/stream")),
        await own("GET", f"{base}/sessions/session_unknown"),
        await own("POST", session_path(own, item, "/archive")),
        await own("GET", f"{base}/sessions"),
        await own("POST", f"{base}/sessions", json={"agent": "a", "environment_id": ENV}),
        await own("GET", f"{base}/environments"),
        await own("GET", f"{base}/environments/{ENV}"),
        await own("POST", f"{base}/environments", json=SELF_HOSTED),
    ]


@pytest.mark.parametrize("environment", [ENV, OTHER])
async def test_every_call_that_item_token_does_not_allow_is_403(
    anthropic_api: ApiClient, environment: str
) -> None:
    item, own = await claim_item_with_token(anthropic_api)
    other, _ = await claim_item_with_token(anthropic_api, environment)
    answers = await make_forbidden_calls_with_item_token(own, item, other)
    assert [answer.status for answer in answers] == [403] * len(answers)
    assert {answer.error["type"] for answer in answers} == {"permission_error"}
    assert await anthropic_api.item_state(item["id"]) == "queued"


async def test_item_token_in_path_of_another_environment_is_403(anthropic_api: ApiClient) -> None:
    item, own = await claim_item_with_token(anthropic_api)
    url = own.work_url(f"/{item['id']}/heartbeat", OTHER)
    assert (await own("POST", url)).status == 403


async def test_token_of_stopped_item_gives_no_access_to_session(anthropic_api: ApiClient) -> None:
    item, own = await claim_item_with_token(anthropic_api)
    await anthropic_api.stop(item["id"], json={"force": True})
    assert (await own("GET", session_path(own, item, ""))).status == 403
    assert (await own.stop(item["id"], json={"force": True})).status == 409
    assert (await own.heartbeat(item["id"])).body["state"] == "stopped"


@pytest.mark.parametrize(
    "change",
    [
        lambda token: token[:-1] + ("0" if token[-1] != "0" else "1"),
        lambda token: token.rpartition(".")[0],
        lambda token: token.replace(".work_", ".work_0"),
        lambda token: token + "0",
        lambda token: token + "ä",
        lambda _: "item.",
        lambda _: "item.a.b.c",
    ],
)
async def test_modified_item_token_is_401(anthropic_api: ApiClient, change: Any) -> None:
    item, own = await claim_item_with_token(anthropic_api)
    own.token = change(own.token)
    assert (await own.heartbeat(item["id"], "NO_HEARTBEAT")).status == 401


async def test_only_poll_responses_of_anthropic_dialect_contain_secret(
    anthropic_api: ApiClient, qoder_api: ApiClient
) -> None:
    item, own = await claim_item_with_token(anthropic_api)
    assert "secret" not in (await anthropic_api.get(item["id"])).body
    assert "secret" not in (await anthropic_api.ack(item["id"])).body
    assert all(
        "secret" not in each for each in (await anthropic_api("GET", own.work_url())).body["data"]
    )
    qoder_api.plane.enqueue()
    assert "secret" not in (await qoder_api.poll()).body
    qoder_api.token = own.token
    assert (await qoder_api.heartbeat(item["id"], "NO_HEARTBEAT")).status == 401


async def test_item_tokens_of_two_control_planes_differ(anthropic_api: ApiClient) -> None:
    _, own = await claim_item_with_token(anthropic_api)
    async with ControlPlane(environments=(ENV,), tokens={TOKEN: None}) as another:
        item, _ = await claim_item_with_token(ApiClient(another, anthropic_api.http, "anthropic"))
        stranger = ApiClient(another, anthropic_api.http, "anthropic", token=own.token)
        assert (await stranger.ack(item["id"])).status == 401


async def test_item_token_is_valid_after_restart_with_sqlite(
    tmp_path: Path, clock: ManualClock, http_session: aiohttp.ClientSession
) -> None:
    def open_control_plane() -> ControlPlane:
        store = SqliteStore(tmp_path / "work.db")
        return ControlPlane(environments=(ENV,), tokens={TOKEN: None}, store=store, now=clock)

    async with open_control_plane() as first:
        item, own = await claim_item_with_token(ApiClient(first, http_session, "anthropic"))
    async with open_control_plane() as second:
        own.plane = second
        assert (await own.ack(item["id"])).status == 200
