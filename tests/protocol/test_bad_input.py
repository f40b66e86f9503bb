"""Bad input of any kind is answered 4xx, never 500, and the server stays responsive."""

from __future__ import annotations

import asyncio
import re
import zlib
from io import BytesIO
from typing import TYPE_CHECKING

import aiohttp
import orjson
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.protocol.conftest import ENV, TOKEN, ApiClient, wait_until
from tests.protocol.test_events import events_path as path_of
from workpool.server import ControlPlane, SqliteStore
from workpool.server.parsing import request_values

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

BODY_LIMIT_BYTES = 4 * 1024 * 1024


async def send_raw_bytes(plane: ControlPlane, *parts: bytes, eof: bool = False) -> bytes:
    """Send bytes; return the bytes received until the answer or the connection has ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", plane.port)
    answer = b""
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        if eof:
            writer.write_eof()
        async with asyncio.timeout(20):
            while not is_complete_response(answer):
                chunk = await reader.read(65536)
                if not chunk:
                    break
                answer += chunk
    except ConnectionError:
        pass
    finally:
        writer.close()
    return answer


def is_complete_response(answer: bytes) -> bool:
    head, separator, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return bool(separator) and length is not None and len(body) >= int(length[1])


def parse_http_status(answer: bytes) -> int | None:
    match = re.match(rb"HTTP/1\.[01] (\d{3}) ", answer)
    return int(match[1]) if match else None


def make_request_head(method: str, path: str, *headers: str) -> bytes:
    lines = [
        f"{method} /api/v1/cloud/environments/{ENV}/work{path} HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {TOKEN}",
        *headers,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def assert_server_still_answers(plane: ControlPlane) -> None:
    assert parse_http_status(await send_raw_bytes(plane, make_request_head("GET", "/stats"))) == 200


def make_body_of_size(size: int) -> bytes:
    return b'{"metadata":{}}'.ljust(size)


async def test_body_at_size_limit_is_accepted_and_one_byte_more_is_400(api: ApiClient) -> None:
    (item,) = api.plane.enqueue()
    answer = await api.update(item.id, data=BytesIO(make_body_of_size(BODY_LIMIT_BYTES)))
    assert answer.status == 200
    answer = await api.update(item.id, data=BytesIO(make_body_of_size(BODY_LIMIT_BYTES + 1)))
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


BODIES_WITH_VALUES: dict[str, Callable[[int], list[object]]] = {
    "a long list": lambda count: [{"type": "x", "a": [0] * (count - 8)}],
    "many blocks": lambda count: [{"type": ""}] * (count // 2 - 2),
    "a deep list": lambda count: [{"type": "x", "a": [[[]]] * (count // 2 - 4)}],
}


@pytest.mark.parametrize("name", BODIES_WITH_VALUES)
async def test_body_with_too_many_values_is_400(
    api: ApiClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_values, "VALUES_MAX", 1000)
    (item,) = api.plane.enqueue()
    url = path_of(api, item.session_id, "/events")

    def make_body_with_values(count: int) -> bytes:
        return orjson.dumps(
            {"events": [{"type": "user.message", "content": BODIES_WITH_VALUES[name](count)}]}
        )

    assert (await api("POST", url, data=make_body_with_values(1000))).status == 200
    answer = await api("POST", url, data=make_body_with_values(1020))
    assert answer.status == 400
    assert "1000 JSON values" in answer.error["message"]
    script = {"script": [{"name": "Bash", "input": {"a": BODIES_WITH_VALUES[name](1020)}}]}
    assert (await api("POST", api.work_url(), data=orjson.dumps(script))).status == 400


async def test_long_string_in_body_counts_as_one_value(api: ApiClient) -> None:
    text = "{}," * 1_000_000
    answer = await api(
        "POST", api.work_url(), data=BytesIO(orjson.dumps({"metadata": {"k": text}}))
    )
    assert answer.status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/poll"),
        ("GET", "/stats"),
        ("GET", ""),
        ("POST", ""),
        ("GET", "/{id}"),
        ("POST", "/{id}"),
        ("POST", "/{id}/ack"),
        ("POST", "/{id}/heartbeat"),
        ("POST", "/{id}/stop"),
    ],
)
async def test_body_above_size_limit_is_400_for_every_work_call(
    qoder_api: ApiClient, method: str, path: str
) -> None:
    (item,) = qoder_api.plane.enqueue()
    url = qoder_api.work_url(path.format(id=item.id))
    answer = await qoder_api(method, url, data=BytesIO(b" " * (BODY_LIMIT_BYTES + 1)))
    assert answer.status == 400
    assert await qoder_api.item_state(item.id) == "queued"


async def test_compressed_body_above_size_limit_is_400(qoder_api: ApiClient) -> None:
    bomb = zlib.compress(b" " * (16 * BODY_LIMIT_BYTES))
    answer = await qoder_api(
        "POST", qoder_api.work_url(), data=bomb, headers={"Content-Encoding": "deflate"}
    )
    assert answer.status == 400


async def test_endless_chunked_body_is_400(control_plane: ControlPlane) -> None:
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    answer = await send_raw_bytes(
        control_plane, make_request_head("POST", "", "Transfer-Encoding: chunked"), *([chunk] * 80)
    )
    assert parse_http_status(answer) == 400


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_request_that_takes_no_body_ignores_a_small_body(
    control_plane: ControlPlane, method: str
) -> None:
    control_plane.enqueue()
    path = {"GET": "/poll", "POST": ""}[method]
    request = make_request_head(method, path, "Content-Length: 2")
    assert parse_http_status(await send_raw_bytes(control_plane, request + b"{}")) == 200


MALFORMED_REQUESTS = {
    "a space after the name": make_request_head("GET", "/poll").replace(b": Bearer", b" : Bearer"),
    "a NUL before the token": make_request_head("GET", "/poll").replace(b"Bearer ", b"Bearer\x00"),
    "not HTTP": b"\x00\x01\x02\x03\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
    "two lengths": make_request_head("POST", "", "Content-Length: 2", "Content-Length: 3") + b"{}",
    "a length that is none": make_request_head("POST", "", "Content-Length: -1"),
    "length and chunks": make_request_head(
        "POST", "", "Content-Length: 2", "Transfer-Encoding: chunked"
    ),
    "a bad chunk": make_request_head("POST", "", "Transfer-Encoding: chunked")
    + b"zz\r\n{}\r\n0\r\n\r\n",
    "an endless chunk size": make_request_head("POST", "", "Transfer-Encoding: chunked")
    + b"f" * 100
    + b"\r\n",
    "an unknown coding": make_request_head("POST", "", "Transfer-Encoding: gzip, nonsense") + b"{}",
    "no compression": make_request_head("POST", "", "Content-Encoding: gzip", "Content-Length: 2")
    + b"{}",
    "a huge header": make_request_head("GET", "/poll", "X: " + "x" * 100_000),
    "many headers": make_request_head("GET", "/poll", *[f"X-{n}: 1" for n in range(40_000)]),
    "a NUL in a header": make_request_head("GET", "/poll", "Worker-ID: a\x00b"),
    "a folded header": make_request_head("GET", "/poll", "X: a\r\n b"),
    "a NUL in the path": make_request_head("GET", "/poll\x00"),
    "raw bytes in the path": make_request_head("GET", "/w\xff\xfe"),
    "raw bytes in the query": make_request_head("GET", "/poll?block_ms=\xff"),
    "a bad escape": make_request_head("GET", "/poll?block_ms=%zz"),
    "bad UTF-8 in the query": make_request_head("GET", "/poll?block_ms=%ff%fe"),
    "bad UTF-8 in a header": make_request_head("GET", "/poll", "Worker-ID: \xff\xfe"),
    "a long path": make_request_head("GET", "/" + "x" * 100_000),
    "an odd expectation": make_request_head(
        "POST", "", "Expect: the-unexpected", "Content-Length: 2"
    )
    + b"{}",
    "an unknown method": make_request_head("BREW", "/poll"),
    "a tunnel": make_request_head("CONNECT", "/poll"),
    "HTTP/3.0": make_request_head("GET", "/poll").replace(b"HTTP/1.1", b"HTTP/3.0"),
    "an upgrade": make_request_head(
        "POST", "", "Connection: Upgrade", "Upgrade: h2c", "Content-Length: 1"
    )
    + b"{",
}


@pytest.mark.parametrize("name", MALFORMED_REQUESTS)
async def test_malformed_http_request_is_4xx(control_plane: ControlPlane, name: str) -> None:
    answer = await send_raw_bytes(control_plane, MALFORMED_REQUESTS[name])
    assert parse_http_status(answer) in range(400, 500), answer
    await assert_server_still_answers(control_plane)


MALFORMED_BODIES = {
    "a bad chunk": ("Transfer-Encoding: chunked", b"2\r\n{}XX\r\n"),
    "compressed garbage": ("Content-Encoding: gzip\r\nContent-Length: 40", b"\x1f\x8b" + b"x" * 38),
}


@pytest.mark.parametrize("name", MALFORMED_BODIES)
async def test_malformed_body_after_valid_headers_is_4xx(
    control_plane: ControlPlane, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # aiohttp does not report a malformed body to the handler. The handler waits for the rest of the
    # body until this time limit ends the request.
    monkeypatch.setattr(request_values, "BODY_SECONDS", 0.5)
    headers, body = MALFORMED_BODIES[name]
    reader, writer = await asyncio.open_connection("127.0.0.1", control_plane.port)
    writer.write(make_request_head("POST", "", headers, "Expect: 100-continue"))
    assert (await reader.readline()).startswith(b"HTTP/1.1 100")
    await reader.readline()
    writer.write(body)
    async with asyncio.timeout(20):
        assert parse_http_status(await reader.readline()) in range(400, 500)
    writer.close()
    await assert_server_still_answers(control_plane)


async def test_request_whose_body_does_not_arrive_is_answered_with_408(
    control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_values, "BODY_SECONDS", 0.05)
    answer = await send_raw_bytes(
        control_plane, make_request_head("POST", "", "Content-Length: 10"), b"{"
    )
    assert parse_http_status(answer) == 408
    assert orjson.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "error"


async def test_server_reads_only_a_few_large_bodies_at_the_same_time(
    control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each large body needs memory, so the server limits how many of them it reads at a time.

    The requests above this limit wait.
    """
    now, most = 0, 0
    read = web.Request.read

    async def read_body_and_count_concurrent_reads(request: web.Request) -> bytes:
        nonlocal now, most
        now += 1
        most = max(most, now)
        try:
            return await read(request)
        finally:
            now -= 1

    monkeypatch.setattr(web.Request, "read", read_body_and_count_concurrent_reads)
    size = 2 * request_values.LARGE_BODY_BYTES
    connections = [
        await asyncio.open_connection("127.0.0.1", control_plane.port)
        for _ in range(3 * request_values.LARGE_BODIES_MAX)
    ]
    for _, writer in connections:
        writer.write(
            make_request_head("POST", "", f"Content-Length: {size}") + b"{}".ljust(size - 1)
        )
    await wait_until(lambda: now == request_values.LARGE_BODIES_MAX)
    for _, writer in connections:
        writer.write(b" ")
    async with asyncio.timeout(20):
        for reader, writer in connections:
            assert parse_http_status(await reader.readline()) == 200
            writer.close()
    assert most == request_values.LARGE_BODIES_MAX


