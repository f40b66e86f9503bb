"""Heartbeats, which extend the lease.

See workpool/docs/protocol.md, "Heartbeat".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.manual_clock import ManualClock
    from tests.protocol.conftest import ApiClient


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_first_heartbeat_changes_item_state_from_starting_to_active(
    api: ApiClient, clock: ManualClock
) -> None:
    work_id = await api.create_item_in_state("starting")
    clock.advance(1.25)
    answer = await api.heartbeat(work_id, "NO_HEARTBEAT")
    assert answer.status == 200
    assert answer.body == {
        "type": "work_heartbeat",
        "last_heartbeat": "2026-03-01T12:00:01.250000Z",
        "lease_extended": True,
        "state": "active",
        "ttl_seconds": 60,
    }
    item = (await api.get(work_id)).body
    assert item["state"] == "active"
    assert item["started_at"] == "2026-03-01T12:00:01Z"
    assert item["latest_heartbeat_at"] == "2026-03-01T12:00:01.250000Z"


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_later_heartbeats_do_not_change_started_at_of_item(
    api: ApiClient, clock: ManualClock
) -> None:
    work_id = await api.create_item_in_state("starting")
    last = (await api.heartbeat(work_id, "NO_HEARTBEAT")).body["last_heartbeat"]
    for _ in range(3):
        clock.advance(20)
        answer = await api.heartbeat(work_id, last)
        assert answer.status == 200
        assert answer.body["last_heartbeat"] > last
        last = answer.body["last_heartbeat"]
    item = (await api.get(work_id)).body
    assert item["started_at"] == "2026-03-01T12:00:00Z"
    assert item["latest_heartbeat_at"] == last == "2026-03-01T12:01:00.000000Z"


async def test_two_heartbeats_in_the_same_microsecond_receive_different_times(
    api: ApiClient,
) -> None:
    work_id = await api.create_item_in_state("starting")
    first = (await api.heartbeat(work_id, "NO_HEARTBEAT")).body["last_heartbeat"]
    second = (await api.heartbeat(work_id, first)).body["last_heartbeat"]
    assert second == "2026-03-01T12:00:00.000001Z"
    assert (await api.heartbeat(work_id, first)).status == 412


@pytest.mark.parametrize("state", ["starting", "active", "stopping"])
async def test_heartbeat_without_expected_last_heartbeat_is_accepted_whenever_item_is_leased(
    api: ApiClient, state: str
) -> None:
    work_id = await api.create_item_in_state(state)
    answer = await api.heartbeat(work_id)
    assert answer.status == 200
    assert answer.body["state"] == ("stopping" if state == "stopping" else "active")


@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        (None, 60),
        ("1", 10),
        ("9", 10),
        ("10", 10),
        ("11", 11),
        ("600", 600),
        ("601", 600),
        ("9" * 4400, 600),
    ],
)
async def test_heartbeat_ttl_is_limited_to_range(
    api: ApiClient, clock: ManualClock, asked: str | None, granted: int
) -> None:
    work_id = await api.create_item_in_state("starting")
    answer = await api.heartbeat(work_id, "NO_HEARTBEAT", asked)
    assert (answer.status, answer.body["ttl_seconds"]) == (200, granted)
    clock.advance(granted - 0.001)
    assert await api.item_state(work_id) == "active"
    clock.advance(0.001)
    assert await api.item_state(work_id) == "queued"


@pytest.mark.parametrize("value", ["0", "00", "-1", "", "10.0", "1e1", "ten", "true", "+10"])
async def test_heartbeat_ttl_other_than_positive_integer_is_400(api: ApiClient, value: str) -> None:
    work_id = await api.create_item_in_state("starting")
    answer = await api.heartbeat(work_id, "NO_HEARTBEAT", value)
    assert answer.status == 400
    assert answer.error["param"] == "desired_ttl_seconds"
    assert await api.item_state(work_id) == "starting"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "no_heartbeat",
        "yesterday",
        "2026-03-01",
        "2026-03-01T12:00:00",
        "2026-13-01T12:00:00Z",
        "2026-02-30T12:00:00Z",
        "2026-03-01T25:00:00Z",
        "2026-03-01T12:00:00+0000",
        "2026-03-01T12:00:00 00:00",
        "2026-03-01T12:00:00.Z",
        "٢٠٢٦-03-01T12:00:00Z",
        "1772366400",
    ],
)
@pytest.mark.parametrize("state", ["starting", "active"])
async def test_heartbeat_with_malformed_expected_last_heartbeat_is_400(
    qoder_api: ApiClient, value: str, state: str
) -> None:
    work_id = await qoder_api.create_item_in_state(state)
    answer = await qoder_api.heartbeat(work_id, value)
    assert answer.status == 400
    assert answer.error["param"] == "expected_last_heartbeat"


@pytest.mark.parametrize(
    "value",
    [
        "2026-03-01T12:00:00Z",
        "2026-03-01T12:00:00.000000+00:00",
        "2026-03-01t12:00:00.000001z",
        "1999-12-31T23:59:60Z",
        "2026-03-01T12:00:00.123456789Z",
    ],
)
@pytest.mark.parametrize("state", ["starting", "active", "stopping"])
async def test_heartbeat_with_wrong_expected_last_heartbeat_is_412(
    qoder_api: ApiClient, value: str, state: str
) -> None:
    work_id = await qoder_api.create_item_in_state(state)
    answer = await qoder_api.heartbeat(work_id, value)
    assert answer.status == 412
    assert answer.error["type"] == "precondition_failed_error"
    assert await qoder_api.item_state(work_id) == state


@pytest.mark.parametrize("state", ["active", "stopping"])
async def test_repeated_first_heartbeat_is_412_with_current_state(
    qoder_api: ApiClient, state: str
) -> None:
    work_id = await qoder_api.create_item_in_state(state)
    answer = await qoder_api.heartbeat(work_id, "NO_HEARTBEAT")
    assert answer.status == 412
    assert answer.error["details"] == {
        "error_code": "heartbeat_precondition_failed",
        "current_state": {
            "last_heartbeat": "2026-03-01T12:00:00.000000Z",
            "lease_extended": False,
            "state": state,
            "ttl_seconds": 60,
        },
    }


async def test_refused_heartbeat_leaves_the_end_of_the_lease_unchanged(
    api: ApiClient, clock: ManualClock
) -> None:
    work_id = await api.create_item_in_state("active")
    clock.advance(59)
    assert (await api.heartbeat(work_id, "NO_HEARTBEAT")).status == 412
    clock.advance(1)
    assert await api.item_state(work_id) == "queued"


@pytest.mark.parametrize("state", ["queued", "stopped"])
@pytest.mark.parametrize("expected", [None, "NO_HEARTBEAT", "2026-03-01T12:00:00Z"])
async def test_heartbeat_of_queued_or_stopped_item_is_409(
    qoder_api: ApiClient, state: str, expected: str | None
) -> None:
    work_id = await qoder_api.create_item_in_state(state)
    answer = await qoder_api.heartbeat(work_id, expected)
    assert answer.status == 409
    assert answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize("expected", [None, "NO_HEARTBEAT", "2020-01-01T00:00:00.000000Z"])
async def test_anthropic_heartbeat_in_state_stopping_ignores_expected_last_heartbeat(
    anthropic_api: ApiClient, clock: ManualClock, expected: str | None
) -> None:
    work_id = await anthropic_api.create_item_in_state("stopping")
    clock.advance(59)
    answer = await anthropic_api.heartbeat(work_id, expected, 30)
    assert answer.status == 200
    assert answer.body == {
        "type": "work_heartbeat",
        "last_heartbeat": "2026-03-01T12:00:59.000000Z",
        "lease_extended": True,
        "state": "stopping",
        "ttl_seconds": 30,
    }
    clock.advance(29)
    assert await anthropic_api.item_state(work_id) == "stopping"


@pytest.mark.parametrize("expected", [None, "NO_HEARTBEAT", "2020-01-01T00:00:00.000000Z"])
async def test_anthropic_heartbeat_on_stopped_item_answers_state_and_changes_nothing(
    anthropic_api: ApiClient, clock: ManualClock, expected: str | None
) -> None:
    work_id = await anthropic_api.create_item_in_state("active")
    await anthropic_api.stop(work_id, json={"force": True})
    before, records = (await anthropic_api.get(work_id)).body, len(anthropic_api.plane.history)
    clock.advance(1)
    answer = await anthropic_api.heartbeat(work_id, expected)
    assert answer.status == 200
    assert answer.body == {
        "type": "work_heartbeat",
        "last_heartbeat": "2026-03-01T12:00:00.000000Z",
        "lease_extended": False,
        "state": "stopped",
        "ttl_seconds": 60,
    }
    assert (await anthropic_api.get(work_id)).body == before
    assert len(anthropic_api.plane.history) == records


async def test_anthropic_first_heartbeat_on_stopped_item_returns_empty_last_heartbeat(
    anthropic_api: ApiClient,
) -> None:
    work_id = await anthropic_api.create_item_in_state("stopped")
    answer = await anthropic_api.heartbeat(work_id, "NO_HEARTBEAT")
    assert (answer.status, answer.body["last_heartbeat"]) == (200, "")


@pytest.mark.parametrize("expected", [None, "NO_HEARTBEAT", "2020-01-01T00:00:00.000000Z"])
async def test_anthropic_heartbeat_on_queued_item_is_409(
    anthropic_api: ApiClient, expected: str | None
) -> None:
    work_id = await anthropic_api.create_item_in_state("queued")
    assert (await anthropic_api.heartbeat(work_id, expected)).status == 409


async def test_anthropic_heartbeat_with_wrong_expected_last_heartbeat_is_412(
    anthropic_api: ApiClient,
) -> None:
    work_id = await anthropic_api.create_item_in_state("active")
    assert (await anthropic_api.heartbeat(work_id, "NO_HEARTBEAT")).status == 412


@pytest.mark.parametrize("state", ["stopping", "stopped"])
async def test_anthropic_heartbeat_with_malformed_expected_heartbeat_is_400_in_every_state(
    anthropic_api: ApiClient, state: str
) -> None:
    work_id = await anthropic_api.create_item_in_state(state)
    assert (await anthropic_api.heartbeat(work_id, "yesterday")).status == 400


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_heartbeat_in_state_stopping_returns_that_state_and_extends_lease(
    api: ApiClient, clock: ManualClock
) -> None:
    work_id = await api.create_item_in_state("stopping")
    clock.advance(59)
    last = (await api.get(work_id)).body["latest_heartbeat_at"]
    answer = await api.heartbeat(work_id, last, 30)
    assert answer.status == 200
    assert (answer.body["state"], answer.body["lease_extended"]) == ("stopping", True)
    clock.advance(29.999)
    assert await api.item_state(work_id) == "stopping"
    clock.advance(0.001)
    assert await api.item_state(work_id) == "stopped"


async def test_first_heartbeat_after_stop_request_is_accepted(api: ApiClient) -> None:
    work_id = await api.create_item_in_state("starting")
    await api.stop(work_id)
    answer = await api.heartbeat(work_id, "NO_HEARTBEAT")
    assert (answer.status, answer.body["state"]) == (200, "stopping")


@pytest.mark.parametrize("name", ["expected_last_heartbeat", "desired_ttl_seconds"])
async def test_heartbeat_parameter_given_twice_is_400(api: ApiClient, name: str) -> None:
    work_id = await api.create_item_in_state("starting")
    url = api.work_url(f"/{work_id}/heartbeat")
    answer = await api("POST", url, params=[(name, "10"), (name, "10")])
    assert answer.status == 400
    assert answer.error["param"] == name
