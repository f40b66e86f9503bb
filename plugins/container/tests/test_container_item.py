"""The item as a container sees it, and a session that the worker has no resources for."""

from __future__ import annotations

import errno
import json
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from workpool import Release, WorkItem
from workpool.errors import exhausted
from workpool_container import Container
from workpool_container.options import describe
from workpool_container.run import Run


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


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "x"), MemoryError()], ids=repr)
async def test_session_is_released_when_the_machine_has_run_out_of_resources(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def refuse(_run: Run) -> None:
        raise error

    monkeypatch.setattr(Run, "complete", refuse)
    monkeypatch.setattr(Container, "_engine", None, raising=False)
    session: Any = SimpleNamespace(item=SimpleNamespace(id="work_1"))
    with pytest.raises(Release) as raised:
        await Container(image="agent")._run(session)
    assert exhausted(raised.value)