async def test_small_body_does_not_wait_for_large_bodies(control_plane: ControlPlane) -> None:
    writers = []
    for _ in range(request_values.LARGE_BODIES_MAX):
        writers.append((await asyncio.open_connection("127.0.0.1", control_plane.port))[1])
        writers[-1].write(make_request_head("POST", "", f"Content-Length: {BODY_LIMIT_BYTES}"))
        await writers[-1].drain()
    assert (
        parse_http_status(
            await send_raw_bytes(
                control_plane, make_request_head("POST", "", "Content-Length: 2"), b"{}"
            )
        )
        == 200
    )
    for writer in writers:
        writer.close()


async def test_client_that_disconnects_during_body_creates_nothing(
    control_plane: ControlPlane,
) -> None:
    await send_raw_bytes(
        control_plane, make_request_head("POST", "", "Content-Length: 10"), b"{", eof=True
    )
    await assert_server_still_answers(control_plane)
    assert len(control_plane.operations.get_queue(ENV)) == 0


async def test_token_of_malformed_request_is_not_logged(
    control_plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    for request in MALFORMED_REQUESTS.values():
        await send_raw_bytes(control_plane, request)
    await send_raw_bytes(control_plane, make_request_head("GET", "/poll"))
    assert caplog.records
    formatter: logging.Formatter = caplog.handler.formatter or pytest.fail("no formatter")
    assert TOKEN not in "".join(formatter.format(record) for record in caplog.records)
    assert TOKEN not in repr(control_plane)
    assert TOKEN not in repr(vars(control_plane.operations))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**63), max_value=2**64 - 1)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["a", "\0", ""]), inner),
)
bodies = st.binary() | st.dictionaries(
    st.sampled_from(["count", "metadata", "type", "force"]), json_values
).map(orjson.dumps)
queries = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "block_ms",
                "reclaim_older_than_ms",
                "desired_ttl_seconds",
                "expected_last_heartbeat",
                "limit",
                "page",
                "after_id",
                "before_id",
            ]
        ),
        st.text(st.characters(exclude_categories=["Cs"])) | st.integers().map(str),
    )
)
suffixes = st.sampled_from(["", "/poll", "/stats", "/{id}", "/{id}/ack", "/{id}/stop"]) | st.just(
    "/{id}/heartbeat"
)


