"""Single requests over a real socket: unusual answers, and credentials that are never shown.

The server sends raw bytes, because no HTTP library would send most of these answers.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import shutil
import ssl
import subprocess
import time
import traceback
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from tests.unit.transport_helpers import TOKEN, connected_transport
from workpool.errors import (
    ConflictError,
    ControlPlaneError,
    PreconditionError,
    RefusedError,
    SettingsError,
    TooLargeError,
    TransientError,
)
from workpool.settings import Settings
from workpool.wire import endpoints
from workpool.wire.endpoints import ANSWER_LIMIT_BYTES
from workpool.wire.http.checked_request import INFORMATIONAL_MAX
from workpool.wire.http.environment_proxy import find_proxy_for_url
from workpool.wire.http.transport import Transport
from workpool.wire.response import (
    CODES,
    RETRY_AFTER_MAX_SECONDS,
    OversizedBody,
    Response,
    parse_error_answer,
    parse_retry_after,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from aiohttp.client_proto import ResponseHandler

OPENSSL = shutil.which("openssl")
STATS = b'{"depth": 1, "pending": 0, "oldest_queued_at": null, "workers_polling": 1}'


@dataclass
class ReceivedRequest:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class ScriptedServer:
    """A server that answers requests with `answers` in order, and then repeats the last answer."""

    answers: list[bytes | Callable[[ScriptedServer, asyncio.StreamWriter], Awaitable[None]]]
    url: str = ""
    requests: list[ReceivedRequest] = field(default_factory=list)
    connections: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.connections += 1
        try:
            while True:
                self.requests.append(await read_request(reader))
                self.arrived.set()
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if callable(answer):
                    await answer(self, writer)
                else:
                    writer.write(answer)
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def read_request(reader: asyncio.StreamReader) -> ReceivedRequest:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    start, *lines = head.strip().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    method, path, _ = start.split(" ")
    body = await reader.readexactly(int(headers.get("Content-Length", 0)))
    return ReceivedRequest(method, path, headers, body)


def make_http_answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    fields = {"Content-Length": str(len(body)), **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} Whatever\r\n{lines}\r\n".encode() + body


def make_refusal_answer(status: int, message: str = "no", **more: Any) -> bytes:
    return make_http_answer(
        status, json.dumps({"type": "error", "error": {"message": message, **more}}).encode()
    )


OK = make_http_answer(200, STATS)


@asynccontextmanager
async def running_server(
    *answers: Any, tls: ssl.SSLContext | None = None
) -> AsyncIterator[ScriptedServer]:
    server = ScriptedServer(list(answers))
    listener = await asyncio.start_server(server.serve_connection, "127.0.0.1", 0, ssl=tls)
    port = listener.sockets[0].getsockname()[1]
    server.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/api"
    try:
        yield server
    finally:
        server.release.set()
        listener.close()


async def send_request(
    transport: Transport, url: str, seconds: float = 20, endpoint: Any = endpoints.STATS
) -> Any:
    return await transport.send(endpoint, URL(f"{url}/x", encoded=True), seconds)


async def send_request_and_return_error(
    *answers: Any, seconds: float = 20, endpoint: Any = endpoints.STATS
) -> ControlPlaneError:
    async with running_server(*answers) as server, connected_transport(server.url) as transport:
        with pytest.raises(ControlPlaneError) as raised:
            await send_request(transport, server.url, seconds, endpoint)
    assert TOKEN not in "".join(traceback.format_exception(raised.value))
    assert raised.value.__context__ is None
    return raised.value


async def test_request_has_standard_headers() -> None:
    async with running_server(OK) as server, connected_transport(server.url) as transport:
        await send_request(transport, server.url)
    (request,) = server.requests
    assert (request.method, request.path, request.body) == ("GET", "/api/x", b"")
    headers = request.headers
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert headers["Worker-ID"] == "me"
    assert headers["Accept"] == "application/json"
    assert re.fullmatch(r"workpool/[0-9][0-9.]*", headers["User-Agent"])
    assert "Cookie" not in headers


async def test_request_with_body_has_json_content_type() -> None:
    async with running_server(OK) as server, connected_transport(server.url) as transport:
        endpoint: Any = endpoints.Endpoint("stop", "POST", endpoints.STATS.parse)
        await transport.send(endpoint, URL(f"{server.url}/x"), body=b'{"force":true}')
    (request,) = server.requests
    assert request.headers["Content-Type"] == "application/json"
    assert request.body == b'{"force":true}'


async def test_anthropic_request_has_headers_of_its_dialect() -> None:
    async with (
        running_server(OK) as server,
        connected_transport(server.url, dialect="anthropic") as transport,
    ):
        await send_request(transport, server.url)
    headers = server.requests[0].headers
    assert headers["anthropic-worker-id"] == "me"
    assert headers["anthropic-version"] == "2023-06-01"
    assert headers["anthropic-beta"] == "managed-agents-2026-04-01"
    assert "Worker-ID" not in headers


async def test_connection_is_reused_and_cookies_are_not_kept() -> None:
    async with (
        running_server(make_http_answer(200, STATS, Set_Cookie="a=b")) as server,
        connected_transport(server.url) as transport,
    ):
        for _ in range(3):
            await send_request(transport, server.url)
    assert server.connections == 1
    assert all("Cookie" not in request.headers for request in server.requests)


async def test_requests_of_all_pollers_and_slots_are_sent_concurrently() -> None:
    async def answer_after_forty_requests(
        server: ScriptedServer, writer: asyncio.StreamWriter
    ) -> None:
        if len(server.requests) == 40:
            server.release.set()
        await server.release.wait()
        writer.write(OK)

    async with (
        running_server(answer_after_forty_requests) as server,
        connected_transport(server.url, concurrency=30, pollers=8, prefetch=2) as transport,
    ):
        await asyncio.gather(*(send_request(transport, server.url) for _ in range(40)))
    assert server.connections == 40


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (408, "server_error"),
        (425, "server_error"),
        (429, "throttled"),
        (500, "server_error"),
        (502, "server_error"),
        (503, "server_error"),
        (504, "server_error"),
        (599, "server_error"),
    ],
)
@pytest.mark.parametrize(
    "body",
    [b"<html>Bad Gateway</html>", b"", b"\xff", b'{"error": 7}', b"[]", b"7", b'{"error": {}}'],
)
async def test_gateway_error_status_raises_transient_error(
    status: int, reason: str, body: bytes
) -> None:
    error = await send_request_and_return_error(make_http_answer(status, body))
    assert isinstance(error, TransientError)
    assert (error.op, error.status, error.reason) == ("stats", status, reason)
    assert "html" not in str(error)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"nul",
        b"\xff",
        b"[" * 100000,
        b'{"depth": 1',
        b'{"depth": NaN}',
        b'{"depth": -1}',
        b"null",
        b"[]",
        b'"x"',
        b"7",
        b'{"depth": "hunter2"}',
    ],
)
async def test_malformed_body_of_success_response_raises_transient_error(body: bytes) -> None:
    error = await send_request_and_return_error(make_http_answer(200, body))
    assert isinstance(error, TransientError)
    assert (error.status, error.reason) == (200, "bad_body")
    assert "hunter2" not in str(error)


async def test_empty_response_raises_transient_error_except_for_poll_and_stop() -> None:
    for empty in (endpoints.POLL, endpoints.STOP):
        async with (
            running_server(make_http_answer(204)) as server,
            connected_transport(server.url) as transport,
        ):
            assert await send_request(transport, server.url, endpoint=empty) is None
    strict: tuple[Any, ...] = (endpoints.ACK, endpoints.STATS)
    for endpoint in strict:
        error = await send_request_and_return_error(make_http_answer(204), endpoint=endpoint)
        assert isinstance(error, TransientError)
        assert error.reason == "bad_body"
    for endpoint in (endpoints.STOP, endpoints.ACK):
        assert isinstance(
            await send_request_and_return_error(make_http_answer(200, b"null"), endpoint=endpoint),
            TransientError,
        )


async def test_json_null_in_response_to_poll_means_no_item() -> None:
    async with (
        running_server(make_http_answer(200, b"null")) as server,
        connected_transport(server.url) as transport,
    ):
        assert await send_request(transport, server.url, endpoint=endpoints.POLL) is None


async def test_response_above_size_limit_is_aborted() -> None:
    async def send_endless_body(_: ScriptedServer, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99000000000\r\n\r\n")
        while True:
            writer.write(b" " * 65536)
            await writer.drain()

    async def send_endless_chunks(_: ScriptedServer, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
            await writer.drain()

    packed = gzip.compress(b" " * (ANSWER_LIMIT_BYTES * 8))
    bomb = make_http_answer(200, packed, Content_Encoding="gzip")
    for large in (send_endless_body, send_endless_chunks, bomb):
        error = await send_request_and_return_error(large)
        assert isinstance(error, TooLargeError)
        assert (error.reason, error.status) == ("bad_body", 200)
        assert "too large" in str(error)
        assert error.work_id is None


def make_oversized_answers(beginning: bytes) -> list[Any]:
    """Return oversized responses whose bodies start with `beginning`: fixed-length and chunked."""
    body = beginning + b"x" * ANSWER_LIMIT_BYTES
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
    return [make_http_answer(200, body), chunked % (len(body), body)]


@pytest.mark.parametrize(
    ("beginning", "work_id"),
    [
        (b'{"id":"work_1","metadata":{"id":"no","x":"', "work_1"),
        (b' {\n "type" : "work", "n": -1.5e3, "t": null,\n "id" : "work_1", "x":"', "work_1"),
        (b'{"type":"\\"id\\":","id":"work_1","x":"', None),
        (b'{"data":{"type":"session","id":"sess_1"},"id":"work_1","x":"', None),
        (b'{"id":"no id","x":"', None),
        (b'{"id":7,"x":"', None),
        (b'[{"id":"work_1","x":"', None),
        (b'{"x":"', None),
        (b'{"x":"' + b"y" * 5000 + b'","id":"work_1","z":"', None),
        (b"<html>", None),
        (b'{"a":' * 5000, None),
        (b'{"a":"b",' + b'"a":"b",' * 5000, None),
    ],
)
async def test_oversized_response_error_has_work_id_from_start_of_body(
    beginning: bytes, work_id: str | None
) -> None:
    for odd in make_oversized_answers(beginning):
        error = await send_request_and_return_error(odd, endpoint=endpoints.POLL)
        assert isinstance(error, TooLargeError)
        assert error.work_id == work_id


async def test_response_with_oversized_content_length_raises_error_before_body_arrives() -> None:
    async def send_start_of_body(server: ScriptedServer, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n" + b" " * 5000)
        await never_answer(server, writer)

    assert isinstance(await send_request_and_return_error(send_start_of_body), TooLargeError)


@pytest.mark.parametrize(
    ("item", "work_id"),
    [({"id": "work_1", "state": "odd"}, "work_1"), ({"id": "no id"}, None), ({"id": 7}, None)],
)
async def test_error_about_malformed_item_has_the_work_id_of_that_item(
    item: dict[str, Any], work_id: str | None
) -> None:
    error = await send_request_and_return_error(
        make_http_answer(200, json.dumps(item).encode()), endpoint=endpoints.POLL
    )
    assert isinstance(error, TransientError)
    assert getattr(error, "work_id", None) == work_id


async def test_response_at_size_limit_is_accepted() -> None:
    body = STATS + b" " * (ANSWER_LIMIT_BYTES - len(STATS))
    packed = make_http_answer(200, gzip.compress(body), Content_Encoding="gzip")
    for fitting in (
        make_http_answer(200, body),
        packed,
        make_http_answer(200, STATS, Connection="close"),
    ):
        async with running_server(fitting) as server, connected_transport(server.url) as transport:
            assert (await send_request(transport, server.url)).depth == 1


async def close_connection(*_: object) -> None:
    raise ConnectionError


async def send_half_answer(_: ScriptedServer, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    raise ConnectionError


async def reset_connection(_: ScriptedServer, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    raise ConnectionError


async def never_answer(server: ScriptedServer, *_: object) -> None:
    await server.release.wait()
    raise ConnectionError


async def send_incomplete_body_and_hang(
    server: ScriptedServer, writer: asyncio.StreamWriter
) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
    await never_answer(server, writer)


@pytest.mark.parametrize(
    "odd",
    [
        close_connection,
        send_half_answer,
        reset_connection,
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"hunter2" * 20_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: hunter2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhunter2\r\n",
        make_http_answer(200, b"hunter2", Content_Encoding="gzip"),
    ],
)
async def test_broken_connection_raises_transient_network_error(odd: Any) -> None:
    error = await send_request_and_return_error(odd)
    assert isinstance(error, TransientError)
    assert error.reason == "network"
    assert "hunter2" not in str(error)


@pytest.mark.parametrize("odd", [never_answer, send_incomplete_body_and_hang])
async def test_missing_or_incomplete_response_raises_timeout_at_time_limit(odd: Any) -> None:
    error = await send_request_and_return_error(odd, seconds=0.05)
    assert isinstance(error, TransientError)
    assert (error.reason, error.status) == ("timeout", None)


@pytest.mark.parametrize("cancelled_first", [False, True])
async def test_request_cancelled_in_same_loop_iteration_as_timeout_raises_cancelled_error(
    *, cancelled_first: bool
) -> None:
    """If the cancellation were lost, as with aiohttp's own timeout, a poller would never end."""
    seconds, loop = 0.5, asyncio.get_running_loop()
    async with running_server(never_answer) as server, connected_transport(server.url) as transport:
        async with asyncio.TaskGroup() as group:
            url = URL(server.url)
            task = group.create_task(transport.send(endpoints.STATS, url, seconds))
            await server.arrived.wait()
            loop.call_later(seconds * (0.5 if cancelled_first else 1.5), task.cancel)
            time.sleep(seconds * 2)  # noqa: ASYNC251 - both are due in one turn of the loop
        assert task.cancelled()
        server.release.set()


