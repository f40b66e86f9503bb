"""The causes of alerts, each with the alerts that it must fire and may fire.

A cause has a control plane, an environment and workers of its own, so that all of them run at the
same time. Numbers fit the default `lease_ttl` of 60 s and scrapes every 15 s.
"""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workpool.testing import delay, status
from workpool.testing.fault import silence

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from tests.alerts.cause_setup import CauseSetup

PLUGIN = "tests.alerts.worker_handlers:"
MINUTE = 60.0


@dataclass(frozen=True)
class Cause:
    """One cause.

    Attributes:
        begin: Causes the alert.
        must: The alerts that must fire.
        may: Further alerts that are right, and may come late.
        settings: The settings of its workers, as variables without prefix.
        plugins: Further plugins of its workers.
    """

    begin: Callable[[CauseSetup], Coroutine[Any, Any, None]]
    must: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    settings: Mapping[str, str] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()


async def idle(setup: CauseSetup) -> None:
    await setup.start_worker()


async def burst(setup: CauseSetup) -> None:
    await setup.start_worker()
    setup.enqueue(count=150)


async def kill_one(setup: CauseSetup) -> None:
    first = await setup.start_worker()
    await setup.start_worker()
    setup.enqueue(count=6, seconds="120")
    await setup.claimed(6)
    first.send_signal(signal.SIGKILL)


async def outage(setup: CauseSetup) -> None:
    await setup.start_worker()
    setup.enqueue(count=6, seconds="600")
    await setup.claimed(6)
    with setup.faults.add(silence(applied=False)):
        await asyncio.sleep(90)


async def throttling(setup: CauseSetup) -> None:
    await setup.start_worker()
    setup.faults.add(status(429, retry_after=1), probability=0.5)


async def blocking(setup: CauseSetup) -> None:
    await setup.start_worker()
    setup.enqueue(do="block", seconds="45")


async def blocking_often(setup: CauseSetup) -> None:
    await setup.start_worker()
    setup.enqueue(do="block often")


async def failing_heartbeats(setup: CauseSetup) -> None:
    await setup.start_worker()
    setup.enqueue(count=6, seconds="600")
    await setup.claimed(6)
    setup.faults.add(status(503), "heartbeat")


async def unwanted_items(setup: CauseSetup) -> None:
    await setup.start_worker()
    setup.enqueue(count=40, kind="of another pool")


async def operators_stop(setup: CauseSetup) -> None:
    await setup.start_worker()
    for item in setup.enqueue(count=4, seconds="600"):
        await setup.claimed(4)
        setup.plane.operations.stop(setup.environment, item.id, force=False)


async def rolling_update(setup: CauseSetup) -> None:
    old = [await setup.start_worker() for _ in range(2)]
    setup.enqueue(count=40, seconds="8")
    for process in old:
        await setup.start_worker()
        await asyncio.sleep(30)
        process.send_signal(signal.SIGTERM)


async def refused_credential(setup: CauseSetup) -> None:
    await setup.start_worker()
    await asyncio.sleep(60)
    setup.faults.add(status(401))


async def failing_handler(setup: CauseSetup) -> None:
    await setup.start_worker()
    for _ in range(60):
        setup.enqueue(do="fail")
        setup.enqueue()
        await asyncio.sleep(5)


async def stalling(setup: CauseSetup) -> None:
    await setup.start_worker()
    await asyncio.sleep(45)
    setup.enqueue(seconds="600")


async def stuck_handlers(setup: CauseSetup) -> None:
    process = await setup.start_worker()
    setup.enqueue(count=2, do="ignore cancellation")
    await asyncio.sleep(5 * MINUTE)
    process.send_signal(signal.SIGTERM)


async def failing_plugin(setup: CauseSetup) -> None:
    await setup.start_worker()
    await asyncio.sleep(60)
    setup.enqueue()


