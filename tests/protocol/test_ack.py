"""The acknowledgement of an item.

See workpool/docs/protocol.md, "Acknowledge".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.manual_clock import ManualClock
    from tests.protocol.conftest import ApiClient


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_ack_moves_item_from_queued_to_starting(api: ApiClient, clock: ManualClock) -> None:
    api.plane.enqueue()
    item = await api.claim_item(worker="a")
    clock.advance(2.75)
    answer = await api.ack(item["id"], worker="a")
    assert answer.status == 200
    assert answer.body == {
        **item,
        "state": "starting",
        "acknowledged_at": "2026-03-01T12:00:02Z",
    }


@pytest.mark.usefixtures("memory_and_sqlite_stores")
@pytest.mark.parametrize("state", ["starting", "active"])
async def test_repeated_ack_changes_nothing(api: ApiClient, clock: ManualClock, state: str) -> None:
    work_id = await api.create_item_in_state(state, "a")
    before = (await api.get(work_id)).body
    clock.advance(59)
    answer = await api.ack(work_id, worker="a")
    assert (answer.status, answer.body) == (200, before)
    clock.advance(1)  # the lease ends after 60 s, because the repeated ack did not extend it
    assert await api.item_state(work_id) == "queued"


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_item_that_was_never_delivered_can_be_acknowledged_by_any_worker(
    api: ApiClient,
) -> None:
    (item,) = api.plane.enqueue()
    assert (await api.ack(item.id, worker="anyone")).status == 200
    assert (await api.poll()).body is None


@pytest.mark.parametrize(
    ("polled_by", "acked_by", "status"),
    [("a", "a", 200), ("a", "b", 409), ("a", None, 200), (None, "b", 200), (None, None, 200)],
)
async def test_ack_by_worker_that_did_not_receive_item_is_409(
    api: ApiClient, polled_by: str | None, acked_by: str | None, status: int
) -> None:
    api.plane.enqueue()
    item = await api.claim_item(worker=polled_by)
    answer = await api.ack(item["id"], worker=acked_by)
    assert answer.status == status
    if status == 409:
        assert answer.error["type"] == "invalid_request_error"
        assert await api.item_state(item["id"]) == "queued"


@pytest.mark.parametrize("state", ["starting", "active"])
async def test_ack_of_item_held_by_another_worker_is_409(api: ApiClient, state: str) -> None:
    work_id = await api.create_item_in_state(state, "a")
    assert (await api.ack(work_id, worker="b")).status == 409


@pytest.mark.usefixtures("memory_and_sqlite_stores")
async def test_ack_by_former_worker_after_redelivery_is_409(
    api: ApiClient, clock: ManualClock
) -> None:
    api.plane.enqueue()
    item = await api.claim_item(worker="a")
    clock.advance(5)
    assert (await api.claim_item(worker="b"))["id"] == item["id"]
    assert (await api.ack(item["id"], worker="a")).status == 409
    assert (await api.ack(item["id"], worker="b")).status == 200


async def test_late_ack_is_accepted_if_item_was_not_redelivered(
    api: ApiClient, clock: ManualClock
) -> None:
    api.plane.enqueue()
    item = await api.claim_item(worker="a")
    clock.advance(3600)
    assert (await api.ack(item["id"], worker="a")).status == 200


@pytest.mark.parametrize("state", ["stopping", "stopped"])
async def test_ack_is_409_if_item_is_in_state_stopping_or_stopped(
    api: ApiClient, state: str
) -> None:
    work_id = await api.create_item_in_state(state)
    answer = await api.ack(work_id)
    assert answer.status == 409
    assert answer.error["type"] == "invalid_request_error"


async def test_anthropic_ack_without_worker_id_but_with_body_is_accepted(api: ApiClient) -> None:
    api.plane.enqueue()
    item = await api.claim_item(worker="a")
    assert (await api.ack(item["id"], json={})).status == 200
