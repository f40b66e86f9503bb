"""The TCP proxy that injects network faults, and pools that are connected through it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import pytest

from workpool import Session, Settings, Supervisor, handler
from workpool.events import HeartbeatFinished, PollFinished, SessionFinished, SessionStarted
from workpool.testing import Proxy, Recorder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.integration.conftest import PoolFactory
    from workpool.server import ControlPlane

WAIT_SECONDS = 30.0
SILENT_SECONDS = 0.3


class ProxyConnectionEnd(NamedTuple):
    """The client's end or the server's end of a connection through the proxy."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send_bytes(self, text: bytes) -> None:
        self.writer.write(text)
        await self.writer.drain()

    async def expect_bytes(self, text: bytes) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            assert await self.reader.readexactly(len(text)) == text

    async def expect_end_of_stream(self) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            assert await self.reader.read() == b""

    async def expect_no_bytes(self) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENT_SECONDS):
                await self.reader.read(1)

    async def expect_connection_reset(self) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            with pytest.raises(ConnectionResetError):
                await self.reader.read()


class ProxyTestbed:
    """A proxy between test clients and a test server."""

    def __init__(self, proxy: Proxy, accepted: asyncio.Queue[ProxyConnectionEnd]) -> None:
        self.proxy = proxy
        self._accepted = accepted
        self._writers: list[asyncio.StreamWriter] = []

    async def connect_through_proxy(self) -> tuple[ProxyConnectionEnd, ProxyConnectionEnd]:
        """Open a connection through the proxy; return the client's end and the server's end."""
        port = int(self.proxy.base_url.rpartition(":")[2])
        async with asyncio.timeout(WAIT_SECONDS):
            client = ProxyConnectionEnd(*await asyncio.open_connection("127.0.0.1", port))
            server = await self._accepted.get()
        self._writers += [client.writer, server.writer]
        return client, server

    def abort_connections(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


@pytest.fixture
async def testbed() -> AsyncIterator[ProxyTestbed]:
    accepted: asyncio.Queue[ProxyConnectionEnd] = asyncio.Queue()
    listening = await asyncio.start_server(
        lambda reader, writer: accepted.put_nowait(ProxyConnectionEnd(reader, writer)),
        "127.0.0.1",
        0,
    )
    port = listening.sockets[0].getsockname()[1]
    async with Proxy(f"http://127.0.0.1:{port}") as proxy:
        wire = ProxyTestbed(proxy, accepted)
        yield wire
    wire.abort_connections()
    listening.close()


async def test_proxy_forwards_bytes_and_end_of_stream(testbed: ProxyTestbed) -> None:
    client, server = await testbed.connect_through_proxy()
    await client.send_bytes(b"question")
    await server.expect_bytes(b"question")
    await server.send_bytes(b"answer")
    await client.expect_bytes(b"answer")
    client.writer.write_eof()
    await server.expect_end_of_stream()
    await server.send_bytes(b"late")
    await client.expect_bytes(b"late")
    server.writer.close()
    await client.expect_end_of_stream()


async def test_proxy_blackhole_drops_bytes_of_open_connections_permanently(
    testbed: ProxyTestbed,
) -> None:
    client, server = await testbed.connect_through_proxy()
    testbed.proxy.blackhole()
    await client.send_bytes(b"lost")
    await server.expect_no_bytes()
    server.writer.close()
    await client.expect_no_bytes()
    testbed.proxy.heal()
    await client.send_bytes(b"lost too")
    await client.expect_no_bytes()
    client, server = await testbed.connect_through_proxy()
    await client.send_bytes(b"new")
    await server.expect_bytes(b"new")


async def test_proxy_partition_delays_bytes_until_healed(testbed: ProxyTestbed) -> None:
    client, server = await testbed.connect_through_proxy()
    testbed.proxy.partition()
    await client.send_bytes(b"question")
    await server.send_bytes(b"news")
    await server.expect_no_bytes()
    testbed.proxy.partition()
    await client.expect_no_bytes()
    testbed.proxy.heal()
    await server.expect_bytes(b"question")
    await client.expect_bytes(b"news")


async def test_proxy_half_close_ends_stream_to_client_but_forwards_client_data(
    testbed: ProxyTestbed,
) -> None:
    client, server = await testbed.connect_through_proxy()
    testbed.proxy.half_close()
    await client.expect_end_of_stream()
    await client.send_bytes(b"question")
    await server.expect_bytes(b"question")
    await server.send_bytes(b"answer")
    await client.send_bytes(b"more")
    await server.expect_bytes(b"more")


async def test_proxy_reset_closes_open_connections_and_accepts_new_ones(
    testbed: ProxyTestbed,
) -> None:
    client, server = await testbed.connect_through_proxy()
    await client.send_bytes(b"known to both")
    await server.expect_bytes(b"known to both")
    testbed.proxy.reset()
    await client.expect_connection_reset()
    await server.expect_connection_reset()
    client, server = await testbed.connect_through_proxy()
    await client.send_bytes(b"new")
    await server.expect_bytes(b"new")


async def test_proxy_resets_server_connection_even_if_client_connection_was_aborted(
    testbed: ProxyTestbed,
) -> None:
    client, server = await testbed.connect_through_proxy()
    await client.send_bytes(b"known to both")
    await server.expect_bytes(b"known to both")
    for link in testbed.proxy._connections:
        link.worker.transport.abort()
    # In this one iteration of the event loop, the workers' transports close, but the proxy's
    # tasks that forward bytes do not notice it yet.
    await asyncio.sleep(0)
    testbed.proxy.reset()
    await server.expect_connection_reset()


async def test_proxy_delay_postpones_every_byte(testbed: ProxyTestbed) -> None:
    client, server = await testbed.connect_through_proxy()
    loop = asyncio.get_running_loop()
    testbed.proxy.delay(SILENT_SECONDS)
    began = loop.time()
    await client.send_bytes(b"question")
    await server.expect_bytes(b"question")
    assert loop.time() - began >= SILENT_SECONDS
    testbed.proxy.heal()
    await client.send_bytes(b"more")
    await server.expect_bytes(b"more")


async def test_proxy_throttle_limits_bytes_per_second(testbed: ProxyTestbed) -> None:
    client, server = await testbed.connect_through_proxy()
    loop = asyncio.get_running_loop()
    await client.send_bytes(b"warm")
    await server.expect_bytes(b"warm")
    testbed.proxy.throttle(10_000)
    began = loop.time()
    await client.send_bytes(b"x" * 6_000)
    await server.expect_bytes(b"x" * 6_000)
    assert loop.time() - began >= 0.5


async def test_closed_proxy_closes_its_connections(testbed: ProxyTestbed) -> None:
    async with Proxy(testbed.proxy.base_url) as outer:
        inner = ProxyTestbed(outer, testbed._accepted)
        client, server = await inner.connect_through_proxy()
        outer.blackhole()
        await client.send_bytes(b"lost")
    await server.expect_end_of_stream()
    inner.abort_connections()


async def test_proxy_context_manager_does_not_change_exception_raised_in_its_block(
    testbed: ProxyTestbed,
) -> None:
    with pytest.raises(KeyError):
        async with Proxy(testbed.proxy.base_url):
            raise KeyError("mine")


async def test_proxy_without_control_plane_closes_connections() -> None:
    async with Proxy("http://127.0.0.1:9") as proxy:
        port = int(proxy.base_url.rpartition(":")[2])
        client = ProxyConnectionEnd(*await asyncio.open_connection("127.0.0.1", port))
        await client.expect_end_of_stream()
        client.writer.transport.abort()


@handler
async def wait_for_interruption(session: Session) -> None:
    await session.interrupted()


@pytest.mark.trial
@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["blackhole", "partition"])
async def test_worker_without_network_loses_item_to_another_worker(
    control_plane: ControlPlane,
    make_settings: Callable[..., Settings],
    fault: str,
) -> None:
    @handler
    async def wait_in_first_session(session: Session) -> None:
        if session.redelivered:
            return
        await asyncio.Event().wait()

    cut_off, free = Recorder(), Recorder()
    (item,) = control_plane.enqueue()
    async with Proxy(control_plane.base_url) as proxy:
        settings = make_settings(base_url=proxy.base_url, lease_ttl=10, request_timeout=1)
        async with Supervisor(settings, plugins=[wait_in_first_session, cut_off]):
            await cut_off.wait_for(SessionStarted)
            getattr(proxy, fault)()
            held = control_plane.operations.get_item(control_plane.environments[0], item.id).holder
            async with Supervisor(
                make_settings(lease_ttl=10), plugins=[wait_in_first_session, free]
            ):
                lost = await cut_off.wait_for(SessionFinished, timeout=45)
                assert lost.outcome == "lease_lost"
                done = await free.wait_for(SessionFinished, timeout=45)
                assert done.outcome == "completed"
                proxy.heal()
                await cut_off.wait_for(PollFinished, lambda poll: poll.result == "null", count=3)
    taken_at = min(
        record.time
        for record in control_plane.history.records_of_item(item.id)
        if record.kind == "acked" and record.worker_id != held
    )
    late = [
        record
        for record in control_plane.history.records_of_item(item.id)
        if record.worker_id == held and record.time >= taken_at and record.kind != "conflict"
    ]
    assert late == []
    assert control_plane.summary().overlapping == 0


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_pool_behind_slow_connection_keeps_leases(
    control_plane: ControlPlane, recorder: Recorder, make_pool: PoolFactory
) -> None:
    control_plane.enqueue()
    async with Proxy(control_plane.base_url) as proxy:
        proxy.delay(0.02)
        async with make_pool(wait_for_interruption, base_url=proxy.base_url):
            await recorder.wait_for(HeartbeatFinished, lambda each: each.result == "ok", count=3)
    finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "completed"


@pytest.mark.parametrize("fault", ["reset", "half_close"])
async def test_pool_continues_over_new_connections_after_reset(
    control_plane: ControlPlane, recorder: Recorder, make_pool: PoolFactory, fault: str
) -> None:
    @handler
    async def return_at_once(session: Session) -> None:
        pass

    async with (
        Proxy(control_plane.base_url) as proxy,
        make_pool(return_at_once, base_url=proxy.base_url, reclaim_older_than_ms=500),
    ):
        await recorder.wait_for(PollFinished)
        getattr(proxy, fault)()
        control_plane.enqueue(count=3)
        await recorder.wait_for(SessionFinished, count=3)
    assert control_plane.summary().stopped == 3
