"""A start that fails raises its error, sends no request, and leaves nothing behind."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from workpool import Session, Supervisor, WorkClient, handler
from workpool.errors import RegistryError

if TYPE_CHECKING:
    from workpool import Settings
    from workpool.testing import Faults


@handler
async def return_at_once(_: Session) -> None:
    return None


@pytest.mark.parametrize("number", [1, 2])
async def test_connect_function_that_raises_prevents_start_and_leaves_no_thread(
    make_settings: Any, faults: Faults, number: int
) -> None:
    made: list[WorkClient] = []

    def failing_connect(settings: Settings) -> WorkClient:
        if len(made) == number - 1:
            raise LookupError("no such vault")
        made.append(WorkClient(settings))
        return made[-1]

    registry = CollectorRegistry()
    supervisor = Supervisor(
        make_settings(), plugins=[return_at_once], registry=registry, connect=failing_connect
    )
    with pytest.raises(LookupError, match="no such vault"):
        await supervisor.__aenter__()
    assert not supervisor.status().ready
    assert not faults.seen
    assert not [each for each in threading.enumerate() if each.name.startswith("workpool")]
    assert "workpool_slots_limit{" not in generate_latest(registry).decode()
    async with Supervisor(make_settings(), plugins=[return_at_once], registry=registry) as another:
        assert another.status().capacity


async def test_registry_with_conflicting_metric_name_prevents_start(
    make_settings: Any, faults: Faults
) -> None:
    registry = CollectorRegistry()
    foreign_counter = Counter("workpool_polls_total", "Somebody else's.", registry=registry)
    with pytest.raises(RegistryError, match="workpool_polls"):
        await Supervisor(make_settings(), plugins=[return_at_once], registry=registry).__aenter__()
    assert not faults.seen
    registry.unregister(foreign_counter)
    async with Supervisor(
        make_settings(), plugins=[return_at_once], registry=registry
    ) as supervisor:
        assert "workpool_slots_limit{" in generate_latest(supervisor.registry).decode()
