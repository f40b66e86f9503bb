"""The fault-injecting TCP proxy, and pools behind it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import pytest

from workpool import Session, Settings, Supervisor, handler
from workpool.events import HeartbeatFinished, PollFinished, SessionFinished, SessionStarted
from workpool.testing import Proxy, Recorder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.integration.conftest import MakePool
    from workpool.server import ControlPlane

SECONDS = 10.0
SILENCE = 0.3


class Peer(NamedTuple):
    """One end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, text: bytes) -> None:
        self.writer.write(text)
        await self.writer.drain()

    async def expect(self, text: bytes) -> None:
        async with asyncio.timeout(SECONDS):
            assert await self.reader.readexactly(len(text)) == text

    async def expect_end(self) -> None:
        async with asyncio.timeout(SECONDS):
            assert await self.reader.read() == b""

    async def expect_silence(self) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENCE):
                await self.reader.read(1)

    async def is_reset(self) -> None:
        async with asyncio.timeout(SECONDS):
            with pytest.raises(ConnectionResetError):
                await self.reader.read()


class Wire:
    """A proxy between test clients and a test server."""

    def __init__(self, proxy: Proxy, accepted: asyncio.Queue[Peer]) -> None:
        self.proxy = proxy
        self._accepted = accepted
        self._writers: list[asyncio.StreamWriter] = []

    async def pair(self) -> tuple[Peer, Peer]:
        """Open a connection through the proxy; return the client's end and the server's end."""
        port = int(self.proxy.base_url.rpartition(":")[2])
        async with asyncio.timeout(SECONDS):
            client = Peer(*await asyncio.open_connection("127.0.0.1", port))
            server = await self._accepted.get()
        self._writers += [client.writer, server.writer]
        return client, server

    def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    accepted: asyncio.Queue[Peer] = asyncio.Queue()
    listening = await asyncio.start_server(
        lambda reader, writer: accepted.put_nowait(Peer(reader, writer)), "127.0.0.1", 0
    )
    port = listening.sockets[0].getsockname()[1]
    async with Proxy(f"http://127.0.0.1:{port}") as proxy:
        wire = Wire(proxy, accepted)
        yield wire
    wire.close()
    listening.close()


async def test_proxy_forwards_bytes_and_end_of_stream(wire: Wire) -> None:
    client, server = await wire.pair()
    await client.send(b"question")
    await server.expect(b"question")
    await server.send(b"answer")
    await client.expect(b"answer")
    client.writer.write_eof()
    await server.expect_end()
    await server.send(b"late")
    await client.expect(b"late")
    server.writer.close()
    await client.expect_end()


async def test_proxy_blackhole_drops_bytes_of_open_connections_permanently(wire: Wire) -> None:
    client, server = await wire.pair()
    wire.proxy.blackhole()
    await client.send(b"lost")
    await server.expect_silence()
    server.writer.close()  # even the end of the stream is not forwarded
    await client.expect_silence()
    wire.proxy.heal()
    await client.send(b"lost too")
    await client.expect_silence()
    client, server = await wire.pair()
    await client.send(b"new")
    await server.expect(b"new")


async def test_proxy_partition_delays_bytes_until_healed(wire: Wire) -> None:
    client, server = await wire.pair()
    wire.proxy.partition()
    await client.send(b"question")
    await server.send(b"news")
    await server.expect_silence()
    wire.proxy.partition()  # a second partition without a gap
    await client.expect_silence()
    wire.proxy.heal()
    await server.expect(b"question")
    await client.expect(b"news")


async def test_proxy_half_close_still_forwards_requests(wire: Wire) -> None:
    client, server = await wire.pair()
    wire.proxy.half_close()
    await client.expect_end()
    await client.send(b"question")
    await server.expect(b"question")
    await server.send(b"answer")  # the client does not receive it
    await client.send(b"more")
    await server.expect(b"more")


async def test_proxy_reset_closes_open_connections_and_accepts_new_ones(wire: Wire) -> None:
    client, server = await wire.pair()
    await client.send(b"known to both")
    await server.expect(b"known to both")
    wire.proxy.reset()
    await client.is_reset()
    await server.is_reset()
    client, server = await wire.pair()
    await client.send(b"new")
    await server.expect(b"new")


async def test_proxy_reset_after_client_abort_resets_server_side(wire: Wire) -> None:
    client, server = await wire.pair()
    await client.send(b"known to both")
    await server.expect(b"known to both")
    for link in wire.proxy._links:
        link.worker.transport.abort()
    await asyncio.sleep(0)  # the socket is closed, but the proxy has not noticed
    wire.proxy.reset()
    await server.is_reset()


