"""The acknowledgement of an item.

See workpool/docs/protocol.md, "Acknowledge".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.protocol.conftest import Api, Clock


@pytest.mark.usefixtures("both_stores")
async def test_ack_moves_queued_to_starting(api: Api, clock: Clock) -> None:
    api.plane.enqueue()
    item = await api.claim(worker="a")
    clock.advance(2.75)
    answer = await api.ack(item["id"], worker="a")
    assert answer.status == 200
    assert answer.body == {
        **item,
        "state": "starting",
        "acknowledged_at": "2026-03-01T12:00:02Z",
    }


@pytest.mark.usefixtures("both_stores")
@pytest.mark.parametrize("state", ["starting", "active"])
async def test_a_repeated_ack_changes_nothing(api: Api, clock: Clock, state: str) -> None:
    work_id = await api.bring_to(state, "a")
    before = (await api.get(work_id)).body
    clock.advance(59)
    answer = await api.ack(work_id, worker="a")
    assert (answer.status, answer.body) == (200, before)
    clock.advance(1)  # 60 s since the ack or the heartbeat: the repeated ack prolonged nothing
    assert await api.state(work_id) == "queued"


@pytest.mark.usefixtures("both_stores")
async def test_never_delivered_may_be_acked_by_anyone(api: Api) -> None:
    (item,) = api.plane.enqueue()
    assert (await api.ack(item.id, worker="anyone")).status == 200
    assert (await api.poll()).body is None


@pytest.mark.parametrize(
    ("polled_by", "acked_by", "status"),
    [("a", "a", 200), ("a", "b", 409), ("a", None, 200), (None, "b", 200), (None, None, 200)],
)
async def test_only_two_different_worker_ids_conflict(
    api: Api, polled_by: str | None, acked_by: str | None, status: int
) -> None:
    api.plane.enqueue()
    item = await api.claim(worker=polled_by)
    answer = await api.ack(item["id"], worker=acked_by)
    assert answer.status == status
    if status == 409:
        assert answer.error["type"] == "invalid_request_error"
        assert await api.state(item["id"]) == "queued"


@pytest.mark.parametrize("state", ["starting", "active"])
async def test_an_item_that_another_worker_holds_is_409(api: Api, state: str) -> None:
    work_id = await api.bring_to(state, "a")
    assert (await api.ack(work_id, worker="b")).status == 409


@pytest.mark.usefixtures("both_stores")
async def test_the_former_deliverees_ack_is_409_once_redelivered(api: Api, clock: Clock) -> None:
    api.plane.enqueue()
    item = await api.claim(worker="a")
    clock.advance(5)
    assert (await api.claim(worker="b"))["id"] == item["id"]
    assert (await api.ack(item["id"], worker="a")).status == 409
    assert (await api.ack(item["id"], worker="b")).status == 200


async def test_a_late_ack_that_nobody_overtook_is_fine(api: Api, clock: Clock) -> None:
    api.plane.enqueue()
    item = await api.claim(worker="a")
    clock.advance(3600)
    assert (await api.ack(item["id"], worker="a")).status == 200


@pytest.mark.parametrize("state", ["stopping", "stopped"])
async def test_a_stopping_or_stopped_item_is_409(api: Api, state: str) -> None:
    work_id = await api.bring_to(state)
    answer = await api.ack(work_id)
    assert answer.status == 409
    assert answer.error["type"] == "invalid_request_error"


async def test_the_sibling_sdk_acks_without_a_worker_id_but_with_a_body(api: Api) -> None:
    api.plane.enqueue()
    item = await api.claim(worker="a")
    assert (await api.ack(item["id"], json={})).status == 200
