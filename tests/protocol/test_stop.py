"""Stop calls for items, and the answers to these calls in both dialects.

See workpool/docs/protocol.md, "Stop".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.manual_clock import ManualClock
    from tests.protocol.conftest import ApiClient

STOP_RESULTS = [
    (False, "queued", "stopped"),
    (False, "starting", "stopping"),
    (False, "active", "stopping"),
    (False, "stopping", "stopped"),
    (False, "stopped", "stopped"),
    (True, "queued", "stopped"),
    (True, "starting", "stopped"),
    (True, "active", "stopped"),
    (True, "stopping", "stopped"),
    (True, "stopped", "stopped"),
]
"""Whether a stop has `force`, the state before the stop, and the state after it."""
ANTHROPIC_CONFLICTS = [(False, "stopping"), (False, "stopped"), (True, "stopped")]


@pytest.mark.usefixtures("memory_and_sqlite_stores")
@pytest.mark.parametrize(("force", "state", "after"), STOP_RESULTS)
async def test_stop_of_item_in_each_state_has_documented_result(
    qoder_api: ApiClient, clock: ManualClock, state: str, after: str, *, force: bool
) -> None:
    work_id = await qoder_api.create_item_in_state(state)
    before = (await qoder_api.get(work_id)).body
    clock.advance(3)
    answer = await qoder_api.stop(work_id, json={"force": force})
    assert answer.status == 200
    now = "2026-03-01T12:00:03Z"
    expected = {**before, "state": after}
    if state != "stopped":
        expected["stopped_at" if after == "stopped" else "stop_requested_at"] = now
    assert answer.body == expected
    assert (await qoder_api.get(work_id)).body == expected


@pytest.mark.usefixtures("memory_and_sqlite_stores")
@pytest.mark.parametrize(("force", "state", "after"), STOP_RESULTS)
async def test_anthropic_stop_call_is_answered_409_if_item_state_conflicts_and_204_otherwise(
    anthropic_api: ApiClient, state: str, after: str, *, force: bool
) -> None:
    work_id = await anthropic_api.create_item_in_state(state)
    answer = await anthropic_api.stop(work_id, json={"force": force})
    if (force, state) in ANTHROPIC_CONFLICTS:
        assert answer.status == 409
        assert answer.error["type"] == "invalid_request_error"
        assert await anthropic_api.item_state(work_id) == state
    else:
        assert (answer.status, answer.body) == (204, None)
        assert await anthropic_api.item_state(work_id) == after


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"force": null}', b'{"force": false}', b' {"other": 1} ']
)
async def test_stop_without_force_changes_state_of_active_item_to_stopping(
    api: ApiClient, body: bytes
) -> None:
    work_id = await api.create_item_in_state("active")
    assert (await api.stop(work_id, data=body)).status in {200, 204}
    assert await api.item_state(work_id) == "stopping"


@pytest.mark.parametrize(
    "body",
    [
        b'{"force": 1}',
        b'{"force": "true"}',
        b'{"force": []}',
        b'{"force": {}}',
        b"null",
        b"true",
        b"[]",
        b'"force"',
        b"1",
        b"{",
        b" ",
        b"\xff",
        b'{"force": NaN}',
        b"\xef\xbb\xbf{}",
        b'{"force": true} x',
    ],
)
async def test_malformed_stop_body_is_400_and_stops_nothing(api: ApiClient, body: bytes) -> None:
    work_id = await api.create_item_in_state("active")
    answer = await api.stop(work_id, data=body)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert await api.item_state(work_id) == "active"


async def test_delivered_item_that_was_stopped_is_not_redelivered(
    api: ApiClient, clock: ManualClock
) -> None:
    api.plane.enqueue()
    item = await api.claim_item()
    await api.stop(item["id"])
    assert await api.item_state(item["id"]) == "stopped"
    clock.advance(5)
    assert (await api.poll()).body is None
    assert (await api.queue_stats())["pending"] == 0
