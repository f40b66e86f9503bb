"""A check runs right before a request is sent. No byte of a refused request is sent."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver
from yarl import URL

from tests.unit.transport_helpers import TOKEN, connected_transport
from workpool import Settings, WorkClient
from workpool.errors import RefusedError, TransientError
from workpool.wire import endpoints
from workpool.wire.http.call_options import CallOptions, Priority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

WORK = "work_1"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull"
DENIED = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"
ANY: Any = endpoints.Endpoint("stop", "POST", lambda _: None)
READ: Any = endpoints.Endpoint("get", "GET", lambda _: None)
LARGE = b"[" + b" " * 300_000 + b"]"


def describe_body_size(body: bytes | None) -> str:
    return "no body" if body is None else f"{len(body)} bytes"


class RefusedByRequestCheckError(Exception):
    """The exception that a check raises so that its request is not sent."""


class RequestCheckTimeoutError(TimeoutError):
    """The error by which a check refuses a request; this error looks like a network error.

    aiohttp repeats a GET request after a network error.
    """


@dataclass
class RecordingServer:
    """A server that records the bytes of each connection and answers each complete request.

    Attributes:
        received: The received bytes of each connection.
        answers: Its answers in order, the last one repeatedly; None closes the connection.
    """

    answers: list[bytes | None] = field(default_factory=lambda: [ANSWER])
    received: list[bytearray] = field(default_factory=list)
    url: str = ""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    handlers: set[asyncio.Task[None]] = field(default_factory=set)

    def __len__(self) -> int:
        return sum(map(len, self.received))

    async def serve_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        this = asyncio.current_task()
        assert this is not None
        self.handlers.add(this)
        bytes_of_this = bytearray()
        self.received.append(bytes_of_this)
        request = b""
        while piece := await reader.read(65536):
            bytes_of_this += piece
            self.arrived.set()
            request += piece
            if is_complete_request(request):
                request = b""
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if answer is None:
                    break
                writer.write(answer)
        writer.close()


def is_complete_request(request: bytes) -> bool:
    head, end, body = request.partition(b"\r\n\r\n")
    _, _, length = head.partition(b"Content-Length: ")
    return bool(end) and len(body) >= int(length.split(b"\r\n")[0] or 0)


@asynccontextmanager
async def recording_server(*answers: bytes | None) -> AsyncIterator[RecordingServer]:
    recorder = RecordingServer(list(answers)) if answers else RecordingServer()
    listener = await asyncio.start_server(recorder.serve_connection, "127.0.0.1", 0)
    recorder.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with listener:
        yield recorder
        await asyncio.wait_for(asyncio.gather(*recorder.handlers), 20)


def settings_for_server(server: RecordingServer, **values: Any) -> Settings:
    return Settings(base_url=server.url, environment_id="env_1", token=TOKEN, **values)


def refuse_request() -> None:
    raise RefusedByRequestCheckError


def refuse_request_with_timeout_error() -> None:
    raise RequestCheckTimeoutError


def make_request_arguments(
    url: str, check: Callable[[], None] | None, body: bytes | None = None, endpoint: Any = ANY
) -> tuple[Any, ...]:
    return endpoint, URL(f"{url}/x"), 20, None, body, CallOptions(check)


class SwitchableRequestCheck:
    """A check that counts its calls and refuses requests while `allows_sending` is false."""

    def __init__(self) -> None:
        self.allows_sending = True
        self.asked = 0

    def __call__(self) -> None:
        self.asked += 1
        if not self.allows_sending:
            raise RefusedByRequestCheckError


@asynccontextmanager
async def make_default_client_session() -> AsyncIterator[None]:
    yield None


def make_client_session_raising_for_status() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(raise_for_status=True)


def make_traced_client_session() -> aiohttp.ClientSession:
    """Return a client session with trace callbacks that wait at each step of a request."""

    async def delay_request_start(*_: object) -> None:
        await asyncio.sleep(0.01)

    trace = aiohttp.TraceConfig()
    for signal in (
        trace.on_request_start,
        trace.on_request_headers_sent,
        trace.on_request_chunk_sent,
        trace.on_connection_create_end,
        trace.on_connection_reuseconn,
    ):
        signal.append(delay_request_start)
    return aiohttp.ClientSession(trace_configs=[trace])


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("endpoint", [ANY, READ], ids=["POST", "GET"])
@pytest.mark.parametrize("body", [None, b"", b'{"force":true}', LARGE], ids=describe_body_size)
@pytest.mark.parametrize(
    "session",
    [
        make_default_client_session,
        make_client_session_raising_for_status,
        make_traced_client_session,
    ],
)
async def test_request_refused_by_request_check_sends_no_byte(
    session: Any, body: bytes | None, endpoint: Any, *, used_before: bool
) -> None:
    async with (
        recording_server() as server,
        session() as own,
        connected_transport(server.url, own) as transport,
    ):
        if used_before:
            await transport.send(*make_request_arguments(server.url, None))
        with pytest.raises(RefusedByRequestCheckError):
            await transport.send(
                *make_request_arguments(server.url, refuse_request, body, endpoint)
            )
        for _ in range(2):
            await transport.send(*make_request_arguments(server.url, None))
    count = 2 + used_before
    all_bytes = b"".join(server.received)
    assert all_bytes == all_bytes[: len(all_bytes) // count] * count
    assert all_bytes.count(b"HTTP/1.1") == count


@pytest.mark.parametrize("endpoint", [ANY, READ], ids=["POST", "GET"])
async def test_request_whose_check_raises_network_error_is_not_repeated(endpoint: Any) -> None:
    async with recording_server() as server, connected_transport(server.url) as transport:
        await transport.send(*make_request_arguments(server.url, None))
        before = len(server)
        with pytest.raises(RequestCheckTimeoutError):
            await transport.send(
                *make_request_arguments(
                    server.url, refuse_request_with_timeout_error, endpoint=endpoint
                )
            )
        assert len(server) == before


async def test_on_request_callback_is_not_called_if_request_check_refuses_request() -> None:
    reported: list[str] = []
    async with recording_server() as server, connected_transport(server.url) as transport:
        transport.on_request = lambda *each: reported.append(each[1])
        with pytest.raises(RefusedByRequestCheckError):
            await transport.send(*make_request_arguments(server.url, refuse_request))
        await transport.send(*make_request_arguments(server.url, lambda: None))
    assert reported == ["2xx"]


CALLS: dict[str, Callable[[WorkClient, CallOptions], Awaitable[object]]] = {
    "ack": lambda client, options: client.ack(WORK, options=options),
    "ack with permit": lambda client, options: client.ack(WORK, permit=True, options=options),
    "heartbeat": lambda client, options: client.heartbeat(WORK, options=options),
    "stop": lambda client, options: client.stop(WORK, force=True, options=options),
    "update": lambda client, options: client.update_metadata(WORK, {"a": "b"}, options=options),
    "get": lambda client, options: client.get(WORK, options=options),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("priority", Priority)
async def test_every_client_call_for_an_item_runs_the_request_check(
    name: str, priority: Priority
) -> None:
    async with (
        recording_server() as server,
        WorkClient(settings_for_server(server)) as client,
    ):
        with pytest.raises(RefusedByRequestCheckError):
            await CALLS[name](client, CallOptions(refuse_request, priority))
    assert len(server) == 0


class DelayedResolver(AbstractResolver):
    """A host resolver that answers once `release` is set."""

    def __init__(self) -> None:
        self.asked, self.release = asyncio.Event(), asyncio.Event()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[Any]:
        assert family != socket.AF_INET6
        self.asked.set()
        await self.release.wait()
        where = {"hostname": host, "host": "127.0.0.1", "port": port, "proto": 0}
        return [{**where, "family": socket.AF_INET, "flags": socket.AI_NUMERICHOST}]

    async def close(self) -> None:
        pass


async def test_request_refused_by_request_check_after_slow_host_lookup_sends_no_byte() -> None:
    check = SwitchableRequestCheck()
    async with recording_server() as server:
        resolver = DelayedResolver()
        url = server.url.replace("127.0.0.1", "pool.invalid")
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=resolver)) as session,
            connected_transport(url, session) as transport,
            asyncio.TaskGroup() as group,
        ):
            sending = group.create_task(
                assert_refused_by_check(transport.send(*make_request_arguments(url, check)))
            )
            await resolver.asked.wait()
            assert check.asked == 0
            check.allows_sending = False
            resolver.release.set()
            await sending
    assert len(server) == 0
    assert len(server.received) == 1  # The connection was opened, but no byte was sent on it.


async def assert_refused_by_check(call: Awaitable[object]) -> None:
    with pytest.raises(RefusedByRequestCheckError):
        await call


async def test_request_refused_by_request_check_after_slow_proxy_sends_no_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The proxy receives the CONNECT request for the host, but no byte of the refused request."""
    check, asked, release, ended = (
        SwitchableRequestCheck(),
        asyncio.Event(),
        asyncio.Event(),
        asyncio.Event(),
    )
    first: list[bytes] = []

    async def delayed_proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first.append(await reader.readuntil(b"\r\n\r\n"))
        asked.set()
        await release.wait()
        writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
        first.append(await reader.read())
        writer.close()
        ended.set()

    listener = await asyncio.start_server(delayed_proxy, "127.0.0.1", 0)
    host = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    monkeypatch.setenv("https_proxy", f"http://{host}")
    monkeypatch.setenv("no_proxy", "")
    url = "https://pool.invalid"
    async with listener, connected_transport(url) as transport, asyncio.TaskGroup() as group:
        sending = group.create_task(
            assert_transient_error(transport.send(*make_request_arguments(url, check)))
        )
        await asked.wait()
        assert check.asked == 0
        check.allows_sending = False
        release.set()
        await sending
        await ended.wait()
    assert first[0].startswith(b"CONNECT pool.invalid:443 ")
    assert first[1] == b""