async def open_http_client_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


def test_arbitrary_json_and_query_are_answered_without_500(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """All requests go to one server, so that a request which corrupts its state is detected."""
    with asyncio.Runner() as runner:
        path = tmp_path_factory.mktemp("abuse") / "work.db"
        plane = ControlPlane(environments=(ENV,), tokens={TOKEN: None}, store=SqliteStore(path))
        runner.run(plane.__aenter__())
        http = runner.run(open_http_client_session())
        dialects = [ApiClient(plane, http, "qoder"), ApiClient(plane, http, "anthropic")]

        @settings(max_examples=60, deadline=None)
        @given(
            st.sampled_from(dialects),
            st.sampled_from(["GET", "POST"]),
            suffixes,
            bodies,
            queries,
        )
        def assert_request_has_documented_status(
            api: ApiClient, method: str, suffix: str, body: bytes, query: list[tuple[str, str]]
        ) -> None:
            async def send_request_and_assert_status() -> None:
                (item,) = plane.enqueue()
                url = api.work_url(suffix.format(id=item.id))
                answer = await api(method, url, data=body, params=query)
                assert answer.status in {200, 204, 400, 405, 409, 412}
                assert answer.status < 400 or answer.error["type"]

            runner.run(send_request_and_assert_status())

        try:
            assert_request_has_documented_status()
        finally:
            runner.run(http.close())
            runner.run(plane.__aexit__(None, None, None))