async def crashing_poller(setup: CauseSetup) -> None:
    await setup.start_worker()
    await asyncio.sleep(60)
    setup.enqueue()


async def too_much_work(setup: CauseSetup) -> None:
    await setup.start_worker()
    setup.enqueue(count=20, seconds="90")


async def failing_statistics(setup: CauseSetup) -> None:
    await setup.start_worker()
    await asyncio.sleep(45)
    setup.faults.add(status(500), "stats")


async def rare_statistics(setup: CauseSetup) -> None:
    await setup.start_worker()


async def failing_polls(setup: CauseSetup) -> None:
    await setup.start_worker()
    await asyncio.sleep(45)
    setup.faults.add(status(502, html=True), "poll")


async def late_acks(setup: CauseSetup) -> None:
    await setup.start_worker()
    await setup.start_worker()
    setup.faults.add(delay(7.0), "ack", probability=0.5)
    for _ in range(300):
        setup.enqueue(count=2)
        await asyncio.sleep(2)


async def two_pools(setup: CauseSetup) -> None:
    await setup.start_worker()
    await setup.start_worker()
    for _ in range(60):
        setup.enqueue(count=3, seconds="3")
        await asyncio.sleep(5)


def alerts(*names: str) -> frozenset[str]:
    """Return the full names of alerts."""
    return frozenset(f"Workpool{name}" for name in names)


CAUSES: Mapping[str, Cause] = {
    "idle": Cause(idle),
    "burst": Cause(burst),
    "kill -9 of one worker": Cause(kill_one, alerts("FewerWorkers")),
    "an outage of 90 s": Cause(outage, alerts("SessionsLost", "LeaseLate")),
    "throttled with 429": Cause(throttling, alerts("Throttled"), alerts("StatsStale")),
    "a handler blocks the loop": Cause(blocking, alerts("LoopBlocked")),
    "a handler blocks the loop often": Cause(
        blocking_often, alerts("LoopLag"), alerts("LoopBlocked")
    ),
    "heartbeats fail": Cause(failing_heartbeats, alerts("SessionsLost", "LeaseLate")),
    "unwanted items": Cause(
        unwanted_items, alerts("QueueNotTaken", "PollsWasted", "ItemsNotAcknowledged")
    ),
    "an operator's stops": Cause(operators_stop),
    "a rolling update": Cause(rolling_update),
    "a refused credential": Cause(
        refused_credential, alerts("Refused"), alerts("NoSuccessfulPoll", "StatsStale")
    ),
    "a handler fails": Cause(failing_handler, alerts("SessionsFail")),
    "a handler stalls": Cause(stalling, alerts("SessionsStall"), settings={"STALL_TIMEOUT": "20"}),
    "a handler ignores cancellation": Cause(
        stuck_handlers,
        alerts("HandlersStuck", "DrainKilled"),
        alerts("SessionsLost", "SessionsFail"),
        {"SESSION_TIMEOUT": "20", "DRAIN_TIMEOUT": "5"},
    ),
    "a plugin fails": Cause(
        failing_plugin, alerts("PluginErrors"), plugins=(PLUGIN + "FailingObserver",)
    ),
    "a poller crashes": Cause(
        crashing_poller, alerts("PollerCrashed"), plugins=(PLUGIN + "CrashingPoller",)
    ),
    "more work than slots": Cause(too_much_work, alerts("Backlog"), settings={"CONCURRENCY": "1"}),
    "statistics fail": Cause(failing_statistics, alerts("StatsStale")),
    "statistics every 120 s": Cause(rare_statistics, settings={"STATS_INTERVAL": "120"}),
    "no statistics": Cause(rare_statistics, settings={"STATS_INTERVAL": "0"}),
    "polls fail": Cause(failing_polls, alerts("NoSuccessfulPoll")),
    "acks are late": Cause(late_acks, alerts("AckLate"), alerts("QueueNotTaken", "Backlog")),
    "two pools on one environment": Cause(two_pools),
}