async def test_request_with_no_remaining_time_raises_timeout_error() -> None:
    for seconds in (0, -1.0):
        error = await send_request_and_return_error(OK, seconds=seconds)
        assert isinstance(error, TransientError)
        assert error.reason == "timeout"


async def test_refused_connection_raises_transient_network_error() -> None:
    async with running_server(OK) as server:
        url = server.url
    async with connected_transport(url) as transport:
        with pytest.raises(TransientError, match="Cannot connect") as raised:
            await send_request(transport, url)
    assert raised.value.reason == "network"


async def test_unknown_host_raises_transient_network_error() -> None:
    async with connected_transport("http://no-such-host.invalid") as transport:
        with pytest.raises(TransientError) as raised:
            await send_request(transport, "http://no-such-host.invalid")
    assert raised.value.reason == "network"


@pytest.fixture(scope="module")
def self_signed_context(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """Return the TLS context of a server with a self-signed certificate."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = f"{OPENSSL} req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1"
    subprocess.run(  # noqa: S603 - a command of our own
        [*command.split(), "-keyout", str(path), "-out", f"{path}.crt"],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{path}.crt", path)
    return context


@pytest.mark.skipif(OPENSSL is None, reason="the openssl command is not installed")
async def test_untrusted_certificate_raises_refused_error(
    self_signed_context: ssl.SSLContext,
) -> None:
    async with (
        running_server(OK, tls=self_signed_context) as server,
        connected_transport(server.url) as transport,
    ):
        with pytest.raises(RefusedError, match="certificate is not trusted") as raised:
            await send_request(transport, server.url)
    assert raised.value.status is None
    assert server.requests == []


async def test_https_request_to_server_without_tls_raises_transient_error() -> None:
    async with running_server(OK) as server:
        url = server.url.replace("http", "https")
        async with connected_transport(url) as transport:
            with pytest.raises(TransientError) as raised:
                await send_request(transport, url, 2)
    assert raised.value.reason in {"network", "timeout"}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, RefusedError),
        (401, RefusedError),
        (402, RefusedError),
        (403, RefusedError),
        (404, RefusedError),
        (405, RefusedError),
        (409, ConflictError),
        (412, PreconditionError),
        (418, RefusedError),
        (451, RefusedError),
    ],
)
async def test_error_response_is_raised_with_fields_of_its_body(
    status: int, kind: type[ControlPlaneError]
) -> None:
    error = await send_request_and_return_error(
        make_refusal_answer(status, "not\nthis\x1b[31m", type="some_error", param="block_ms")
    )
    assert type(error) is kind
    assert (error.op, error.status) == ("stats", status)
    assert (error.error_type, error.param) == ("some_error", "block_ms")
    assert str(error) == f"stats: {status} not this [31m"


EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
LARGE = b"HTTP/1.1 103 Early Hints\r\nLink: " + b"x" * 7_000 + b"\r\n\r\n"


@pytest.mark.parametrize(
    "before", [EARLY, EARLY * INFORMATIONAL_MAX, LARGE * 9, b"HTTP/1.1 100 C\r\n\r\n"]
)
async def test_informational_responses_before_response_are_skipped(before: bytes) -> None:
    async with running_server(before + OK) as server, connected_transport(server.url) as transport:
        for _ in range(3):
            assert (await send_request(transport, server.url)).depth == 1
    assert server.connections == 1


@pytest.mark.parametrize("before", [EARLY * (INFORMATIONAL_MAX + 1), LARGE * 10])
async def test_too_many_informational_responses_raise_network_error(before: bytes) -> None:
    error = await send_request_and_return_error(before + OK)
    assert isinstance(error, TransientError)
    assert error.reason == "network"
    assert "InformationalFlood" in str(error)


@pytest.mark.parametrize(
    "odd",
    [
        *map(make_http_answer, (300, 304, 305, 306, 310, 399, 430, 444, 460, 499, 600, 799, 999)),
        b"HTTP/1.1 000 None\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nx",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    ],
)
async def test_unexpected_status_raises_transient_server_error(odd: bytes) -> None:
    error = await send_request_and_return_error(odd)
    assert isinstance(error, TransientError)
    assert error.reason == "server_error"
    assert error.status == int(odd.split()[1])


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
async def test_redirect_is_not_followed_and_raises_transient_error(status: int) -> None:
    async with running_server(OK) as other:
        error = await send_request_and_return_error(
            make_http_answer(status, b"", Location=f"{other.url}/{TOKEN}")
        )
        assert other.requests == []
    assert isinstance(error, TransientError)
    assert error.reason == "server_error"
    assert "base_url" in str(error)


@pytest.mark.parametrize(
    ("location", "named"),
    [
        ("https://login.example/hunter2?next=hunter2#hunter2", "https://login.example"),
        ("http://user:hunter2@portal.example:8080/", "http://portal.example:8080"),
        ("https://[::1]:9/hunter2", "https://[::1]:9"),
        (f"https://{TOKEN}.example/", "https://[token].example"),
        (f"https://{TOKEN.upper()}.example/", "https://[token].example"),
        ("/hunter2", None),
        ("//portal.example/hunter2", None),
        ("javascript:hunter2", None),
        ("https://[hunter2", None),
        ("https://a:hunter2/", None),
        ("\x7f\xc2\x9b hunter2", None),
        ("", None),
    ],
)
def test_error_about_redirect_names_no_more_than_scheme_and_host(
    location: str, named: str | None
) -> None:
    error = parse_error_answer("poll", Response(302, {"Location": location}, b"hunter2"), TOKEN)
    text = str(error)
    to = f" to {named}" if named else ""
    assert text.startswith(f"poll: 302 redirected{to}:")
    assert "hunter2" not in text


def test_redirect_error_with_long_host_is_cut() -> None:
    error = parse_error_answer(
        "poll", Response(302, {"Location": f"https://{'a.' * 5000}/"}, b""), TOKEN
    )
    assert len(str(error)) < 300


async def test_token_in_error_response_is_redacted() -> None:
    reported = f"{'x' * 290} Bearer {TOKEN} or {TOKEN[:9]}\n{TOKEN[9:]}"
    error = await send_request_and_return_error(
        make_refusal_answer(403, reported, type=TOKEN, param=f"a{TOKEN}b")
    )
    assert (error.error_type, error.param) == ("[token]", "a[token]b")
    assert TOKEN not in str(error)
    assert TOKEN[:5] not in str(error)


EXTRA = {"x-worker-token": "worker-token-1", "X-Team": "worker-token"}


async def test_extra_headers_are_sent_with_every_request() -> None:
    async with (
        running_server(OK) as server,
        connected_transport(server.url, extra_headers=EXTRA) as transport,
        aiohttp.ClientSession() as own,
        connected_transport(server.url, own, extra_headers=EXTRA) as other,
    ):
        await send_request(transport, server.url)
        await send_request(transport.copy_with_token("token-of-a-session"), server.url)
        await send_request(other, server.url)
    assert len(server.requests) == 3
    for request in server.requests:
        assert {name: request.headers[name] for name in EXTRA} == EXTRA


async def test_values_of_extra_headers_in_error_response_are_redacted() -> None:
    reported = make_refusal_answer(403, "no worker-token-1 of worker-token")
    async with (
        running_server(reported) as server,
        connected_transport(server.url, extra_headers=EXTRA) as transport,
    ):
        with pytest.raises(RefusedError) as raised:
            await send_request(transport, server.url)
    assert str(raised.value).endswith("no [token] of [token]")
    assert "worker-token" not in "".join(traceback.format_exception(raised.value))


async def test_long_error_message_is_cut() -> None:
    error = await send_request_and_return_error(
        make_refusal_answer(400, "x" * 100_000, type="y" * 1000)
    )
    assert len(str(error)) < 400
    assert len(error.error_type or "") <= 64


@given(st.integers(100, 999), st.binary(max_size=60), st.text(max_size=40))
def test_arbitrary_error_response_becomes_printable_error(
    status: int, body: bytes, text: str
) -> None:
    envelope = json.dumps({"error": {"message": text, "type": text, "param": text}}).encode()
    for content in (body, envelope, OversizedBody(body)):
        error = parse_error_answer("get", Response(status, {"Retry-After": text}, content), TOKEN)
        assert isinstance(error, ControlPlaneError)
        assert str(error).isprintable() or not text.isprintable()
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("7", 7),
        (" 1.5 ", 1.5),
        ("301", RETRY_AFTER_MAX_SECONDS),
        ("999999999999", RETRY_AFTER_MAX_SECONDS),
        ("-1", None),
        ("", None),
        ("soon", None),
        ("inf", None),
        ("nan", None),
        ("1e3", None),
        ("1_0", None),
        ("٣", None),
        ("9" * 400, None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", None),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
    ],
)
def test_retry_after_header_is_parsed_into_seconds(value: str, seconds: float | None) -> None:
    assert parse_retry_after({"Retry-After": value}) == seconds


def test_date_in_retry_after_header_is_compared_with_server_date_header() -> None:
    then = datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC)
    headers = {
        "Date": format_datetime(then, usegmt=True),
        "Retry-After": format_datetime(then + timedelta(seconds=20), usegmt=True),
    }
    assert parse_retry_after(headers) == 20


def test_retry_after_date_without_server_date_is_measured_on_local_clock() -> None:
    until = datetime.now(UTC) + timedelta(seconds=100)
    seconds = parse_retry_after({"Retry-After": format_datetime(until, usegmt=True)})
    assert seconds is not None
    assert 0 < seconds <= 100


async def test_retry_after_is_passed_to_caller() -> None:
    error = await send_request_and_return_error(make_http_answer(503, b"busy", Retry_After="7"))
    assert isinstance(error, TransientError)
    assert error.retry_after == 7


@given(st.text())
def test_arbitrary_retry_after_gives_valid_seconds_or_none(value: str) -> None:
    seconds = parse_retry_after({"Retry-After": value, "Date": value})
    assert seconds is None or 0 <= seconds <= RETRY_AFTER_MAX_SECONDS


async def test_get_request_but_not_post_request_is_repeated_after_connection_closes() -> None:
    # aiohttp repeats a GET on a new connection, which is right: a read changes nothing.
    async with (
        running_server(OK, close_connection, OK) as server,
        connected_transport(server.url) as transport,
    ):
        await send_request(transport, server.url)
        await send_request(transport, server.url)
    assert len(server.requests) == 3
    post: Any = endpoints.Endpoint("stop", "POST", endpoints.STATS.parse)
    async with (
        running_server(OK, close_connection, OK) as server,
        connected_transport(server.url) as transport,
    ):
        await send_request(transport, server.url, endpoint=post)
        with pytest.raises(TransientError):
            await send_request(transport, server.url, endpoint=post)
    assert len(server.requests) == 2


async def test_answer_that_no_request_asked_for_is_not_taken_for_answer_to_next_request() -> None:
    async def send_two_answers(server: ScriptedServer, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await server.release.wait()
        writer.write(make_refusal_answer(401))

    post: Any = endpoints.Endpoint("stop", "POST", endpoints.STATS.parse)
    async with (
        running_server(send_two_answers, OK) as server,
        connected_transport(server.url) as transport,
    ):
        await send_request(transport, server.url, endpoint=post)
        [idle] = list_idle_connections(transport)
        server.release.set()
        async with asyncio.timeout(20):
            while not idle.should_close:  # noqa: ASYNC110 - aiohttp has no event for it
                await asyncio.sleep(0.001)
        with pytest.raises(TransientError) as raised:
            await send_request(transport, server.url, endpoint=post)
        assert (raised.value.reason, len(server.requests)) == ("network", 1)
        assert (await send_request(transport, server.url, endpoint=post)).depth == 1


def list_idle_connections(transport: Transport) -> list[ResponseHandler]:
    connectors: Any = {each.connector for each in transport._connections.sessions}
    return [idle for each in connectors for kept in each._conns.values() for idle, *_ in kept]


@pytest.mark.parametrize("status", [401, 403])
async def test_refused_request_is_repeated_with_rotated_token_from_token_file(
    tmp_path: Path, status: int
) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    refreshes: list[str] = []
    async with (
        running_server(make_refusal_answer(status), OK) as server,
        connected_transport(server.url, token_file=path) as transport,
    ):
        transport.on_credential_refresh = refreshes.append
        path.write_text("new\n")
        assert (await send_request(transport, server.url)).depth == 1
    assert [each.headers["Authorization"] for each in server.requests] == [
        "Bearer old",
        "Bearer new",
    ]
    assert refreshes == ["ok"]


async def test_token_from_environment_variable_is_read_again_after_refusal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QODER_PAT", "old")
    async with (
        running_server(make_refusal_answer(401), OK) as server,
        connected_transport(server.url, token=None) as transport,
    ):
        monkeypatch.setenv("QODER_PAT", "new")
        await send_request(transport, server.url)
    assert server.requests[1].headers["Authorization"] == "Bearer new"


async def test_request_body_is_sent_again_with_rotated_token(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    post: Any = endpoints.Endpoint("stop", "POST", endpoints.STATS.parse)
    async with (
        running_server(make_refusal_answer(401), OK) as server,
        connected_transport(server.url, token_file=path) as transport,
    ):
        path.write_text("new")
        await transport.send(post, URL(f"{server.url}/x"), body=b"{}")
    assert [each.body for each in server.requests] == [b"{}", b"{}"]


async def test_refused_request_with_unchanged_token_is_not_repeated() -> None:
    refreshes: list[str] = []
    async with (
        running_server(make_refusal_answer(401)) as server,
        connected_transport(server.url) as transport,
    ):
        transport.on_credential_refresh = refreshes.append
        with pytest.raises(RefusedError):
            await send_request(transport, server.url)
    assert len(server.requests) == 1
    assert refreshes == ["ok"]


async def test_token_is_renewed_at_most_once_per_request(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("a")

    async def rotate_token(_: ScriptedServer, writer: asyncio.StreamWriter) -> None:
        path.write_text(path.read_text() + "a")
        writer.write(make_refusal_answer(401))

    async with (
        running_server(rotate_token) as server,
        connected_transport(server.url, token_file=path) as transport,
    ):
        with pytest.raises(RefusedError):
            await send_request(transport, server.url)
    assert len(server.requests) == 2


async def test_refused_request_with_unreadable_token_file_raises_the_original_refusal(
    tmp_path: Path,
) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    refreshes: list[str] = []
    async with (
        running_server(make_refusal_answer(401, "expired")) as server,
        connected_transport(server.url, token_file=path) as transport,
    ):
        transport.on_credential_refresh = refreshes.append
        path.unlink()
        with pytest.raises(RefusedError, match="expired") as raised:
            await send_request(transport, server.url)
    assert raised.value.status == 401
    assert refreshes == ["error"]


async def test_concurrent_requests_with_old_token_succeed_after_token_rotation(
    tmp_path: Path,
) -> None:
    path = tmp_path / "token"
    path.write_text("old")

    async def answer_401_to_old_token(server: ScriptedServer, writer: asyncio.StreamWriter) -> None:
        old = server.requests[-1].headers["Authorization"] == "Bearer old"
        writer.write(make_refusal_answer(401) if old else OK)

    async with (
        running_server(answer_401_to_old_token) as server,
        connected_transport(server.url, token_file=path) as transport,
    ):
        path.write_text("new")
        found = await asyncio.gather(*(send_request(transport, server.url) for _ in range(8)))
    assert [each.depth for each in found] == [1] * 8


async def test_request_refused_after_token_renewal_is_repeated_with_renewed_token(
    tmp_path: Path,
) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    refreshes: list[str] = []
    both_arrived = asyncio.Event()

    async def answer_401_to_old_token(server: ScriptedServer, writer: asyncio.StreamWriter) -> None:
        if server.requests[-1].headers["Authorization"] == "Bearer new":
            writer.write(OK)
            return
        if len(server.requests) == 1:
            await both_arrived.wait()
        else:
            both_arrived.set()
            # Send the second 401 after the first request has renewed the token.
            await server.release.wait()
        writer.write(make_refusal_answer(401))

    async with (
        running_server(answer_401_to_old_token) as server,
        connected_transport(server.url, token_file=path) as transport,
    ):
        transport.on_credential_refresh = refreshes.append
        path.write_text("new")
        async with asyncio.TaskGroup() as group:
            first = group.create_task(send_request(transport, server.url))
            await server.arrived.wait()
            group.create_task(send_request(transport, server.url))
            await first
            server.release.set()
    assert refreshes == ["ok"]
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (200, "2xx"),
        (204, "2xx"),
        (304, "304"),
        (302, "error"),
        (400, "400"),
        (401, "401"),
        (403, "403"),
        (404, "404"),
        (405, "4xx"),
        (409, "409"),
        (412, "412"),
        (429, "429"),
        (500, "5xx"),
        (503, "5xx"),
        (999, "error"),
    ],
)
def test_metric_label_of_response_depends_on_http_status(status: int, code: str) -> None:
    assert CODES.get(status, "error") == code


async def test_on_request_callback_receives_operation_and_status_of_every_request() -> None:
    reported: list[tuple[str, str]] = []
    async with (
        running_server(
            OK, make_refusal_answer(404), make_http_answer(200, b"junk"), close_connection
        ) as server,
        connected_transport(server.url) as transport,
    ):
        transport.on_request = lambda *each: reported.append(each[:2])
        await send_request(transport, server.url)
        for _ in range(3):
            with pytest.raises(ControlPlaneError):
                await send_request(transport, server.url)
    assert reported == [("stats", "2xx"), ("stats", "404"), ("stats", "2xx"), ("stats", "reset")]


@pytest.mark.parametrize("odd", [never_answer, send_incomplete_body_and_hang])
async def test_cancelled_request_closes_its_connection(odd: Any) -> None:
    reported: list[str] = []
    async with running_server(odd, OK) as server, connected_transport(server.url) as transport:
        transport.on_request = lambda *each: reported.append(each[1])
        async with asyncio.TaskGroup() as group:
            task = group.create_task(send_request(transport, server.url))
            await server.arrived.wait()
            task.cancel("by the test")
        assert task.cancelled()
        assert reported == ["error"]
        server.release.set()
        assert (await send_request(transport, server.url)).depth == 1
    assert server.connections == 2


async def test_transport_raises_unexpected_exception_of_parser_unchanged() -> None:
    class UnexpectedParserError(Exception):
        pass

    def failing_parser(_: object) -> None:
        raise UnexpectedParserError

    reported: list[str] = []
    async with running_server(OK) as server, connected_transport(server.url) as transport:
        transport.on_request = lambda *each: reported.append(each[1])
        with pytest.raises(UnexpectedParserError):
            await send_request(
                transport, server.url, endpoint=endpoints.Endpoint("stats", "GET", failing_parser)
            )
        with pytest.raises(aiohttp.InvalidURL):
            await transport.send(endpoints.STATS, URL("http:///x"))
    assert reported == ["2xx", "error"]


async def test_callers_aiohttp_session_is_used_and_left_open() -> None:
    async with (
        aiohttp.ClientSession(
            headers={"X-Theirs": "1"},
            raise_for_status=True,
            timeout=aiohttp.ClientTimeout(total=0.001),
        ) as session,
        running_server(OK, make_refusal_answer(404, "gone")) as server,
    ):
        async with connected_transport(server.url, session) as transport:
            await send_request(transport, server.url)
            with pytest.raises(RefusedError, match="gone"):
                await send_request(transport, server.url)
        assert not session.closed
    assert server.requests[0].headers["X-Theirs"] == "1"
    assert server.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"


async def test_transport_used_while_closed_raises_runtime_error() -> None:
    settings = Settings(token=TOKEN, environment_id="env_1")
    transport = Transport(settings, None)
    with pytest.raises(RuntimeError, match="not open"):
        await send_request(transport, "http://localhost")
    await transport.open(None)
    with pytest.raises(RuntimeError, match="open already"):
        await transport.open(None)
    await transport.close()
    with pytest.raises(RuntimeError, match="not open"):
        await send_request(transport, "http://localhost")


async def test_transport_used_on_another_loop_raises_runtime_error() -> None:
    async with running_server(OK) as server, connected_transport(server.url) as transport:
        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, send_request(transport, server.url))


async def test_request_without_worker_id_has_no_worker_id_header() -> None:
    async with running_server(OK) as server:
        settings = Settings(base_url=server.url, token=TOKEN, environment_id="env_1")
        transport = Transport(settings, None)
        await transport.open(None)
        await send_request(transport, server.url)
        await transport.close()
    assert "Worker-ID" not in server.requests[0].headers


async def test_request_has_credentials_from_proxy_variable_and_token_in_separate_headers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_server(OK) as proxy:
        host = proxy.url.removeprefix("http://").removesuffix("/api")
        monkeypatch.setenv("http_proxy", f"http://user:pass@{host}")
        monkeypatch.setenv("no_proxy", "")
        async with connected_transport("http://pool.invalid/api") as transport:
            for _ in range(2):
                assert (await send_request(transport, "http://pool.invalid/api")).depth == 1
    assert [each.path for each in proxy.requests] == ["http://pool.invalid/api/x"] * 2
    assert proxy.requests[0].headers["Proxy-Authorization"] == "Basic dXNlcjpwYXNz"
    assert proxy.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"


async def test_proxy_tunnel_request_does_not_contain_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_server(make_http_answer(407)) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url.removesuffix("/api"))
        monkeypatch.setenv("no_proxy", "")
        async with connected_transport("https://pool.invalid/api") as transport:
            with pytest.raises(TransientError) as raised:
                await send_request(transport, "https://pool.invalid/api")
    assert raised.value.reason == "network"
    assert [each.method for each in proxy.requests] == ["CONNECT"]
    assert "Authorization" not in proxy.requests[0].headers


def test_proxy_depends_on_url_scheme_and_environment_variable_no_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", "proxy.example:3128")
    monkeypatch.setenv("no_proxy", ".internal")
    assert find_proxy_for_url(URL("https://h.example")) == URL("http://proxy.example:3128")
    assert find_proxy_for_url(URL("https://h.internal")) is None
    assert find_proxy_for_url(URL("http://h.example")) is None


@pytest.mark.parametrize("value", ["socks5://u:hunter2@h:1", "http://u:hunter2@h:x", "http://"])
def test_invalid_proxy_url_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("https_proxy", value)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(SettingsError) as raised:
        find_proxy_for_url(URL("https://h.example"))
    assert raised.value.problems == ("HTTPS_PROXY: not the URL of an HTTP proxy",)


async def test_netrc_file_does_not_replace_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    async with running_server(OK) as server, connected_transport(server.url) as transport:
        await send_request(transport, server.url)
    assert server.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"


KEY = "-".join(("key", "hunter3", "hunter3"))


@pytest.mark.parametrize(
    ("dialect", "header", "value"),
    [("qoder", "Authorization", f"Bearer {KEY}"), ("anthropic", "X-Api-Key", KEY)],
)
async def test_api_key_is_sent_in_place_of_token(dialect: str, header: str, value: str) -> None:
    async with (
        running_server(OK) as server,
        connected_transport(server.url, dialect=dialect, api_key=KEY) as transport,
    ):
        await send_request(transport.copy_with_api_key(), server.url)
        await send_request(transport, server.url)
    with_key, with_token = server.requests
    assert with_key.headers[header] == value
    assert TOKEN not in str(with_key.headers)
    assert KEY not in str(with_token.headers)


async def test_transport_without_api_key_uses_token() -> None:
    async with running_server(OK) as server, connected_transport(server.url) as transport:
        assert transport.copy_with_api_key() is transport


async def test_api_key_is_read_again_after_refusal(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("old-key")

    async def replace_credential(_: ScriptedServer, writer: asyncio.StreamWriter) -> None:
        path.write_text(KEY)
        writer.write(make_refusal_answer(403))

    async with (
        running_server(replace_credential, OK) as server,
        connected_transport(server.url, api_key_file=path) as transport,
    ):
        await send_request(transport.copy_with_api_key(), server.url)
        await send_request(transport, server.url)
    sent = [request.headers["Authorization"] for request in server.requests]
    assert sent == ["Bearer old-key", f"Bearer {KEY}", f"Bearer {TOKEN}"]
