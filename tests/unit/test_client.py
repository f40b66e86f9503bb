"""Client calls against the embedded control plane, over a real socket and in both dialects."""

from __future__ import annotations

import asyncio
import itertools
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import orjson
import pytest
from aiohttp import web

from tests.unit.event_loops import run_ready_tasks
from tests.unit.limiter_tokens import acquire_all_tokens
from workpool.errors import (
    ConflictError,
    ControlPlaneError,
    PreconditionError,
    RefusedError,
    SettingsError,
    TransientError,
)
from workpool.server import DEFAULT_ENVIRONMENT, ControlPlane
from workpool.settings import Settings
from workpool.wire import page_limits
from workpool.wire.client import WorkClient
from workpool.wire.http.call_options import CallOptions, Priority
from workpool.wire.http.rate_limiter import RateLimits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from workpool.wire.items import WorkItem
    from workpool.wire.protocol import Dialect

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

UNKNOWN = "work_00000000000070008000000000000009"


class RecordingMiddleware:
    """A middleware of the control plane that records requests, and replaces or changes answers."""

    def __init__(self) -> None:
        self.seen: list[web.Request] = []
        self.arrived = asyncio.Event()
        self.instead: Callable[[], web.Response] | None = None
        self.rewrite: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        self.hold: asyncio.Event | None = None
        self.add_headers: dict[str, str] = {}

    @web.middleware
    async def handle_request(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.seen.append(request)
        self.arrived.set()
        if self.hold is not None:
            await self.hold.wait()
        if self.instead is not None:
            return self.instead()
        response = await handler(request)
        response.headers.update(self.add_headers)
        if self.rewrite is not None:
            assert isinstance(response, web.Response)
            return web.json_response(self.rewrite(orjson.loads(response.text or "")))
        return response

    @property
    def requested_paths(self) -> list[str]:
        return [each.path_qs.split(f"{DEFAULT_ENVIRONMENT}/work", 1)[-1] for each in self.seen]


def json_response(body: bytes | None) -> web.Response:
    """Return a 200 response with this JSON, or a 204 for None."""
    if body is None:
        return web.Response(status=204)
    return web.Response(body=body, content_type="application/json")


@pytest.fixture
def recording_middleware() -> RecordingMiddleware:
    return RecordingMiddleware()


@pytest.fixture
async def control_plane(recording_middleware: RecordingMiddleware) -> AsyncIterator[ControlPlane]:
    async with ControlPlane(middlewares=[recording_middleware.handle_request]) as plane:
        yield plane


def make_settings_for_control_plane(
    plane: ControlPlane, dialect: Dialect = "qoder", **values: Any
) -> Settings:
    base_url = plane.base_url if dialect == "qoder" else plane.anthropic_base_url
    common = {"token": plane.token, "environment_id": DEFAULT_ENVIRONMENT, "worker_id": "me"}
    return Settings(base_url=base_url, dialect=dialect, **{**common, **values})


@pytest.fixture(params=["qoder", "anthropic"])
async def client(
    control_plane: ControlPlane, request: pytest.FixtureRequest
) -> AsyncIterator[WorkClient]:
    async with WorkClient(make_settings_for_control_plane(control_plane, request.param)) as client:
        yield client


@pytest.fixture
async def qoder_dialect_client(control_plane: ControlPlane) -> AsyncIterator[WorkClient]:
    async with WorkClient(make_settings_for_control_plane(control_plane)) as client:
        yield client


async def poll_and_expect_item(client: WorkClient) -> WorkItem:
    item = await client.poll()
    assert item is not None
    return item


async def test_client_calls_take_item_from_queued_to_stopped(
    control_plane: ControlPlane, client: WorkClient
) -> None:
    control_plane.enqueue(metadata={"job": "a"})
    delivered = await poll_and_expect_item(client)
    assert (delivered.state, delivered.type, delivered.metadata) == (
        "queued",
        "session",
        {"job": "a"},
    )
    assert delivered.environment_id == DEFAULT_ENVIRONMENT
    assert delivered.acknowledged_at is None

    acked = await client.ack(delivered.id)
    assert (acked.id, acked.state) == (delivered.id, "starting")
    assert acked.acknowledged_at is not None

    first = await client.heartbeat(delivered.id, ttl=30)
    assert (first.state, first.ttl_seconds, first.lease_extended) == ("active", 30, True)
    second = await client.heartbeat(delivered.id, first.last_heartbeat, 40)
    assert second.ttl_seconds == 40
    assert (await client.get(delivered.id)).last_heartbeat == second.last_heartbeat

    changed = await client.update_metadata(delivered.id, {"job": None, "b": ""})
    assert changed.metadata == {"b": ""}
    await client.stop(delivered.id, force=True)
    assert (await client.get(delivered.id)).state == "stopped"


async def test_poll_of_empty_queue_returns_none(client: WorkClient) -> None:
    assert await client.poll() is None
    assert await client.poll(1, 0) is None


async def test_waiting_poll_returns_item_enqueued_meanwhile(
    control_plane: ControlPlane,
    qoder_dialect_client: WorkClient,
    recording_middleware: RecordingMiddleware,
) -> None:
    async with asyncio.TaskGroup() as group:
        poll = group.create_task(qoder_dialect_client.poll(999, 5000))
        await recording_middleware.arrived.wait()
        (item,) = control_plane.enqueue()
    found = poll.result()
    assert found is not None
    assert found.id == item.id
    assert recording_middleware.requested_paths == ["/poll?block_ms=999&reclaim_older_than_ms=5000"]


async def test_second_stop_call_without_force_changes_item_state_from_stopping_to_stopped(
    control_plane: ControlPlane, qoder_dialect_client: WorkClient
) -> None:
    control_plane.enqueue()
    item = await poll_and_expect_item(qoder_dialect_client)
    await qoder_dialect_client.ack(item.id)
    asked = await qoder_dialect_client.stop(item.id)
    assert asked is not None
    assert asked.state == "stopping"
    heartbeat = await qoder_dialect_client.heartbeat(item.id)
    assert heartbeat.state == "stopping"
    confirmed = await qoder_dialect_client.stop(item.id)
    assert confirmed is not None
    assert confirmed.state == "stopped"


async def test_anthropic_stop_returns_no_item_and_raises_conflict_error_when_repeated(
    control_plane: ControlPlane,
) -> None:
    control_plane.enqueue()
    async with WorkClient(make_settings_for_control_plane(control_plane, "anthropic")) as client:
        item = await poll_and_expect_item(client)
        assert await client.stop(item.id, force=True) is None
        with pytest.raises(ConflictError):
            await client.stop(item.id, force=True)


async def test_anthropic_item_and_queue_requests_have_query_parameter_beta(
    control_plane: ControlPlane, recording_middleware: RecordingMiddleware
) -> None:
    async with WorkClient(make_settings_for_control_plane(control_plane, "anthropic")) as client:
        await client.poll(1)
        await client.stats()
        (item,) = await client.enqueue()
        await client.get(item.id)
        await client.session(item.session_id)
    assert recording_middleware.requested_paths[:-1] == [
        "/poll?block_ms=1&beta=true",
        "/stats?beta=true",
        "?beta=true",
        f"/{item.id}?beta=true",
    ]
    assert recording_middleware.seen[-1].path_qs == f"/v1/sessions/{item.session_id}"


async def test_stats_of_queue_are_returned(control_plane: ControlPlane, client: WorkClient) -> None:
    control_plane.enqueue(3)
    await client.poll()
    stats = await client.stats()
    assert (stats.depth, stats.pending, stats.workers_polling) == (2, 1, 1)
    assert stats.oldest_queued_at is not None


async def test_client_returns_session_with_the_id_from_polled_item(
    control_plane: ControlPlane, client: WorkClient
) -> None:
    control_plane.enqueue()
    item = await poll_and_expect_item(client)
    session = await client.session(item.session_id)
    assert session["id"] == item.session_id
    assert session["type"] == "session"


async def test_enqueued_items_are_returned_and_listed(client: WorkClient) -> None:
    items = await client.enqueue(3, {"job": "a"})
    assert [item.metadata for item in items] == [{"job": "a"}] * 3
    assert [item.id for item in items] == [item.id async for item in client.list()]
    (check,) = await client.enqueue(item_type="session")
    assert check.type == "session"


async def test_each_error_status_raises_its_own_exception_class(
    control_plane: ControlPlane, client: WorkClient
) -> None:
    with pytest.raises(RefusedError) as unknown:
        await client.get(UNKNOWN)
    assert (unknown.value.op, unknown.value.status) == ("get", 404)
    assert unknown.value.error_type == "not_found_error"

    control_plane.enqueue()
    item = await poll_and_expect_item(client)
    with pytest.raises(ConflictError):
        await client.heartbeat(item.id)  # A queued item has no lease that a heartbeat could extend.
    await client.ack(item.id)
    with pytest.raises(PreconditionError):
        await client.heartbeat(item.id, "2026-01-01T00:00:00.000000Z")
    with pytest.raises(RefusedError) as refused:
        await client.poll(0)
    assert (refused.value.status, refused.value.param) == (400, "block_ms")

    async with WorkClient(
        make_settings_for_control_plane(control_plane), worker_id="other"
    ) as other:
        control_plane.enqueue()
        await poll_and_expect_item(other)
    await client.stop(item.id, force=True)
    with pytest.raises(ConflictError):
        await client.ack(item.id)


async def test_ack_by_second_worker_id_raises_conflict(
    control_plane: ControlPlane, qoder_dialect_client: WorkClient
) -> None:
    control_plane.enqueue()
    item = await poll_and_expect_item(qoder_dialect_client)
    async with WorkClient(
        make_settings_for_control_plane(control_plane), worker_id="other"
    ) as other:
        with pytest.raises(ConflictError):
            await other.ack(item.id)


async def test_wrong_token_raises_refused_error(control_plane: ControlPlane) -> None:
    async with WorkClient(make_settings_for_control_plane(control_plane, token=UNKNOWN)) as client:
        with pytest.raises(RefusedError) as refused:
            await client.poll()
    assert (refused.value.status, refused.value.error_type) == (401, "authentication_error")


async def test_parameter_expected_last_heartbeat_is_sent_unchanged_in_query(
    control_plane: ControlPlane,
    qoder_dialect_client: WorkClient,
    recording_middleware: RecordingMiddleware,
) -> None:
    control_plane.enqueue()
    item = await poll_and_expect_item(qoder_dialect_client)
    for expected in ("2026-01-01T00:00:00.5+02:00", "a&b=c#d e%/", None):
        with pytest.raises(ControlPlaneError):
            await qoder_dialect_client.heartbeat(item.id, expected, 10)
        assert recording_middleware.seen[-1].query.get("expected_last_heartbeat") == expected
        assert recording_middleware.seen[-1].query["desired_ttl_seconds"] == "10"


@pytest.mark.parametrize("body", [None, b"null", b"{}"], ids=["204", "null", "empty_object"])
async def test_poll_answered_without_item_returns_none(
    client: WorkClient, recording_middleware: RecordingMiddleware, body: bytes | None
) -> None:
    recording_middleware.instead = lambda: json_response(body)
    assert await client.poll() is None


@pytest.mark.parametrize("body", [b"[]", b"false", b"0", b'""', b'"item"'])
async def test_poll_answer_with_json_other_than_object_or_null_raises_transient_error(
    qoder_dialect_client: WorkClient, recording_middleware: RecordingMiddleware, body: bytes
) -> None:
    recording_middleware.instead = lambda: json_response(body)
    with pytest.raises(TransientError) as raised:
        await qoder_dialect_client.poll()
    assert raised.value.reason == "bad_body"


async def test_item_list_is_read_page_by_page_up_to_limit(
    control_plane: ControlPlane, client: WorkClient, recording_middleware: RecordingMiddleware
) -> None:
    ids = [item.id for item in control_plane.enqueue(250)]
    assert [item.id async for item in client.list()] == ids
    assert len(recording_middleware.seen) == 3
    assert [item.id async for item in client.list(after_id=ids[200])] == ids[201:]
    assert [item.id async for item in client.list(limit=120)] == ids[:120]
    assert [item.id async for item in client.list(limit=0)] == []
    before = [item.id async for item in client.list(before_id=ids[150])]
    assert before == ids[50:150] + ids[:50]


async def test_client_requests_no_further_page_if_loop_over_item_list_ends_early(
    control_plane: ControlPlane,
    qoder_dialect_client: WorkClient,
    recording_middleware: RecordingMiddleware,
) -> None:
    control_plane.enqueue(150)
    async for _ in qoder_dialect_client.list():
        break
    assert len(recording_middleware.seen) == 1


@pytest.mark.parametrize("omitted", [{"has_more"}, {"has_more", "first_id", "last_id"}])
async def test_item_list_without_has_more_field_is_read_until_no_next_page_follows(
    control_plane: ControlPlane,
    client: WorkClient,
    recording_middleware: RecordingMiddleware,
    omitted: set[str],
) -> None:
    ids = [item.id for item in control_plane.enqueue(250)]
    recording_middleware.rewrite = lambda page: {
        name: page[name] for name in page if name not in omitted
    }
    assert [item.id async for item in client.list()] == ids
    assert len(recording_middleware.seen) == 3


async def test_list_ends_if_has_more_is_false_despite_next_page(
    qoder_dialect_client: WorkClient, recording_middleware: RecordingMiddleware
) -> None:
    recording_middleware.instead = lambda: web.json_response(
        {"data": [], "has_more": False, "next_page": "a"}
    )
    assert [item async for item in qoder_dialect_client.list()] == []
    assert len(recording_middleware.seen) == 1


async def test_list_with_cyclic_page_tokens_raises_transient_error(
    qoder_dialect_client: WorkClient, recording_middleware: RecordingMiddleware
) -> None:
    tokens = itertools.cycle(["a", "b"])
    recording_middleware.instead = lambda: web.json_response(
        {"data": [], "next_page": next(tokens)}
    )
    with pytest.raises(TransientError, match="repeat"):
        _ = [item async for item in qoder_dialect_client.list()]
    assert recording_middleware.requested_paths == [
        "?limit=100",
        "?limit=100&page=a",
        "?limit=100&page=b",
    ]


async def test_list_with_endless_empty_pages_raises_transient_error(
    qoder_dialect_client: WorkClient,
    recording_middleware: RecordingMiddleware,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page_limits, "PAGES_PER_SECOND", 1e6)
    numbers = itertools.count()
    recording_middleware.instead = lambda: web.json_response(
        {"data": [], "next_page": f"page_{next(numbers)}"}
    )
    with pytest.raises(TransientError, match="without anything new"):
        [item async for item in qoder_dialect_client.list()]
    assert len(recording_middleware.seen) == page_limits.STALE_PAGES


async def test_list_with_repeated_page_token_raises_transient_error(
    qoder_dialect_client: WorkClient, recording_middleware: RecordingMiddleware
) -> None:
    recording_middleware.instead = lambda: web.json_response(
        {"data": [], "has_more": True, "next_page": "a/b?c"}
    )
    with pytest.raises(TransientError, match="repeat"):
        _ = [item async for item in qoder_dialect_client.list()]
    assert recording_middleware.requested_paths == ["?limit=100", "?limit=100&page=a%2Fb%3Fc"]


@pytest.mark.parametrize(
    "page",
    [{}, {"data": {}}, {"data": [7]}, {"data": [], "has_more": True, "next_page": 7},
     {"data": [], "next_page": 7}, [], None],
)  # fmt: skip
async def test_malformed_page_of_item_list_raises_transient_error_about_bad_body(
    qoder_dialect_client: WorkClient, recording_middleware: RecordingMiddleware, page: Any
) -> None:
    recording_middleware.instead = lambda: web.json_response(page)
    with pytest.raises(TransientError) as raised:
        _ = [item async for item in qoder_dialect_client.list()]
    assert raised.value.reason == "bad_body"


@pytest.mark.parametrize(
    "bad", ["", "..", "a/b", "../stats", "a?b", "a#b", "a b", "a%2fb", "ä", "a\n", "x" * 129]
)
async def test_invalid_id_is_never_sent_in_url(
    qoder_dialect_client: WorkClient, recording_middleware: RecordingMiddleware, bad: str
) -> None:
    calls = [
        qoder_dialect_client.ack(bad),
        qoder_dialect_client.heartbeat(bad),
        qoder_dialect_client.stop(bad),
        qoder_dialect_client.get(bad),
        qoder_dialect_client.update_metadata(bad, {}),
        qoder_dialect_client.session(bad),
        anext(qoder_dialect_client.list(after_id=bad)),
        anext(qoder_dialect_client.list(before_id=bad)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="not an id"):
            await call
    assert recording_middleware.seen == []


async def test_update_with_metadata_other_than_text_raises_type_error_before_any_request(
    qoder_dialect_client: WorkClient, recording_middleware: RecordingMiddleware
) -> None:
    for bad in ({"a": 1}, {"a": {"b": "c"}}, {1: "a"}, {"a": "\ud800"}):
        patch: Any = bad
        with pytest.raises(TypeError):
            await qoder_dialect_client.update_metadata(UNKNOWN, patch)
    assert recording_middleware.seen == []


async def test_client_used_before_opening_raises_runtime_error(control_plane: ControlPlane) -> None:
    client = WorkClient(make_settings_for_control_plane(control_plane))
    with pytest.raises(RuntimeError, match="async with"):
        await client.poll()
    for _ in range(2):  # A closed client may be opened again.
        async with client:
            assert await client.poll() is None
            with pytest.raises(RuntimeError, match="open already"):
                await client.__aenter__()
    with pytest.raises(RuntimeError, match="async with"):
        await client.get(UNKNOWN)


async def test_client_used_on_second_event_loop_raises_runtime_error(
    qoder_dialect_client: WorkClient,
) -> None:
    with pytest.raises(RuntimeError, match="another event loop"):
        await asyncio.to_thread(asyncio.run, qoder_dialect_client.poll())


async def test_missing_settings_are_reported_when_client_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("QODER_PAT", raising=False)
    client = WorkClient(Settings())
    with pytest.raises(SettingsError) as raised:
        await client.__aenter__()
    assert [problem.split(":")[0] for problem in raised.value.problems] == [
        "environment_id",
        "token",
    ]


async def test_callers_aiohttp_session_stays_open_after_client_closes(
    control_plane: ControlPlane,
) -> None:
    async with aiohttp.ClientSession() as session:
        async with WorkClient(
            make_settings_for_control_plane(control_plane), session=session
        ) as client:
            assert await client.poll() is None
        assert not session.closed


async def test_request_in_callers_aiohttp_session_times_out_after_client_closes(
    control_plane: ControlPlane, recording_middleware: RecordingMiddleware
) -> None:
    recording_middleware.hold = asyncio.Event()
    settings = make_settings_for_control_plane(control_plane, request_timeout=1.0)

    async def poll_until_timeout(client: WorkClient) -> None:
        with pytest.raises(TransientError) as raised:
            await client.poll()
        assert raised.value.reason == "timeout"

    async with (
        asyncio.timeout(30),
        aiohttp.ClientSession() as session,
        asyncio.TaskGroup() as group,
        WorkClient(settings, session=session) as client,
    ):
        group.create_task(poll_until_timeout(client))
        await recording_middleware.arrived.wait()
    recording_middleware.hold.set()


async def test_worker_id_set_before_opening_is_sent_as_header(
    control_plane: ControlPlane, recording_middleware: RecordingMiddleware
) -> None:
    client = WorkClient(make_settings_for_control_plane(control_plane))
    client.worker_id = "me-0a1b2c3d"
    async with client:
        await client.poll()
    client.worker_id = None
    async with client:
        await client.poll()
    assert [each.headers.get("Worker-ID") for each in recording_middleware.seen] == [
        "me-0a1b2c3d",
        None,
    ]


async def test_client_callbacks_are_called_for_each_request_and_each_credential_refresh(
    control_plane: ControlPlane, recording_middleware: RecordingMiddleware
) -> None:
    reported: list[tuple[str, str]] = []
    refreshes: list[str] = []
    client = WorkClient(make_settings_for_control_plane(control_plane))
    client.on_request = lambda *each: reported.append(each[:2])
    client.on_credential_refresh = refreshes.append
    async with client:
        await client.poll()
        recording_middleware.instead = lambda: web.Response(status=401)
        with pytest.raises(RefusedError):
            await client.stats()
    assert reported == [("poll", "2xx"), ("stats", "401")]
    assert refreshes == ["ok"]


async def test_call_times_out_after_timeout_argument_or_timeout_in_settings(
    control_plane: ControlPlane, recording_middleware: RecordingMiddleware
) -> None:
    recording_middleware.hold = asyncio.Event()
    async with WorkClient(
        make_settings_for_control_plane(control_plane, request_timeout=0.05)
    ) as client:
        for call in (client.stats(), client.get(UNKNOWN, timeout=0.01), client.poll()):
            with pytest.raises(TransientError) as raised:
                await call
            assert raised.value.reason == "timeout"
    recording_middleware.hold.set()


async def test_poll_waits_its_block_time_unless_poll_timeout_is_shorter(
    control_plane: ControlPlane,
) -> None:
    async with WorkClient(
        make_settings_for_control_plane(control_plane, request_timeout=5)
    ) as client:
        started = time.monotonic()
        assert await client.poll(150) is None
        assert time.monotonic() - started >= 0.15
    # The timeout ends the poll, although the control plane would answer only after 999 ms.
    async with WorkClient(
        make_settings_for_control_plane(control_plane, request_timeout=0.3)
    ) as client:
        with pytest.raises(TransientError):
            await client.poll(999, timeout=0.3)


async def test_poll_with_malformed_item_raises_transient_error_about_bad_body(
    qoder_dialect_client: WorkClient, recording_middleware: RecordingMiddleware
) -> None:
    recording_middleware.instead = lambda: web.json_response({"id": "../x"})
    with pytest.raises(TransientError, match="malformed") as raised:
        await qoder_dialect_client.poll()
    assert (raised.value.reason, raised.value.status) == ("bad_body", 200)


async def test_stop_call_that_skips_item_in_answer_accepts_any_json_object(
    qoder_dialect_client: WorkClient, recording_middleware: RecordingMiddleware
) -> None:
    recording_middleware.instead = lambda: web.Response(body=b'{"id": 7}')
    assert await qoder_dialect_client.stop(UNKNOWN, force=True, read_item=False) is None
    with pytest.raises(TransientError):
        await qoder_dialect_client.stop(UNKNOWN, force=True)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{" * 5_000_000])
async def test_stop_call_that_skips_item_in_answer_still_rejects_answer_without_json_object(
    qoder_dialect_client: WorkClient, recording_middleware: RecordingMiddleware, body: bytes
) -> None:
    """An HTML page with status 200 may come from a gateway that did not forward the request."""
    recording_middleware.instead = lambda: web.Response(body=body)
    with pytest.raises(TransientError):
        await qoder_dialect_client.stop(UNKNOWN, force=True, read_item=False)


async def test_stop_call_that_skips_item_in_answer_raises_refused_error_for_unknown_item(
    qoder_dialect_client: WorkClient,
) -> None:
    with pytest.raises(RefusedError) as raised:
        await qoder_dialect_client.stop(UNKNOWN, read_item=False)
    assert raised.value.status == 404


async def test_read_and_write_requests_have_separate_rate_limits(
    control_plane: ControlPlane,
) -> None:
    control_plane.enqueue()
    async with WorkClient(
        make_settings_for_control_plane(control_plane, read_rate=0.004, write_rate=0.004)
    ) as client:
        # This poll uses the only read request that the rate limit allows in four minutes.
        item = await poll_and_expect_item(client)
        with pytest.raises(TransientError, match="our own rate limit") as raised:
            await client.stats(timeout=0.01)
        assert raised.value.reason == "timeout"
        # This ack uses the only write request that the rate limit allows in four minutes.
        await client.ack(item.id)
        for call in (
            client.stop(item.id, timeout=0.01),
            client.update_metadata(item.id, {}, timeout=0.01),
            client.ack(item.id, timeout=0.01),
        ):
            with pytest.raises(TransientError, match="our own rate limit"):
                await call
        for _ in range(3):
            await client.heartbeat(item.id, None)  # Heartbeats never wait for the rate limit.


async def test_wait_for_rate_limit_is_reported_with_its_seconds(
    control_plane: ControlPlane,
) -> None:
    waits: list[tuple[str, float]] = []
    client = WorkClient(
        make_settings_for_control_plane(control_plane, read_rate=0.004, write_rate=0.004)
    )
    client.on_rate_limit_wait = lambda kind, seconds: waits.append((kind, seconds))
    async with client:
        acquire_all_tokens(client.rate_limits.read)
        before = time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(client.stats(timeout=60))
            await run_ready_tasks()
            waiting = time.monotonic()
            # The call waits for the rate limit during this sleep, so the reported time is not 0.
            await asyncio.sleep(0.05)
            shortest = time.monotonic() - waiting
            # The next token would come after 250 s. The refund ends the wait.
            client.rate_limits.read.refund()
        assert [kind for kind, _ in waits] == ["read"]
        assert shortest <= waits[0][1] <= time.monotonic() - before
        acquire_all_tokens(client.rate_limits.write)
        with pytest.raises(TransientError):
            await client.stop(UNKNOWN, timeout=0.05)
    assert [kind for kind, _ in waits] == ["read", "write"]
    assert waits[1][1] >= 0.05


async def test_ack_with_permit_acquired_before_poll_does_not_wait_for_rate_limit(
    control_plane: ControlPlane,
) -> None:
    control_plane.enqueue()
    async with WorkClient(
        make_settings_for_control_plane(control_plane, write_rate=0.004, request_timeout=5)
    ) as client:
        await client.acquire_ack_permit()
        assert acquire_all_tokens(client.rate_limits.write) == 0
        item = await poll_and_expect_item(client)
        await client.ack(item.id, permit=True)
        client.release_ack_permit()
        await client.acquire_ack_permit()
        client.release_ack_permit()
        assert acquire_all_tokens(client.rate_limits.write) == 1


async def test_cancelling_wait_for_ack_permit_leaves_rate_limiter_token_unused(
    control_plane: ControlPlane,
) -> None:
    async with WorkClient(
        make_settings_for_control_plane(control_plane, write_rate=0.004)
    ) as client:
        await client.acquire_ack_permit()
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(client.acquire_ack_permit())
            await run_ready_tasks()
            assert not waiting.done()
            waiting.cancel()
        client.release_ack_permit()
        assert acquire_all_tokens(client.rate_limits.write) == 1


async def test_client_with_unlimited_rates_never_calls_its_rate_limiters(
    control_plane: ControlPlane,
) -> None:
    control_plane.enqueue()
    limits = RateLimits(0, 0)
    # These limiters have no methods, so the use of a limiter would raise AttributeError.
    limits.read = limits.write = cast("Any", SimpleNamespace(limited=False))
    client = WorkClient(make_settings_for_control_plane(control_plane), rate_limits=limits)
    async with client:
        await client.acquire_ack_permit()
        client.release_ack_permit()
        item = await poll_and_expect_item(client)
        await client.ack(item.id, permit=True)
        await client.heartbeat(item.id)
        await client.stop(item.id, force=True)


async def test_two_clients_with_shared_rate_limits_take_tokens_from_one_limiter(
    control_plane: ControlPlane,
) -> None:
    limits = RateLimits(0, 0.004)
    first, second = (
        WorkClient(make_settings_for_control_plane(control_plane), rate_limits=limits)
        for _ in range(2)
    )
    async with first, second:
        await first.acquire_ack_permit()
        with pytest.raises(TransientError, match="our own rate limit"):
            await second.stop(UNKNOWN, timeout=0.01)


async def test_calls_waiting_for_rate_limit_are_sent_by_priority(
    control_plane: ControlPlane,
) -> None:
    """Completions precede claims, and calls of handlers alternate with claims."""
    sent: asyncio.Queue[str] = asyncio.Queue()
    client = WorkClient(make_settings_for_control_plane(control_plane, write_rate=0.004))
    client.on_request = lambda op, *_: sent.put_nowait(op)
    limiter = client.rate_limits.write
    async with client:
        acquire_all_tokens(limiter)
        completion = CallOptions(priority=Priority.COMPLETION)
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(assert_call_is_refused(client.update_metadata(UNKNOWN, {})))
            for call in (client.ack(UNKNOWN), client.stop(UNKNOWN, options=completion)):
                group.create_task(assert_call_is_refused(call))
            while sum(map(len, limiter._line._waiters.values())) < 4:  # noqa: ASYNC110 - no event tells that a call waits
                await asyncio.sleep(0)
            for op in ("stop", "ack", "update", "update"):
                limiter.refund()  # This adds one token to the rate limiter.
                assert await sent.get() == op


async def assert_call_is_refused(call: Awaitable[object]) -> None:
    with pytest.raises(RefusedError):
        await call


TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("header", "kept"),
    [(TRACE, TRACE), (None, None), ("", None), ("00-0-0-0", None), (TRACE + "-more", None)],
)
async def test_item_has_traceparent_of_poll_response_only_if_valid(
    control_plane: ControlPlane,
    recording_middleware: RecordingMiddleware,
    client: WorkClient,
    header: str | None,
    kept: str | None,
) -> None:
    control_plane.enqueue()
    recording_middleware.add_headers = (
        {} if header is None else {"Traceparent": header, "X-Other": "ignored"}
    )
    item = await client.poll()
    assert item is not None
    assert item.traceparent == kept
    assert await client.poll() is None
