"""The causes of alerts, each with the alerts that must fire and those that may fire.

A cause has a control plane, an environment and workers of its own, so that all of them run at the
same time. Numbers fit the default `lease_ttl` of 60 s and scrapes every 15 s. Before some causes, a
sleep of 45 s or 60 s lets Prometheus scrape the healthy worker about three times: the function
`increase` needs a value from before the first error.
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

    from tests.alerts.alert_cause_setup import AlertCauseSetup

PLUGIN = "tests.alerts.worker_handlers:"
MINUTE = 60.0


@dataclass(frozen=True)
class AlertCause:
    """A situation that makes alerts fire, with the names of these alerts.

    Attributes:
        begin: Starts workers and causes the situation.
        must: The alerts that must fire.
        may: Further alerts that are right, and may come late.
        settings: The settings of its workers, as variables without prefix.
        plugins: Further plugins of its workers.
    """

    begin: Callable[[AlertCauseSetup], Coroutine[Any, Any, None]]
    must: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    settings: Mapping[str, str] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()


async def start_idle_worker(setup: AlertCauseSetup) -> None:
    await setup.start_worker()


async def enqueue_burst(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    setup.enqueue_items(count=150)


async def kill_one_worker(setup: AlertCauseSetup) -> None:
    first = await setup.start_worker()
    await setup.start_worker()
    setup.enqueue_items(count=6, seconds="120")
    await setup.wait_for_claims(6)
    first.send_signal(signal.SIGKILL)


async def cause_outage(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    setup.enqueue_items(count=6, seconds="600")
    await setup.wait_for_claims(6)
    with setup.faults.add(silence(applied=False)):
        await asyncio.sleep(90)  # longer than `lease_ttl`, so that the leases expire


async def throttle_requests(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    setup.faults.add(status(429, retry_after=1), probability=0.5)


async def block_event_loop(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    setup.enqueue_items(do="block", seconds="45")


async def block_event_loop_often(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    setup.enqueue_items(do="block often")


async def inject_heartbeat_errors(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    setup.enqueue_items(count=6, seconds="600")
    await setup.wait_for_claims(6)
    setup.faults.add(status(503), "heartbeat")


async def enqueue_items_without_handler(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    setup.enqueue_items(count=40, kind="of another pool")


async def stop_items_as_operator(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    for item in setup.enqueue_items(count=4, seconds="600"):
        await setup.wait_for_claims(4)
        setup.plane.operations.stop_item(setup.environment, item.id, force=False)


async def roll_out_update(setup: AlertCauseSetup) -> None:
    old = [await setup.start_worker() for _ in range(2)]
    setup.enqueue_items(count=40, seconds="8")
    for process in old:
        await setup.start_worker()
        await asyncio.sleep(30)  # two scrapes with both the old and the new worker
        process.send_signal(signal.SIGTERM)


async def reject_credential_of_worker(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    await asyncio.sleep(60)
    setup.faults.add(status(401))


async def fail_sessions(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    for _ in range(60):
        setup.enqueue_items(do="fail")
        setup.enqueue_items()
        await asyncio.sleep(5)


async def stall_sessions(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    await asyncio.sleep(45)
    setup.enqueue_items(seconds="600")


async def make_handlers_hang(setup: AlertCauseSetup) -> None:
    process = await setup.start_worker()
    setup.enqueue_items(count=2, do="ignore cancellation")
    # The alert WorkpoolHandlersStuck must fire before the drain: `session_timeout` is 20 s, and the
    # alert waits for 2 min.
    await asyncio.sleep(5 * MINUTE)
    process.send_signal(signal.SIGTERM)


async def run_failing_plugin(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    await asyncio.sleep(60)
    setup.enqueue_items()


async def crash_poller(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    await asyncio.sleep(60)
    setup.enqueue_items()


async def enqueue_too_much_work(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    setup.enqueue_items(count=20, seconds="90")


async def inject_statistics_errors(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    await asyncio.sleep(45)
    setup.faults.add(status(500), "stats")


async def inject_poll_errors(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    await asyncio.sleep(45)
    setup.faults.add(status(502, html=True), "poll")


async def delay_acks(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    await setup.start_worker()
    setup.faults.add(delay(7.0), "ack", probability=0.5)
    for _ in range(300):
        setup.enqueue_items(count=2)
        await asyncio.sleep(2)


async def run_two_workers_under_light_load(setup: AlertCauseSetup) -> None:
    await setup.start_worker()
    await setup.start_worker()
    for _ in range(60):
        setup.enqueue_items(count=3, seconds="3")
        await asyncio.sleep(5)


def full_alert_names(*names: str) -> frozenset[str]:
    """Return the given alert names with the prefix `Workpool` added to each name."""
    return frozenset(f"Workpool{name}" for name in names)


CAUSES: Mapping[str, AlertCause] = {
    "idle": AlertCause(start_idle_worker),
    "burst": AlertCause(enqueue_burst),
    "kill -9 of one worker": AlertCause(kill_one_worker, full_alert_names("FewerWorkers")),
    "an outage of 90 s": AlertCause(cause_outage, full_alert_names("SessionsLost", "LeaseLate")),
    "throttled with 429": AlertCause(
        throttle_requests, full_alert_names("Throttled"), full_alert_names("StatsStale")
    ),
    "a handler blocks the loop": AlertCause(block_event_loop, full_alert_names("LoopBlocked")),
    "a handler blocks the loop often": AlertCause(
        block_event_loop_often, full_alert_names("LoopLag"), full_alert_names("LoopBlocked")
    ),
    "heartbeats fail": AlertCause(
        inject_heartbeat_errors, full_alert_names("SessionsLost", "LeaseLate")
    ),
    "items without a handler": AlertCause(
        enqueue_items_without_handler,
        full_alert_names("QueueNotTaken", "PollsWasted", "ItemsNotAcknowledged"),
    ),
    "an operator's stops": AlertCause(stop_items_as_operator),
    "a rolling update": AlertCause(roll_out_update),
    "a refused credential": AlertCause(
        reject_credential_of_worker,
        full_alert_names("Refused"),
        full_alert_names("NoSuccessfulPoll", "StatsStale"),
    ),
    "a handler fails": AlertCause(fail_sessions, full_alert_names("SessionsFail")),
    "a handler stalls": AlertCause(
        stall_sessions, full_alert_names("SessionsStall"), settings={"STALL_TIMEOUT": "20"}
    ),
    "a handler ignores cancellation": AlertCause(
        make_handlers_hang,
        full_alert_names("HandlersStuck", "DrainKilled"),
        full_alert_names("SessionsLost", "SessionsFail"),
        {"SESSION_TIMEOUT": "20", "DRAIN_TIMEOUT": "5"},
    ),
    "a plugin fails": AlertCause(
        run_failing_plugin, full_alert_names("PluginErrors"), plugins=(PLUGIN + "FailingObserver",)
    ),
    "a poller crashes": AlertCause(
        crash_poller,
        full_alert_names("PollerCrashed"),
        plugins=(PLUGIN + "PluginThatCrashesPoller",),
    ),
    "more work than slots": AlertCause(
        enqueue_too_much_work, full_alert_names("Backlog"), settings={"CONCURRENCY": "1"}
    ),
    "statistics fail": AlertCause(inject_statistics_errors, full_alert_names("StatsStale")),
    "statistics every 120 s": AlertCause(start_idle_worker, settings={"STATS_INTERVAL": "120"}),
    "no statistics": AlertCause(start_idle_worker, settings={"STATS_INTERVAL": "0"}),
    "polls fail": AlertCause(inject_poll_errors, full_alert_names("NoSuccessfulPoll")),
    "acks are late": AlertCause(
        delay_acks, full_alert_names("AckLate"), full_alert_names("QueueNotTaken", "Backlog")
    ),
    "two workers under light load": AlertCause(run_two_workers_under_light_load),
}
