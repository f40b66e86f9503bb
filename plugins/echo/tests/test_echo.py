"""The example plugin through `workpool`'s public names only, as its authors' tests should be."""

import asyncio
from datetime import UTC, datetime

import pytest

from workpool import Release, Session, WorkItem
from workpool_echo import echo


class Lease:
    """A lease that holds. The handler under test writes nothing through it."""

    remaining = 60.0

    def check(self) -> None: ...

    async def update_metadata(self, patch: object) -> WorkItem:
        raise AssertionError(f"echo wrote {patch}")


def make_session(metadata: dict[str, str]) -> Session:
    now = datetime.now(UTC)
    item = WorkItem(
        id="work_1",
        type="session",
        session_id="sess_1",
        environment_id="env_1",
        state="starting",
        metadata=metadata,
        created_at=now,
        acknowledged_at=now,
        started_at=None,
        latest_heartbeat_at=None,
        last_heartbeat=None,
        stop_requested_at=None,
        stopped_at=None,
    )
    return Session(item, Lease(), redelivered=False)


async def test_gives_the_text_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "workpool.session")

    assert await echo(make_session({"text": "hi", "seconds": "0"})) == {"echo": "hi"}

    assert caplog.messages == ["echo: 'hi' started", "echo: 'hi' done"]


async def test_says_hello_when_nothing_was_sent() -> None:
    assert await echo(make_session({"seconds": "0"})) == {"echo": "hello"}


async def test_ends_at_once_when_an_operator_stops_the_session() -> None:
    session = make_session({"seconds": "3600"})
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        running = group.create_task(echo(session))
        session.interrupt(stopping=True)
    assert running.result() == {"echo": "stopped early"}


async def test_gives_the_item_back_when_the_pool_drains() -> None:
    session = make_session({"seconds": "3600"})
    session.interrupt(draining=True)
    async with asyncio.timeout(10):
        with pytest.raises(Release, match="draining"):
            await echo(session)


async def test_a_bad_number_fails_the_session() -> None:
    with pytest.raises(ValueError, match="soon"):
        await echo(make_session({"seconds": "soon"}))
