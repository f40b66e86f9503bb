"""The item as a container sees it."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from workpool import WorkItem
from workpool_container.options import describe


@pytest.mark.parametrize(
    ("time", "text"),
    [(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05Z"), (None, None)],
)
def test_item_for_a_container_carries_its_creation_time_or_null(
    time: datetime | None, text: str | None
) -> None:
    item = WorkItem(
        id="work_1",
        type="session",
        session_id="sess_1",
        environment_id="env_1",
        state="starting",
        metadata={},
        created_at=time,
        acknowledged_at=None,
        started_at=None,
        latest_heartbeat_at=None,
        last_heartbeat=None,
        stop_requested_at=None,
        stopped_at=None,
    )
    assert json.loads(describe(item))["created_at"] == text