async def assert_transient_error(call: Awaitable[object]) -> None:
    with pytest.raises(TransientError):
        await call


async def test_request_refused_by_request_check_after_wait_for_connection_sends_no_byte() -> None:
    check = SwitchableRequestCheck()
    connector = aiohttp.TCPConnector(limit=1)
    # The server sends no byte of an answer, so the first request occupies the only connection until
    # the test cancels it.
    hold: list[bytes | None] = [b""]
    async with (
        recording_server(*hold) as server,
        aiohttp.ClientSession(connector=connector) as session,
        connected_transport(server.url, session) as transport,
        asyncio.TaskGroup() as group,
    ):
        first = group.create_task(transport.send(*make_request_arguments(server.url, None)))
        await server.arrived.wait()
        before = len(server)
        second = group.create_task(
            assert_refused_by_check(transport.send(*make_request_arguments(server.url, check)))
        )
        await asyncio.sleep(0)
        check.allows_sending = False
        first.cancel()
        await second
        assert len(server) == before


async def test_request_refused_by_request_check_after_wait_for_rate_limit_sends_no_byte() -> None:
    check = SwitchableRequestCheck()
    async with (
        recording_server() as server,
        WorkClient(settings_for_server(server, write_rate=1)) as client,
        asyncio.TaskGroup() as group,
    ):
        await client.acquire_ack_permit()
        stopping = client.stop(WORK, force=True, options=CallOptions(check))
        sending = group.create_task(assert_refused_by_check(stopping))
        await asyncio.sleep(0)
        check.allows_sending = False
        client.release_ack_permit()
        await sending
    assert len(server) == 0


