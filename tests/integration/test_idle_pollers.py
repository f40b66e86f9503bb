"""Pollers of an idle pool: one polls, and the others wait until items arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.integration.condition_polling import wait_until
from workpool import Session, handler
from workpool.events import PollersScaled, SessionFinished

if TYPE_CHECKING:
    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder

POLLERS = 4


@handler
async def return_at_once(_: Session) -> None:
    pass


async def test_idle_pool_keeps_one_poll_in_flight_and_resumes_pollers_when_items_arrive(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    (environment_id,) = control_plane.environments
    async with make_pool(return_at_once, pollers=POLLERS, block_ms=200) as supervisor:

        def read_metric_value(name: str, **labels: str) -> float | None:
            labels["environment_id"] = environment_id
            found: float | None = supervisor.registry.get_sample_value(f"workpool_{name}", labels)
            return found

        await recorder.wait_for(PollersScaled, count=POLLERS - 1)
        assert read_metric_value("pollers_target") == 1
        await wait_until(lambda: read_metric_value("pollers", state="paused") == POLLERS - 1)
        asked = len(faults.of("poll"))
        for more in range(1, 4):
            await faults.wait_for("poll", count=asked + more)
            assert sum(poll.status is None for poll in faults.of("poll")) <= 1
        assert read_metric_value("pollers", state="paused") == POLLERS - 1

        control_plane.enqueue(3)
        await recorder.wait_for(SessionFinished, count=3)
        up = await recorder.wait_for(PollersScaled, count=POLLERS)
        assert (up.direction, up.reason, up.target) == ("up", "hits", 2)
        assert read_metric_value("poller_scale_events_total", direction="up", reason="hits")
