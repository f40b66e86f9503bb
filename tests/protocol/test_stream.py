"""The event stream (server-sent events), read as raw blocks.

See workpool/docs/protocol.md, "Event stream".
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.protocol.conftest import ENV, TOKEN, ApiClient, wait_until
from tests.protocol.test_events import (
    BASH,
    create_scripted_session,
    event_history,
    events_path,
    last_event_of_type,
    send_events,
    tool_result,
)
from workpool import inbound_connections
from workpool.server import ControlPlane, SqliteStore
from workpool.server.http import session_routes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

UNKNOWN = "evt_" + "0" * 32


class StreamReader:
    """Reader of the blocks of one open stream."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def read_sse_block(self) -> str:
        async with asyncio.timeout(20):
            return (await self.response.content.readuntil(b"\n\n")).decode()

    async def read_event(self) -> dict[str, Any]:
        """Return the next event; check that its `id:` and `event:` lines agree with its data."""
        while (text := await self.read_sse_block()).startswith(":"):
            pass
        first, second, third = text.removesuffix("\n\n").split("\n")
        event: dict[str, Any] = json.loads(third.removeprefix("data: "))
        assert first == f"id: {event['id']}"
        assert second == f"event: {event['type']}"
        return event


@asynccontextmanager
async def open_stream(
    api: ApiClient, session_id: str, last_id: str | None = None
) -> AsyncIterator[StreamReader]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    if last_id is not None:
        headers["Last-Event-ID"] = last_id
    url = events_path(api, session_id, "/events/stream")
    async with api.http.get(url, headers=headers) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-store"
        reader = StreamReader(response)
        # A server-sent comment shows that the stream is open before the first event.
        assert (await reader.read_sse_block()).startswith(":")
        yield reader


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_stream_without_last_event_id_starts_with_new_events(api: ApiClient) -> None:
    session_id = create_scripted_session(api, BASH)
    use = await last_event_of_type(api, session_id, "agent.tool_use")
    async with open_stream(api, session_id) as one, open_stream(api, session_id) as two:
        await send_events(api, session_id, tool_result(use, "ünïcode \n\r\n two lines"))
        frames = [await one.read_event() for _ in range(3)]
        assert [event["type"] for event in frames] == [
            "user.tool_result",
            "agent.message",
            "session.status_idle",
        ]
        assert frames == (await event_history(api, session_id))[3:]
        assert [await two.read_event() for _ in range(3)] == frames


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_stream_resumes_after_last_event_id(api: ApiClient) -> None:
    session_id = create_scripted_session(api, BASH)
    whole = await event_history(api, session_id)
    for place, event in enumerate(whole):
        async with open_stream(api, session_id, event["id"]) as reader:
            left = whole[place + 1 :]
            assert [await reader.read_event() for _ in left] == left
    # A stream that has replayed the stored events must also send the events that follow.
    async with open_stream(api, session_id, whole[0]["id"]) as reader:
        await send_events(api, session_id, {"type": "user.interrupt"})
        assert [(await reader.read_event())["id"] for _ in whole[1:]] == [
            one["id"] for one in whole[1:]
        ]
        assert (await reader.read_event())["type"] == "user.interrupt"


@pytest.mark.parametrize("unknown", [UNKNOWN, "evt_" + "f" * 32, "nonsense", ""])
async def test_stream_with_unknown_last_event_id_replays_all_events(
    api: ApiClient, unknown: str
) -> None:
    session_id = create_scripted_session(api, BASH)
    async with open_stream(api, session_id, unknown) as reader:
        assert [await reader.read_event() for _ in range(3)] == await event_history(api, session_id)


async def test_stream_with_event_id_of_another_session_replays_all_events(api: ApiClient) -> None:
    first, second = create_scripted_session(api, BASH), create_scripted_session(api, BASH)
    theirs = (await event_history(api, first))[-1]["id"]
    async with open_stream(api, second, theirs) as reader:
        assert (await reader.read_event())["type"] == "user.message"


async def test_idle_stream_sends_keep_alives(
    api: ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_routes, "KEEP_ALIVE_SECONDS", 0.02)
    async with open_stream(api, create_scripted_session(api)) as reader:
        for _ in range(3):
            assert await reader.read_sse_block() == ": keep-alive\n\n"


async def test_stream_ends_when_control_plane_closes(qoder_api: ApiClient) -> None:
    async with open_stream(qoder_api, create_scripted_session(qoder_api)) as reader:
        qoder_api.plane.operations.end_waiting_calls()
        async with asyncio.timeout(20):
            assert await reader.response.content.read() == b""
    # After `end_waiting_calls`, a stream that is opened later must end at once, too.
    async with open_stream(qoder_api, create_scripted_session(qoder_api)) as reader:
        assert await reader.response.content.read() == b""


async def test_stream_of_disconnected_client_is_removed(qoder_api: ApiClient) -> None:
    session_id = create_scripted_session(qoder_api)
    following = qoder_api.plane.operations.sessions._following
    async with open_stream(qoder_api, session_id) as reader:
        await wait_until(lambda: following)
        reader.response.close()
    await wait_until(lambda: not following)


async def test_server_closes_stream_if_client_stops_reading(
    qoder_api: ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbound_connections, "READ_SECONDS", 0.1)
    monkeypatch.setattr(inbound_connections, "CHECK_SECONDS", 0.02)
    session_id = create_scripted_session(qoder_api)
    text = "x" * 1_000_000
    async with open_stream(qoder_api, session_id) as reader:
        message = {"type": "user.message", "content": [{"type": "text", "text": text}]}
        # 20 MB do not fit into the buffers between server and client, so the server must wait.
        for _ in range(20):
            assert (await send_events(qoder_api, session_id, message)).status == 200
        # The server closes the connection of the stream; the connection of the sender stays open.
        await wait_until(lambda: len(qoder_api.plane._connections) == 1)
        with pytest.raises(aiohttp.ClientError):
            await reader.response.content.read()


async def test_event_that_could_not_be_stored_is_not_streamed(
    tmp_path: Path, http_session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_disk_full_error(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    store = SqliteStore(tmp_path / "work.db")
    async with ControlPlane(environments=(ENV,), tokens={TOKEN: None}, store=store) as plane:
        api = ApiClient(plane, http_session, "qoder")
        session_id = create_scripted_session(api, BASH)
        async with open_stream(api, session_id) as reader:
            monkeypatch.setattr("workpool.server.stores.sqlite._write_rows", raise_disk_full_error)
            use = plane.events(session_id)[-1]
            assert (await send_events(api, session_id, tool_result(dict(use)))).status == 500
            assert await reader.response.content.read() == b""


async def test_head_request_to_stream_is_405(api: ApiClient) -> None:
    url = events_path(api, create_scripted_session(api), "/events/stream")
    async with api.http.head(url, headers={"Authorization": f"Bearer {TOKEN}"}) as response:
        assert response.status == 405
