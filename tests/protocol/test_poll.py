"""Polls: the order of deliveries and redeliveries.

See workpool/docs/protocol.md, "Poll" and "Delivery".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.protocol.conftest import Api, Clock


async def test_poll_of_empty_queue_answers_literal_null(api: Api) -> None:
    answer = await api.poll()
    assert (answer.status, answer.body) == (200, None)
    assert answer.headers["Content-Length"] == "4"


async def test_polled_item_has_every_documented_field(qoder: Api) -> None:
    qoder.plane.enqueue(metadata={"job": "report"})
    item = await qoder.claim()
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


async def test_anthropic_item_has_session_id_with_its_prefix(anthropic: Api) -> None:
    (created,) = anthropic.plane.enqueue()
    item = await anthropic.claim()
    assert item["data"]["id"] == created.session_id.replace("sess_", "session_")


async def test_beta_query_is_accepted_but_not_required(anthropic: Api) -> None:
    anthropic.plane.enqueue(2)
    assert (await anthropic.poll(params={"beta": "true"})).body is not None
    assert (await anthropic.poll()).body is not None


@pytest.mark.usefixtures("both_stores")
async def test_poll_delivers_item_and_leaves_it_queued(api: Api) -> None:
    api.plane.enqueue()
    item = await api.claim()
    assert item["state"] == "queued"
    assert await api.state(item["id"]) == "queued"
    assert (await api.poll()).body is None


@pytest.mark.usefixtures("both_stores")
async def test_poll_returns_oldest_item_first(api: Api) -> None:
    ids = [item.id for item in api.plane.enqueue(5)]
    assert ids == sorted(ids)
    assert [(await api.claim())["id"] for _ in range(5)] == ids


async def test_due_redelivery_precedes_younger_item(api: Api, clock: Clock) -> None:
    (first,) = api.plane.enqueue()
    await api.claim()
    api.plane.enqueue()
    clock.advance(5)
    assert (await api.claim())["id"] == first.id


@pytest.mark.usefixtures("both_stores")
async def test_redeliveries_are_oldest_first_regardless_of_last_delivery(
    api: Api, clock: Clock
) -> None:
    first, second = (item.id for item in api.plane.enqueue(2))
    await api.claim()
    clock.advance(1)
    assert (await api.claim(params={"reclaim_older_than_ms": "1500"}))["id"] == second
    assert (await api.claim(params={"reclaim_older_than_ms": "1000"}))["id"] == first
    clock.advance(5)
    assert [(await api.claim())["id"], (await api.claim())["id"]] == [first, second]


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
async def test_redelivery_is_due_after_window_of_new_poll(
    qoder: Api, clock: Clock, reclaim: str | None, age: float, *, comes: bool
) -> None:
    qoder.plane.enqueue()
    await qoder.claim()
    clock.advance(age)
    params = {} if reclaim is None else {"reclaim_older_than_ms": reclaim}
    assert ((await qoder.poll(params=params)).body is not None) is comes


@pytest.mark.parametrize(
    "value",
    ["0", "1000", "-1", "+5", "", " 5", "5 ", "1.0", "1e2", "0x10", "1_0", "five", "٣", "9" * 5000],
)
async def test_block_ms_out_of_range_is_400(api: Api, value: str) -> None:
    api.plane.enqueue()
    answer = await api.poll(params={"block_ms": value})
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["param"] == "block_ms"
    assert (await api.stats())["depth"] == 1


@pytest.mark.parametrize("value", ["1", "999", "0999"])
async def test_block_ms_in_range_is_accepted(api: Api, value: str) -> None:
    api.plane.enqueue()
    assert (await api.poll(params={"block_ms": value})).body is not None


@pytest.mark.parametrize("value", ["-1", "", "1.5", "x", "+0", "NaN", "Infinity", "1_000"])
async def test_reclaim_window_other_than_non_negative_integer_is_400(api: Api, value: str) -> None:
    answer = await api.poll(params={"reclaim_older_than_ms": value})
    assert answer.status == 400
    assert answer.error["param"] == "reclaim_older_than_ms"


@pytest.mark.parametrize("name", ["block_ms", "reclaim_older_than_ms"])
async def test_poll_parameter_given_twice_is_400(api: Api, name: str) -> None:
    answer = await api.poll(params=[(name, "5"), (name, "5")])
    assert answer.status == 400
    assert answer.error["param"] == name


async def test_unknown_poll_parameters_are_ignored(api: Api) -> None:
    assert (await api.poll(params={"colour": "blue"})).status == 200


@pytest.mark.usefixtures("both_stores")
async def test_poll_records_worker_of_delivery(api: Api) -> None:
    api.plane.enqueue()
    item = await api.claim(worker="a")
    assert (await api.ack(item["id"], worker="b")).status == 409
    assert (await api.ack(item["id"], worker="a")).status == 200


@pytest.mark.parametrize("worker", ["x" * 257, "a\tb", "\x80"])
async def test_invalid_worker_id_is_400(qoder: Api, worker: str) -> None:
    answer = await qoder.poll(worker=worker)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


async def test_head_request_is_405_and_delivers_nothing(api: Api) -> None:
    api.plane.enqueue()
    assert (await api("HEAD", api.work("/poll"))).status == 405
    assert (await api.stats())["depth"] == 1
