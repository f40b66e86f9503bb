"""Polls: the order of deliveries and redeliveries.

See workpool/docs/protocol.md, "Poll" and "Delivery".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.manual_clock import ManualClock
    from tests.protocol.conftest import ApiClient


async def test_poll_of_empty_queue_is_answered_with_json_null(api: ApiClient) -> None:
    answer = await api.poll()
    assert (answer.status, answer.body) == (200, None)
    assert answer.headers["Content-Length"] == "4"


async def test_polled_item_has_every_documented_field(qoder_api: ApiClient) -> None:
    qoder_api.plane.enqueue(metadata={"job": "report"})
    item = await qoder_api.claim_item()
    work_id, session_id = item.pop("id"), item["data"].pop("id")
    assert re.fullmatch(r"work_[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}", work_id)
    assert re.fullmatch(r"sess_[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}", session_id)
    assert item == {
        "type": "work",
        "environment_id": "env_0199aaaaaaaa70008000000000000001",
        "data": {"type": "session"},
        "state": "queued",
        "created_at": "2026-03-01T12:00:00Z",
        "acknowledged_at": None,
        "started_at": None,
        "latest_heartbeat_at": None,
        "stop_requested_at": None,
        "stopped_at": None,
        "metadata": {"job": "report"},
    }


async def test_session_id_of_anthropic_item_has_prefix_of_dialect(
    anthropic_api: ApiClient,
) -> None:
    (created,) = anthropic_api.plane.enqueue()
    item = await anthropic_api.claim_item()
    assert item["data"]["id"] == created.session_id.replace("sess_", "session_")


async def test_poll_is_accepted_with_and_without_beta_parameter(anthropic_api: ApiClient) -> None:
    anthropic_api.plane.enqueue(2)
    assert (await anthropic_api.poll(params={"beta": "true"})).body is not None
    assert (await anthropic_api.poll()).body is not None


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_poll_delivers_item_and_leaves_it_queued(api: ApiClient) -> None:
    api.plane.enqueue()
    item = await api.claim_item()
    assert item["state"] == "queued"
    assert await api.item_state(item["id"]) == "queued"
    assert (await api.poll()).body is None


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_poll_returns_oldest_item_first(api: ApiClient) -> None:
    ids = [item.id for item in api.plane.enqueue(5)]
    assert ids == sorted(ids)
    assert [(await api.claim_item())["id"] for _ in range(5)] == ids


async def test_item_due_for_redelivery_is_delivered_before_younger_item(
    api: ApiClient, clock: ManualClock
) -> None:
    (first,) = api.plane.enqueue()
    await api.claim_item()
    api.plane.enqueue()
    clock.advance(5)
    assert (await api.claim_item())["id"] == first.id


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_redeliveries_come_oldest_item_first_regardless_of_time_of_last_delivery(
    api: ApiClient, clock: ManualClock
) -> None:
    first, second = (item.id for item in api.plane.enqueue(2))
    await api.claim_item()
    clock.advance(1)
    assert (await api.claim_item(params={"reclaim_older_than_ms": "1500"}))["id"] == second
    assert (await api.claim_item(params={"reclaim_older_than_ms": "1000"}))["id"] == first
    clock.advance(5)
    assert [(await api.claim_item())["id"], (await api.claim_item())["id"]] == [first, second]


@pytest.mark.parametrize(
    ("reclaim", "age", "comes"),
    [
        (None, 4.999, False),
        (None, 5.0, True),
        ("5000", 4.999, False),
        ("1000", 0.999, False),
        ("1000", 1.0, True),
        ("0", 0.0, True),
        ("600000", 599.999, False),
        ("00001000", 1.0, True),
        ("9" * 5000, 10_000.0, False),
    ],
)
async def test_item_is_redelivered_after_reclaim_window_that_poll_requests(
    qoder_api: ApiClient, clock: ManualClock, reclaim: str | None, age: float, *, comes: bool
) -> None:
    qoder_api.plane.enqueue()
    await qoder_api.claim_item()
    clock.advance(age)
    params = {} if reclaim is None else {"reclaim_older_than_ms": reclaim}
    assert ((await qoder_api.poll(params=params)).body is not None) is comes


@pytest.mark.parametrize(
    "value",
    ["0", "1000", "-1", "+5", "", " 5", "5 ", "1.0", "1e2", "0x10", "1_0", "five", "٣", "9" * 5000],
)
async def test_poll_with_block_ms_parameter_outside_range_is_400(
    api: ApiClient, value: str
) -> None:
    api.plane.enqueue()
    answer = await api.poll(params={"block_ms": value})
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["param"] == "block_ms"
    assert (await api.queue_stats())["depth"] == 1


@pytest.mark.parametrize("value", ["1", "999", "0999"])
async def test_poll_with_block_ms_parameter_in_range_is_accepted(
    api: ApiClient, value: str
) -> None:
    api.plane.enqueue()
    assert (await api.poll(params={"block_ms": value})).body is not None


@pytest.mark.parametrize("value", ["-1", "", "1.5", "x", "+0", "NaN", "Infinity", "1_000"])
async def test_reclaim_window_other_than_non_negative_integer_is_400(
    api: ApiClient, value: str
) -> None:
    answer = await api.poll(params={"reclaim_older_than_ms": value})
    assert answer.status == 400
    assert answer.error["param"] == "reclaim_older_than_ms"


@pytest.mark.parametrize("name", ["block_ms", "reclaim_older_than_ms"])
async def test_poll_parameter_given_twice_is_400(api: ApiClient, name: str) -> None:
    answer = await api.poll(params=[(name, "5"), (name, "5")])
    assert answer.status == 400
    assert answer.error["param"] == name


async def test_unknown_poll_parameters_are_ignored(api: ApiClient) -> None:
    assert (await api.poll(params={"colour": "blue"})).status == 200


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_only_worker_whose_poll_received_item_may_ack_it(api: ApiClient) -> None:
    api.plane.enqueue()
    item = await api.claim_item(worker="a")
    assert (await api.ack(item["id"], worker="b")).status == 409
    assert (await api.ack(item["id"], worker="a")).status == 200


@pytest.mark.parametrize("worker", ["x" * 257, "a\tb", "\x80"])
async def test_invalid_worker_id_is_400(qoder_api: ApiClient, worker: str) -> None:
    answer = await qoder_api.poll(worker=worker)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


async def test_head_request_to_poll_path_is_405_and_delivers_nothing(api: ApiClient) -> None:
    api.plane.enqueue()
    assert (await api("HEAD", api.work_url("/poll"))).status == 405
    assert (await api.queue_stats())["depth"] == 1
