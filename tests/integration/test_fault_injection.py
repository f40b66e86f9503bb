"""Fault injection: each fault applies to the intended requests and has the intended effect."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from workpool import Session, handler
from workpool.events import SessionFinished, SessionStarted
from workpool.testing import (
    Faults,
    Hold,
    delay,
    expire_lease,
    expired,
    garbled,
    literal,
    lost,
    reset,
    status,
    trickle,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workpool.server import ControlPlane
    from workpool.testing import Clock, Recorder
    from workpool.testing.fault_rules import Request


class HttpItemClient:
    """Sends HTTP requests for one item without the client of `workpool`."""

    def __init__(self, plane: ControlPlane, http: aiohttp.ClientSession) -> None:
        self.plane = plane
        self.http = http
        (item,) = plane.enqueue()
        self.id = item.id

    async def __call__(self, method: str, suffix: str = "", **options: Any) -> Any:
        url = f"{self.plane.base_url}/environments/{self.plane.environments[0]}/work{suffix}"
        headers = {"Authorization": f"Bearer {self.plane.token}", "Worker-ID": "me"}
        async with self.http.request(method, url, headers=headers, **options) as answer:
            return answer.status, answer.headers, await answer.read()

    async def acknowledge_item(self) -> Any:
        return await self("POST", f"/{self.id}/ack")

    @property
    def item_state(self) -> str:
        return self.plane.operations.get_item(self.plane.environments[0], self.id).state


@pytest.fixture
async def http_item_client(control_plane: ControlPlane) -> AsyncIterator[HttpItemClient]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=40)) as http:
        yield HttpItemClient(control_plane, http)


@pytest.mark.parametrize(("applied", "state"), [(True, "starting"), (False, "queued")])
@pytest.mark.parametrize(("fault", "error"), [
    (lost, aiohttp.ServerDisconnectedError), (reset, aiohttp.ClientOSError),
])  # fmt: skip
async def test_lost_or_reset_answer_can_be_injected_before_or_after_operation(
    http_item_client: HttpItemClient,
    faults: Faults,
    fault: Any,
    error: Any,
    state: str,
    *,
    applied: bool,
) -> None:
    faults.add(fault(applied=applied), "ack")
    with pytest.raises(error):
        await http_item_client.acknowledge_item()
    assert http_item_client.item_state == state
    assert [(request.op, request.status, request.lost) for request in faults.seen] == [
        ("ack", None, True)
    ]


async def test_injected_reset_raises_connection_reset(
    http_item_client: HttpItemClient, faults: Faults
) -> None:
    faults.add(reset(), "ack")
    with pytest.raises(aiohttp.ClientOSError) as caught:
        await http_item_client.acknowledge_item()
    assert caught.value.errno == errno.ECONNRESET


@pytest.mark.parametrize(("applied", "state"), [(True, "starting"), (False, "queued")])
async def test_injected_status_has_json_or_html_body_and_retry_after_header(
    http_item_client: HttpItemClient, faults: Faults, state: str, *, applied: bool
) -> None:
    faults.add(status(503, retry_after=7, applied=applied), "ack", times=1)
    faults.add(status(502, html=True), "ack", skip=1)
    code, headers, body = await http_item_client.acknowledge_item()
    assert (code, headers["Retry-After"], http_item_client.item_state) == (503, "7", state)
    assert body.startswith(b'{"type":"error"')
    code, headers, body = await http_item_client.acknowledge_item()
    assert (code, headers["Content-Type"]) == (502, "text/html")
    assert b"<html>" in body


async def test_injected_fault_truncates_replaces_or_slows_down_response_body(
    http_item_client: HttpItemClient, faults: Faults
) -> None:
    faults.add(garbled(), "ack")
    faults.add(literal(lambda: b"[]", 201), "get")
    faults.add(trickle(0.0001), "stats")
    assert (await http_item_client.acknowledge_item())[2] == b'{"id": "work_'
    assert http_item_client.item_state == "starting"
    assert (await http_item_client("GET", f"/{http_item_client.id}"))[0::2] == (201, b"[]")
    assert (await http_item_client("GET", "/stats"))[2].endswith(b"}")


async def test_operation_remains_applied_if_client_disconnects_during_slow_answer(
    http_item_client: HttpItemClient, faults: Faults
) -> None:
    faults.add(trickle(10), "ack")
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        acking = group.create_task(http_item_client.acknowledge_item())
        while http_item_client.item_state != "starting":  # noqa: ASYNC110 - a state has no event
            await asyncio.sleep(0.01)
        acking.cancel()
    assert acking.cancelled()
    assert http_item_client.item_state == "starting"


@pytest.mark.parametrize(("applied", "state"), [(True, "starting"), (False, "queued")])
async def test_hold_fault_delays_request_until_test_releases_it(
    http_item_client: HttpItemClient, faults: Faults, state: str, *, applied: bool
) -> None:
    hold = Hold(applied=applied)
    faults.add(hold, "ack")
    async with asyncio.TaskGroup() as group:
        acking = group.create_task(http_item_client.acknowledge_item())
        await hold.reached()
        assert (http_item_client.item_state, acking.done()) == (state, False)
        hold.release()
        assert (await acking)[0] == 200


async def test_delays_before_and_after_operation_add_up(
    http_item_client: HttpItemClient, faults: Faults
) -> None:
    faults.add(delay(0.05), "ack")
    faults.add(delay(0.05, applied=True), "ack")
    loop = asyncio.get_running_loop()
    started = loop.time()
    assert (await http_item_client.acknowledge_item())[0] == 200
    assert loop.time() - started >= 0.099


async def test_lease_expiry_fault_ends_lease_at_once(
    control_plane: ControlPlane, http_item_client: HttpItemClient, faults: Faults, clock: Clock
) -> None:
    faults.add(expired(control_plane), "heartbeat", times=1)
    await http_item_client.acknowledge_item()
    assert (await http_item_client("POST", f"/{http_item_client.id}/heartbeat"))[0] == 409
    assert http_item_client.item_state == "queued"
    await http_item_client.acknowledge_item()
    clock.advance(61)
    assert http_item_client.item_state == "queued"
    # Two leases of the item have expired: one by the fault, and one as the clock advanced. The item
    # has no lease now, so `expire_lease` must not record a third expiry.
    expire_lease(control_plane, http_item_client.id)
    lapsed = [record for record in control_plane.history if record.kind == "lapsed"]
    assert len(lapsed) == 2
    times = [record.time for record in control_plane.history]
    assert times == sorted(times)


async def read_status_codes(wire: HttpItemClient, count: int) -> list[int]:
    return [(await wire("GET", f"/{wire.id}"))[0] for _ in range(count)]


async def test_fault_that_skips_one_request_and_applies_twice_affects_second_and_third_request(
    http_item_client: HttpItemClient, faults: Faults
) -> None:
    rule = faults.add(status(500), "get", skip=1, times=2)
    assert await read_status_codes(http_item_client, 5) == [200, 500, 500, 200, 200]
    assert rule.hits == 2


async def test_fault_for_get_and_list_calls_does_not_affect_ack_call(
    http_item_client: HttpItemClient, faults: Faults
) -> None:
    faults.add(status(500), "get", "list")
    assert await read_status_codes(http_item_client, 1) == [500]
    assert (await http_item_client("GET"))[0] == 500
    assert (await http_item_client.acknowledge_item())[0] == 200


async def test_fault_without_call_names_applies_to_all_calls(
    http_item_client: HttpItemClient, faults: Faults
) -> None:
    faults.add(status(500))
    session = f"{http_item_client.plane.base_url}/sessions/x"
    async with http_item_client.http.get(session) as answer:
        assert answer.status == 500
    for method, suffix in [
        ("GET", "/poll"), ("POST", "/x/ack"), ("POST", "/x/heartbeat"), ("POST", "/x/stop"),
        ("POST", "/x"), ("GET", "/x"), ("GET", ""), ("GET", "/stats"), ("POST", ""),
    ]:  # fmt: skip
        assert (await http_item_client(method, suffix))[0] == 500
    assert [request.op for request in faults.seen] == [
        "session", "poll", "ack", "heartbeat", "stop", "update", "get", "list", "stats", "enqueue",
    ]  # fmt: skip
    async with http_item_client.http.get(http_item_client.plane.base_url) as answer:
        assert answer.status == 404


async def test_fault_with_predicate_applies_to_requests_for_which_predicate_is_true(
    http_item_client: HttpItemClient, faults: Faults
) -> None:
    def is_request_for_this_item(request: Request) -> bool:
        return request.work_id == http_item_client.id

    faults.add(status(500), "get", where=is_request_for_this_item)
    assert await read_status_codes(http_item_client, 1) == [500]
    assert (await http_item_client("GET", "/work_other"))[0] == 404


async def test_fault_with_start_and_end_time_applies_between_them(
    http_item_client: HttpItemClient, faults: Faults
) -> None:
    faults.add(status(500), "get", between=(0, 3600))
    faults.add(status(501), "get", between=(3600, 7200))
    assert await read_status_codes(http_item_client, 1) == [500]


async def test_fault_with_probability_hits_same_requests_for_same_seed(
    http_item_client: HttpItemClient, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = faults.add(status(500), "get", probability=0.3)
    statuses = []
    for seed in (1, 1, 2):
        monkeypatch.setattr(faults, "_random", Faults(seed)._random)
        statuses.append(await read_status_codes(http_item_client, 60))
    assert statuses[0] == statuses[1] != statuses[2]
    assert 0.1 * 180 < rule.hits < 0.5 * 180


async def test_fault_added_as_context_manager_is_removed_at_block_end(
    http_item_client: HttpItemClient, faults: Faults
) -> None:
    with faults.add(status(500), "get") as rule:
        assert await read_status_codes(http_item_client, 1) == [500]
    assert await read_status_codes(http_item_client, 1) == [200]
    rule.remove()
    assert await read_status_codes(http_item_client, 1) == [200]


async def test_faults_of_one_call_are_combined(
    http_item_client: HttpItemClient, faults: Faults
) -> None:
    faults.add(lost(), "ack", skip=1)
    faults.add(status(503, applied=True), "ack")
    assert (await http_item_client.acknowledge_item())[0] == 503
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await http_item_client.acknowledge_item()


async def test_requests_are_recorded_with_body_and_status(
    http_item_client: HttpItemClient, faults: Faults
) -> None:
    await http_item_client("POST", f"/{http_item_client.id}", json={"metadata": {"a": "b"}})
    await http_item_client("POST", f"/{http_item_client.id}", data=b"not json")
    await faults.wait_for("update", count=2, answered=True)
    first, second = faults.of("update", work_id=http_item_client.id)
    assert (first.worker_id, first.body, first.status) == ("me", {"metadata": {"a": "b"}}, 200)
    assert (second.body, second.status) == (b"not json", 400)
    with pytest.raises(AssertionError, match="there was"):
        await faults.wait_for("stop", timeout=0.01)


async def test_client_disconnect_during_hold_fault_logs_no_error(
    http_item_client: HttpItemClient, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    hold = Hold()
    faults.add(hold, "update")
    async with asyncio.TaskGroup() as group:
        sending = group.create_task(
            http_item_client("POST", f"/{http_item_client.id}", json={"metadata": {"a": "b"}})
        )
        await hold.reached()
        sending.cancel()
    await faults.wait_for("update")
    await http_item_client("GET", f"/{http_item_client.id}")
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


async def test_recorder_waits_for_event_and_reports_other_events_on_timeout(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    @handler
    async def return_at_once(_: Session) -> None:
        pass

    control_plane.enqueue(2)
    async with make_pool(return_at_once):
        second = await recorder.wait_for(SessionFinished, count=2)
        assert recorder.of(SessionFinished)[1] is second
        with pytest.raises(AssertionError, match=r"there was .*SessionFinished"):
            await recorder.wait_for(SessionStarted, count=3, timeout=0.01)
