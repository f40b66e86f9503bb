"""Connection limits of the HTTP servers, with real sockets on asyncio's loop and on uvloop."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from tests.unit.event_loops import LOOP_FACTORIES
from workpool import exporter as exporter_module
from workpool import inbound_connections
from workpool.exporter import Exporter
from workpool.inbound_connections import HttpLog, InboundConnections
from workpool.server import ControlPlane, control_plane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

LIMIT = 5
HALF = b"GET / HTTP/1.1\r\nHo"
WHOLE = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
BIG = WHOLE.replace(b"/", b"/big", 1)
WAIT = WHOLE.replace(b"/", b"/wait", 1)
OK = b"HTTP/1.1 200"
MEGABYTE = 1_000_000


class ServerWithConnectionLimit:
    """An HTTP server whose number of connections is limited by an `InboundConnections` object."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.connections = InboundConnections(limit)
        self.released = asyncio.Event()
        self.waiting = 0
        self.port = 0

    async def send_small_response(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def send_big_response(self, _: web.Request) -> web.Response:
        return web.Response(body=b"x" * 20 * MEGABYTE)

    async def respond_when_released(self, _: web.Request) -> web.Response:
        self.waiting += 1
        await self.released.wait()
        return web.Response(text="ok")

    @asynccontextmanager
    async def open_server(self) -> AsyncIterator[ServerWithConnectionLimit]:
        application = web.Application(middlewares=[self.connections.request_tracking_middleware])
        application.router.add_get("/", self.send_small_response)
        application.router.add_get("/big", self.send_big_response)
        application.router.add_get("/wait", self.respond_when_released)
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True)
        await runner.setup()
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        # With a small kernel buffer, unread bytes soon wait in the server's process.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        server = await asyncio.get_running_loop().create_server(
            self.connections.protocol_factory(runner.server), sock=listening
        )
        try:
            yield self
        finally:
            self.released.set()
            server.close()
            await runner.cleanup()
            self.connections.close_all()
            await asyncio.sleep(0)


class SlowlyReadingClient:
    """A TCP client that reads only on request and has a small receive buffer."""

    open: ClassVar[list[SlowlyReadingClient]] = []

    def __init__(self) -> None:
        self.open.append(self)
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(0)

    @classmethod
    async def connect(cls, port: int, request: bytes) -> SlowlyReadingClient:
        client = cls()
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client.socket, ("127.0.0.1", port))
        await client.send_request(request)
        return client

    @classmethod
    def close_all_clients(cls) -> None:
        while cls.open:
            cls.open.pop().socket.close()

    async def send_request(self, request: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, request)

    async def read_bytes(self, size: int = 65536) -> bytes:
        """Return bytes that the server sent; empty once the server has closed the connection."""
        try:
            return await asyncio.get_running_loop().sock_recv(self.socket, size)
        except ConnectionError:
            return b""

    async def read_until_closed(self) -> int:
        total = 0
        while chunk := await self.read_bytes():
            total += len(chunk)
        return total


async def send_request_and_read_answer(port: int, request: bytes = WHOLE) -> bytes:
    client = await SlowlyReadingClient.connect(port, request)
    answer = await client.read_bytes()
    client.socket.close()
    return answer


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - sockets and the kernel have no event
            await asyncio.sleep(0.001)


def server_has_clients_with_unread_bytes(site: ServerWithConnectionLimit, clients: int) -> bool:
    return len(site.connections._unread) == clients


def run_coroutine_on_new_loop(
    new_loop: Callable[[], asyncio.AbstractEventLoop], main: Coroutine[None, None, None]
) -> None:
    async def run_with_time_limit() -> None:
        async with asyncio.timeout(20):
            await main

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run_with_time_limit())