async def test_request_reaches_server_while_trace_callback_of_callers_session_still_waits() -> None:
    """The callback runs for a sent chunk, and waits until the server has received bytes."""
    waiting, release = asyncio.Event(), asyncio.Event()

    async def block_until_released(*_: object) -> None:
        waiting.set()
        await release.wait()

    trace = aiohttp.TraceConfig()
    trace.on_request_chunk_sent.append(block_until_released)
    async with (
        recording_server() as server,
        aiohttp.ClientSession(trace_configs=[trace]) as session,
        connected_transport(server.url, session) as transport,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(transport.send(*make_request_arguments(server.url, lambda: None, b"{}")))
        await waiting.wait()
        await server.arrived.wait()
        release.set()


@pytest.mark.parametrize("body", [None, b'{"force":true}', LARGE], ids=describe_body_size)
@pytest.mark.parametrize("session", [make_default_client_session, make_traced_client_session])
async def test_request_that_passes_request_check_is_checked_once_and_sent_completely(
    session: Any, body: bytes | None
) -> None:
    check = SwitchableRequestCheck()
    async with (
        recording_server() as server,
        session() as own,
        connected_transport(server.url, own) as transport,
    ):
        await transport.send(*make_request_arguments(server.url, check, body))
    head, _, arrived = bytes(server.received[0]).partition(b"\r\n\r\n")
    assert (check.asked, arrived) == (1, body or b"")
    assert f"Content-Length: {len(body or b'')}".encode() in head
    assert (b"Content-Type: application/json" in head) == (body is not None)


async def test_request_check_runs_again_before_request_is_repeated_with_renewed_token(
    tmp_path: Path,
) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    check = SwitchableRequestCheck()

    async def answer_401_and_refuse_next_requests(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reader.readuntil(b"\r\n\r\n")
        check.allows_sending = False
        writer.write(DENIED)
        rest.append(await reader.read())
        writer.close()
        ended.set()

    ended = asyncio.Event()
    rest: list[bytes] = []
    listener = await asyncio.start_server(answer_401_and_refuse_next_requests, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with listener, connected_transport(url, token_file=path) as transport:
        path.write_text("new")
        with pytest.raises(RefusedByRequestCheckError):
            await transport.send(*make_request_arguments(url, check))
        await ended.wait()
    assert check.asked == 2
    assert rest == [b""]


async def test_get_request_repeated_by_aiohttp_on_new_connection_is_checked_again() -> None:
    check = SwitchableRequestCheck()

    def allow_this_and_refuse_next_requests() -> None:
        check()
        check.allows_sending = False

    async with (
        recording_server(ANSWER, None, ANSWER) as server,
        connected_transport(server.url) as transport,
    ):
        await transport.send(*make_request_arguments(server.url, None))
        with pytest.raises(RefusedByRequestCheckError):
            await transport.send(
                *make_request_arguments(
                    server.url, allow_this_and_refuse_next_requests, endpoint=READ
                )
            )
        assert check.asked == 2
        assert [len(each) > 0 for each in server.received] in ([True], [True, False])


async def test_request_that_passes_check_but_is_denied_by_server_raises_refused_error() -> None:
    async with recording_server(DENIED) as server, connected_transport(server.url) as transport:
        with pytest.raises(RefusedError):
            await transport.send(*make_request_arguments(server.url, lambda: None))
