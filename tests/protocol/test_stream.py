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

from tests.protocol.conftest import ENV, TOKEN, Api, until
from tests.protocol.test_events import BASH, history, last, path, result, scripted, send
from workpool import inbound_connections
from workpool.server import ControlPlane, SqliteStore
from workpool.server.http import session_routes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

UNKNOWN = "evt_" + "0" * 32


class Reader:
    """The blocks of one open stream, in order."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def block(self) -> str:
        async with asyncio.timeout(20):
            return (await self.response.content.readuntil(b"\n\n")).decode()

    async def event(self) -> dict[str, Any]:
        """Return the next event, whose three lines must agree."""
        while (text := await self.block()).startswith(":"):
            pass
        first, second, third = text.removesuffix("\n\n").split("\n")
        event: dict[str, Any] = json.loads(third.removeprefix("data: "))
        assert first == f"id: {event['id']}"
        assert second == f"event: {event['type']}"
        return event


@asynccontextmanager
async def stream(api: Api, session_id: str, last_id: str | None = None) -> AsyncIterator[Reader]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    if last_id is not None:
        headers["Last-Event-ID"] = last_id
    url = path(api, session_id, "/events/stream")
    async with api.http.get(url, headers=headers) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-store"
        reader = Reader(response)
        assert (await reader.block()).startswith(":")  # the stream is open before the first event
        yield reader


@pytest.mark.usefixtures("both_stores")
async def test_stream_without_last_event_id_starts_with_new_events(api: Api) -> None:
    session_id = scripted(api, BASH)
    use = await last(api, session_id, "agent.tool_use")
    async with stream(api, session_id) as one, stream(api, session_id) as two:
        await send(api, session_id, result(use, "ünïcode \n\r\n two lines"))
        frames = [await one.event() for _ in range(3)]
        assert [event["type"] for event in frames] == [
            "user.tool_result",
            "agent.message",
            "session.status_idle",
        ]
        assert frames == (await history(api, session_id))[3:]
        assert [await two.event() for _ in range(3)] == frames


@pytest.mark.usefixtures("both_stores")
async def test_stream_resumes_after_last_event_id(api: Api) -> None:
    session_id = scripted(api, BASH)
    whole = await history(api, session_id)
    for place, event in enumerate(whole):
        async with stream(api, session_id, event["id"]) as reader:
            left = whole[place + 1 :]
            assert [await reader.event() for _ in left] == left
    # the stream then continues with new events
    async with stream(api, session_id, whole[0]["id"]) as reader:
        await send(api, session_id, {"type": "user.interrupt"})
        assert [(await reader.event())["id"] for _ in whole[1:]] == [one["id"] for one in whole[1:]]
        assert (await reader.event())["type"] == "user.interrupt"


@pytest.mark.parametrize("unknown", [UNKNOWN, "evt_" + "f" * 32, "nonsense", ""])
async def test_stream_with_unknown_last_event_id_replays_all_events(api: Api, unknown: str) -> None:
    session_id = scripted(api, BASH)
    async with stream(api, session_id, unknown) as reader:
        assert [await reader.event() for _ in range(3)] == await history(api, session_id)


async def test_stream_with_event_id_of_another_session_replays_all_events(api: Api) -> None:
    first, second = scripted(api, BASH), scripted(api, BASH)
    theirs = (await history(api, first))[-1]["id"]
    async with stream(api, second, theirs) as reader:
        assert (await reader.event())["type"] == "user.message"


async def test_silent_stream_sends_keep_alives(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_routes, "KEEP_ALIVE_SECONDS", 0.02)
    async with stream(api, scripted(api)) as reader:
        for _ in range(3):
            assert await reader.block() == ": keep-alive\n\n"


async def test_stream_ends_when_control_plane_closes(qoder: Api) -> None:
    async with stream(qoder, scripted(qoder)) as reader:
        qoder.plane.operations.release()
        async with asyncio.timeout(20):
            assert await reader.response.content.read() == b""
    async with stream(qoder, scripted(qoder)) as reader:  # a new stream ends as well
        assert await reader.response.content.read() == b""


async def test_stream_of_disconnected_reader_is_forgotten(qoder: Api) -> None:
    session_id = scripted(qoder)
    following = qoder.plane.operations.sessions._following
    async with stream(qoder, session_id) as reader:
        await until(lambda: following)
        reader.response.close()
    await until(lambda: not following)


async def test_stream_of_reader_that_does_not_read_is_cut_off(
    qoder: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbound_connections, "READ_SECONDS", 0.1)
    monkeypatch.setattr(inbound_connections, "CHECK_SECONDS", 0.02)
    session_id = scripted(qoder)
    text = "x" * 1_000_000
    async with stream(qoder, session_id) as reader:
        message = {"type": "user.message", "content": [{"type": "text", "text": text}]}
        for _ in range(20):  # more than all buffers between server and client can hold
            assert (await send(qoder, session_id, message)).status == 200
        # only the connection that sent the messages is left
        await until(lambda: len(qoder.plane._connections) == 1)
        with pytest.raises(aiohttp.ClientError):
            await reader.response.content.read()


async def test_event_that_could_not_be_stored_is_not_streamed(
    tmp_path: Path, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    store = SqliteStore(tmp_path / "work.db")
    async with ControlPlane(environments=(ENV,), tokens={TOKEN: None}, store=store) as plane:
        api = Api(plane, http, "qoder")
        session_id = scripted(api, BASH)
        async with stream(api, session_id) as reader:
            monkeypatch.setattr("workpool.server.stores.sqlite._write", full)
            use = plane.events(session_id)[-1]
            assert (await send(api, session_id, result(dict(use)))).status == 500
            assert await reader.response.content.read() == b""


async def test_head_request_to_stream_is_405(api: Api) -> None:
    url = path(api, scripted(api), "/events/stream")
    async with api.http.head(url, headers={"Authorization": f"Bearer {TOKEN}"}) as response:
        assert response.status == 405