@pytest.fixture(autouse=True)
def shorten_connection_check_interval(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(inbound_connections, "CHECK_SECONDS", 0.01)
    yield
    SlowlyReadingClient.close_all_clients()


@pytest.mark.parametrize("new_loop", LOOP_FACTORIES)
def test_incomplete_requests_at_connection_limit_are_closed_oldest_first(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def assert_oldest_connection_is_closed() -> None:
        async with ServerWithConnectionLimit().open_server() as site:
            clients = [await SlowlyReadingClient.connect(site.port, HALF) for _ in range(3 * LIMIT)]
            for _ in range(2 * LIMIT):
                assert (await send_request_and_read_answer(site.port)).startswith(OK)
                assert len(site.connections) <= LIMIT
            assert await clients[0].read_bytes() == b""

    run_coroutine_on_new_loop(new_loop, assert_oldest_connection_is_closed())


@pytest.mark.parametrize("new_loop", LOOP_FACTORIES)
def test_new_connections_are_refused_if_active_requests_use_all_connections(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def refuse_connection_beyond_limit() -> None:
        async with ServerWithConnectionLimit().open_server() as site:
            clients = [await SlowlyReadingClient.connect(site.port, WAIT) for _ in range(LIMIT)]
            await wait_until(lambda: site.waiting == LIMIT)
            assert await send_request_and_read_answer(site.port) == b""
            site.released.set()
            for client in clients:
                assert (await client.read_bytes()).startswith(OK)
            # The server closes an idle connection in order to accept a new one.
            assert (await send_request_and_read_answer(site.port)).startswith(OK)
            SlowlyReadingClient.close_all_clients()
            await wait_until(lambda: not len(site.connections))

    run_coroutine_on_new_loop(new_loop, refuse_connection_beyond_limit())


async def test_long_requests_at_connection_limit_are_ended_oldest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inbound_connections, "SERVE_SECONDS", 0.0)
    async with asyncio.timeout(20), ServerWithConnectionLimit().open_server() as site:
        clients = [await SlowlyReadingClient.connect(site.port, WAIT) for _ in range(LIMIT)]
        await wait_until(lambda: site.waiting == LIMIT)
        assert (await send_request_and_read_answer(site.port)).startswith(OK)
        assert await clients[0].read_bytes() == b""
        site.released.set()
        for client in clients[1:]:
            assert (await client.read_bytes()).startswith(OK)
        await wait_until(lambda: not site.connections._serving)


async def test_exporter_answers_healthz_while_incomplete_requests_use_all_connections() -> None:
    registry = CollectorRegistry()
    async with Exporter("127.0.0.1", 0, registry, health=list, readiness=list) as exporter:
        for _ in range(exporter_module.CONNECTIONS_MAX + 20):
            await SlowlyReadingClient.connect(exporter.port, HALF)
        answer = await send_request_and_read_answer(
            exporter.port, WHOLE.replace(b"/", b"/healthz", 1)
        )
        assert answer.startswith(OK)
        assert len(exporter._connections) <= exporter_module.CONNECTIONS_MAX


async def test_control_plane_answers_while_incomplete_requests_use_all_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control_plane, "_compute_max_connections", lambda: LIMIT)
    async with ControlPlane() as plane:
        clients = [await SlowlyReadingClient.connect(plane.port, HALF) for _ in range(3 * LIMIT)]
        assert (await send_request_and_read_answer(plane.port)).startswith(b"HTTP/1.1 200")
        assert await clients[0].read_bytes() == b""


def test_control_plane_connection_limit_leaves_descriptors_for_other_uses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for soft, expected in ((1024, 768), (256, 192), (10**9, 10_000), (-1, 10_000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert control_plane._compute_max_connections() == expected


@pytest.mark.parametrize("request_so_far", [b"", HALF])
@pytest.mark.parametrize("new_loop", LOOP_FACTORIES)
def test_connection_without_complete_headers_in_time_is_closed(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    request_so_far: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inbound_connections, "HEADER_SECONDS", 0.05)

    async def wait_for_connection_close() -> None:
        async with ServerWithConnectionLimit().open_server() as site:
            client = await SlowlyReadingClient.connect(site.port, request_so_far)
            assert await client.read_bytes() == b""

    run_coroutine_on_new_loop(new_loop, wait_for_connection_close())


async def test_slowly_sent_header_bytes_do_not_extend_time_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inbound_connections, "HEADER_SECONDS", 0.05)
    async with asyncio.timeout(20), ServerWithConnectionLimit().open_server() as site:
        client = await SlowlyReadingClient.connect(site.port, HALF)
        with suppress(ConnectionError):
            while len(site.connections):
                await client.send_request(b"x")
                await asyncio.sleep(0.005)
        assert not len(site.connections)


async def test_idle_connection_is_kept_longer_than_header_time_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with asyncio.timeout(50), ServerWithConnectionLimit().open_server() as site:
        idle = await SlowlyReadingClient.connect(site.port, WAIT)
        await wait_until(lambda: site.waiting)
        # The limit is short only while no complete request is on its way to the server.
        with monkeypatch.context() as patch:
            patch.setattr(inbound_connections, "HEADER_SECONDS", 0.05)
            site.released.set()
            assert (await idle.read_bytes()).startswith(OK)
            other = await SlowlyReadingClient.connect(site.port, b"")
            # The server closes this connection after HEADER_SECONDS.
            assert await other.read_bytes() == b""
        await idle.send_request(WHOLE)
        assert (await idle.read_bytes()).startswith(OK)
        monkeypatch.setattr(inbound_connections, "HEADER_SECONDS", 0.05)
        await idle.send_request(HALF)
        assert await idle.read_bytes() == b""


async def test_connection_without_next_request_is_closed_after_idle_time_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with asyncio.timeout(20), ServerWithConnectionLimit().open_server() as site:
        idle = await SlowlyReadingClient.connect(site.port, WAIT)
        await wait_until(lambda: site.waiting)
        monkeypatch.setattr(inbound_connections, "IDLE_SECONDS", 0.05)
        site.released.set()
        assert (await idle.read_bytes()).startswith(OK)
        assert await idle.read_bytes() == b""


async def test_active_request_may_last_longer_than_header_and_idle_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with asyncio.timeout(50), ServerWithConnectionLimit().open_server() as site:
        with monkeypatch.context() as patch:
            patch.setattr(inbound_connections, "HEADER_SECONDS", 0.05)
            patch.setattr(inbound_connections, "IDLE_SECONDS", 0.05)
            # Check no connection until the request is active: a check before could close its
            # connection rightly.
            patch.setattr(inbound_connections, "CHECK_SECONDS", 3600.0)
            waiting = await SlowlyReadingClient.connect(site.port, WAIT)
            await wait_until(lambda: site.waiting)
            patch.setattr(inbound_connections, "CHECK_SECONDS", 0.01)
            site.connections._close_overdue_connections()
            other = await SlowlyReadingClient.connect(site.port, b"")
            # The server closes this connection after HEADER_SECONDS. Then the active request is
            # older than both limits.
            assert await other.read_bytes() == b""
        site.released.set()
        assert (await waiting.read_bytes()).startswith(OK)


@pytest.mark.parametrize("new_loop", LOOP_FACTORIES)
def test_client_that_reads_nothing_is_disconnected(
    new_loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbound_connections, "READ_SECONDS", 0.05)

    async def assert_client_is_disconnected() -> None:
        async with ServerWithConnectionLimit().open_server() as site:
            client = await SlowlyReadingClient.connect(site.port, BIG)
            await wait_until(lambda: len(site.connections))
            await wait_until(lambda: not len(site.connections))
            assert site.connections._unread_bytes == 0
            assert await client.read_until_closed() < 20 * MEGABYTE

    run_coroutine_on_new_loop(new_loop, assert_client_is_disconnected())


@pytest.mark.parametrize("new_loop", LOOP_FACTORIES)
def test_client_that_reads_slowly_gets_whole_response(
    new_loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("READ_SECONDS", "HEADER_SECONDS", "IDLE_SECONDS"):
        monkeypatch.setattr(inbound_connections, name, 1.0)

    async def read_whole_response_slowly() -> None:
        loop = asyncio.get_running_loop()
        async with ServerWithConnectionLimit().open_server() as site:
            client = await SlowlyReadingClient.connect(site.port, BIG)
            total, started = 0, loop.time()
            while total < 20 * MEGABYTE and (chunk := await client.read_bytes(MEGABYTE)):
                total += len(chunk)
                if loop.time() < started + 1.2:
                    await asyncio.sleep(0.01)
            assert total > 20 * MEGABYTE

    run_coroutine_on_new_loop(new_loop, read_whole_response_slowly())


@pytest.mark.parametrize("new_loop", LOOP_FACTORIES)
def test_unread_bytes_above_limit_disconnect_slowest_reader(
    new_loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbound_connections, "UNREAD_BYTES_MAX", 50 * MEGABYTE)

    async def assert_slowest_reader_is_disconnected() -> None:
        async with ServerWithConnectionLimit(limit=100).open_server() as site:
            clients = []
            for count in range(1, 11):
                clients.append(await SlowlyReadingClient.connect(site.port, BIG))
                # Each client leaves almost 20 MB unread. The third client exceeds the limit of
                # 50 MB, so the server disconnects the first client.
                await wait_until(partial(server_has_clients_with_unread_bytes, site, min(count, 2)))
                assert site.connections._unread_bytes <= 50 * MEGABYTE
            assert (await send_request_and_read_answer(site.port)).startswith(OK)
            assert await clients[0].read_until_closed() < 20 * MEGABYTE
            assert await clients[-1].read_bytes(1)
            SlowlyReadingClient.close_all_clients()
            await wait_until(lambda: not len(site.connections))
            assert site.connections._unread_bytes == 0

    run_coroutine_on_new_loop(new_loop, assert_slowest_reader_is_disconnected())


async def test_malformed_request_to_exporter_is_one_debug_line_without_its_content(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with Exporter(
        "127.0.0.1", 0, CollectorRegistry(), health=list, readiness=list
    ) as exporter:
        answer = await send_request_and_read_answer(
            exporter.port, b"GET / HTTP/1.1\r\nAuthorization : secret\r\n\r\n"
        )
    assert answer.startswith(b"HTTP/1.0 400")
    assert "secret" not in caplog.text
    [record] = [each for each in caplog.records if each.name == "workpool.exporter.http"]
    assert (record.levelno, record.exc_info) == (logging.DEBUG, None)


async def test_malformed_request_to_control_plane_is_one_debug_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with ControlPlane() as plane:
        await send_request_and_read_answer(
            plane.port, b"GET / HTTP/1.1\r\nAuthorization : secret\r\n\r\n"
        )
    assert "secret" not in caplog.text
    [record] = [each for each in caplog.records if each.name == "workpool.server.http"]
    assert record.levelno == logging.DEBUG


def test_http_error_other_than_malformed_request_is_logged_as_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = HttpLog(logging.getLogger("workpool.exporter.http"))
    log.error("Unhandled exception", exc_info=ValueError("a bug"))
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "a bug" in caplog.text
