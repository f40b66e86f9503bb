"""Pools in an application with eager tasks (Python 3.12 and later)."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Session, handler

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workpool.server import ControlPlane

pytestmark = [
    pytest.mark.usefixtures("eager_tasks"),
    pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks need Python 3.12 or later"),
]


@pytest.fixture
async def eager_tasks() -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory", None))
    yield
    loop.set_task_factory(before)


@handler
async def return_at_once(_: Session) -> dict[str, str]:
    return {"done": "yes"}


@handler
async def write_metadata_immediately(session: Session) -> dict[str, str]:
    await session.update_metadata({"done": "yes"})
    return {}


@pytest.mark.parametrize(
    "work", [return_at_once, write_metadata_immediately], ids=lambda work: work.__name__
)
async def test_session_can_be_used_at_once_by_handler_in_eager_task(
    control_plane: ControlPlane, make_pool: Any, work: Any
) -> None:
    items = control_plane.enqueue(20)
    async with asyncio.timeout(20):
        await make_pool(work).run(until_empty=True)
    for item in items:
        done = control_plane.operations.get_item(control_plane.environments[0], item.id)
        assert (done.state, dict(done.metadata)) == ("stopped", {"done": "yes"})