async def test_proxy_delay_postpones_every_byte(wire: Wire) -> None:
    client, server = await wire.pair()
    loop = asyncio.get_running_loop()
    wire.proxy.delay(SILENCE)
    began = loop.time()
    await client.send(b"question")
    await server.expect(b"question")
    assert loop.time() - began >= SILENCE
    wire.proxy.heal()
    await client.send(b"more")
    await server.expect(b"more")


async def test_proxy_throttle_limits_bytes_per_second(wire: Wire) -> None:
    client, server = await wire.pair()
    loop = asyncio.get_running_loop()
    await client.send(b"warm")
    await server.expect(b"warm")
    wire.proxy.throttle(10_000)
    began = loop.time()
    await client.send(b"x" * 6_000)
    await server.expect(b"x" * 6_000)
    assert loop.time() - began >= 0.5


async def test_closed_proxy_closes_its_connections(wire: Wire) -> None:
    async with Proxy(wire.proxy.base_url) as outer:
        inner = Wire(outer, wire._accepted)
        client, server = await inner.pair()
        outer.blackhole()
        await client.send(b"lost")
    await server.expect_end()
    inner.close()


async def test_exception_in_proxy_block_is_raised_unchanged(wire: Wire) -> None:
    with pytest.raises(KeyError):
        async with Proxy(wire.proxy.base_url):
            raise KeyError("mine")


async def test_proxy_without_control_plane_closes_connections() -> None:
    async with Proxy("http://127.0.0.1:9") as proxy:
        port = int(proxy.base_url.rpartition(":")[2])
        client = Peer(*await asyncio.open_connection("127.0.0.1", port))
        await client.expect_end()
        client.writer.transport.abort()


# -- pools -------------------------------------------------------------------------------------


@handler
async def until_interrupted(session: Session) -> None:
    await session.interrupted()


@pytest.mark.trial
@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["blackhole", "partition"])
async def test_worker_cut_off_by_network_loses_item_to_other_worker(
    plane: ControlPlane,
    make_settings: Callable[..., Settings],
    fault: str,
) -> None:
    @handler
    async def hold(session: Session) -> None:
        if session.redelivered:
            return
        await asyncio.Event().wait()

    cut, free = Recorder(), Recorder()
    (item,) = plane.enqueue()
    async with Proxy(plane.base_url) as way:
        settings = make_settings(base_url=way.base_url, lease_ttl=10, request_timeout=1)
        async with Supervisor(settings, plugins=[hold, cut]):
            await cut.wait_for(SessionStarted)
            getattr(way, fault)()
            held = plane.operations.get(plane.environments[0], item.id).holder
            async with Supervisor(make_settings(lease_ttl=10), plugins=[hold, free]):
                # The lease expires on both clocks in real time.
                lost = await cut.wait_for(SessionFinished, timeout=25)
                assert lost.outcome == "lease_lost"
                done = await free.wait_for(SessionFinished, timeout=25)
                assert done.outcome == "completed"
                way.heal()
                await cut.wait_for(PollFinished, lambda poll: poll.result == "null", count=3)
    taken_at = min(
        record.time
        for record in plane.history.of(item.id)
        if record.kind == "acked" and record.worker_id != held
    )
    late = [
        record
        for record in plane.history.of(item.id)
        if record.worker_id == held and record.time >= taken_at and record.kind != "conflict"
    ]
    assert late == []
    assert plane.summary().overlapping == 0


@pytest.mark.usefixtures("fast_heartbeats")
async def test_throttled_and_delayed_connection_keeps_leases(
    plane: ControlPlane, recorder: Recorder, make_pool: MakePool
) -> None:
    plane.enqueue()
    async with Proxy(plane.base_url) as way:
        way.delay(0.02)
        async with make_pool(until_interrupted, base_url=way.base_url):
            await recorder.wait_for(HeartbeatFinished, lambda each: each.result == "ok", count=3)
    finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "completed"


@pytest.mark.parametrize("fault", ["reset", "half_close"])
async def test_pool_continues_over_new_connections_after_reset(
    plane: ControlPlane, recorder: Recorder, make_pool: MakePool, fault: str
) -> None:
    @handler
    async def done(session: Session) -> None:
        pass

    async with (
        Proxy(plane.base_url) as way,
        make_pool(done, base_url=way.base_url, reclaim_older_than_ms=500),
    ):
        await recorder.wait_for(PollFinished)
        getattr(way, fault)()
        plane.enqueue(count=3)
        await recorder.wait_for(SessionFinished, count=3)
    assert plane.summary().stopped == 3
