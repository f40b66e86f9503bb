"""Regression tests for errors that the simulation found. A docstring describes the former error."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.simulation.finished_simulation import START
from tests.simulation.simulated_world import ENVIRONMENT
from workpool import Session, Settings, handler
from workpool.errors import HandoverError
from workpool.events import (
    AckFinished,
    DrainFinished,
    HeartbeatFinished,
    ItemReceived,
    SessionFinished,
    SessionStarted,
    StopRequested,
)
from workpool.hookspecs import hookimpl
from workpool.pool.handler_health import FAILURES
from workpool.server import Operations, Poll
from workpool.testing import Recorder
from workpool.testing.fault import Fault
from workpool.testing.local_client import FaultScript, LocalClient
from workpool.testing.loop_supervisor import ThreadlessSupervisor
from workpool.testing.virtual_time import VirtualLoop, in_virtual_time
from workpool.wire.protocol import NO_HEARTBEAT

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.events import Event
    from workpool.server import Item
    from workpool.testing.fault_rules import Request


@handler
async def work_for_one_second(session: Session) -> dict[str, str]:
    await asyncio.sleep(1)
    return {"seen": session.id}


@handler
async def ignore_cancellation(_: Session) -> None:
    until = asyncio.get_running_loop().time() + 60
    while asyncio.get_running_loop().time() < until:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(1)


class PoolTestbed:
    """A pool in virtual time, with the faults of its calls and a recorder of its events."""

    def __init__(
        self,
        script: Callable[[Request], Fault | None],
        plugin: object = work_for_one_second,
        observer: object = None,
        operations: Operations | None = None,
        **values: Any,
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop = loop
        self.operations = operations or Operations(
            [ENVIRONMENT], now=lambda: START + loop.wall_time()
        )
        self.recorder = Recorder()
        settings = Settings(
            environment_id=ENVIRONMENT, token=ENVIRONMENT, stats_interval=0, **values
        )
        self.supervisor = ThreadlessSupervisor(
            settings,
            plugins=[plugin, self.recorder, *([observer] if observer else [])],
            connect=partial(LocalClient, self.operations, faults=script),
        )

    @property
    def session_outcomes(self) -> list[str]:
        return [event.outcome for event in self.recorder.of(SessionFinished)]


@in_virtual_time
async def test_drain_does_not_wait_for_ack_with_long_retry_after() -> None:
    """Formerly the drain waited for the ack until the drain timeout, and abandoned the session."""
    refusal = Fault(answer=503, applied=False, retry_after=40)
    bench = PoolTestbed(FaultScript(ack=[refusal]), drain_timeout=10)
    async with bench.supervisor as pool:
        bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(ItemReceived)
        await asyncio.sleep(1)
        began = bench.loop.time()
        await pool.drain()
        assert bench.loop.time() - began < 1
    assert pool.abandoned == 0
    assert [event.result for event in bench.recorder.of(AckFinished)] == ["error"]


@in_virtual_time
async def test_drain_releases_session_whose_first_heartbeat_got_a_long_retry_after() -> None:
    """Formerly the drain abandoned the session, and its item was not released."""
    script = FaultScript(heartbeat=[Fault(answer=429, applied=False, retry_after=40)])
    bench = PoolTestbed(script, drain_timeout=1)
    async with bench.supervisor as pool:
        (item,) = bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(AckFinished)
        await asyncio.sleep(1)
        await pool.drain()
    assert pool.abandoned == 0
    assert (bench.session_outcomes, bench.recorder.of(DrainFinished)[0].result) == (
        ["released"],
        "clean",
    )
    assert script.sent.count(("heartbeat", item.id)) == 2
    held = bench.operations.get_item(ENVIRONMENT, item.id)
    assert held.lease_end is not None
    # A release requests the shortest lease that the control plane grants, which is 10 s.
    assert held.lease_end <= (START + 1 + 10.1) * 1_000_000


@in_virtual_time
async def test_second_heartbeat_waits_for_answer_to_first_if_drain_begins_meanwhile() -> None:
    script = FaultScript(heartbeat=[Fault(request_delay=4, answer_delay=4)])
    bench = PoolTestbed(script, drain_timeout=20)
    async with bench.supervisor as pool, asyncio.TaskGroup() as group:
        (item,) = bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(AckFinished)
        group.create_task(pool.drain())
        await asyncio.sleep(7.9)
        assert script.sent.count(("heartbeat", item.id)) == 1
    assert (bench.session_outcomes, pool.abandoned) == (["released"], 0)
    assert script.sent.count(("heartbeat", item.id)) == 2


@in_virtual_time
async def test_outcome_is_lost_lease_if_control_plane_rejects_stop_until_lease_expires() -> None:
    """Formerly the session counted as completed, although its item was queued and run again."""
    script = FaultScript(stop=[Fault(answer=429, applied=False, retry_after=30)])
    bench = PoolTestbed(script, lease_ttl=10)
    async with bench.supervisor:
        (item,) = bench.operations.enqueue(ENVIRONMENT)
        # By 1.5 s the handler has returned, and the pool's first stop was answered with 429.
        await asyncio.sleep(1.5)
        queue = bench.operations.get_queue(ENVIRONMENT)
        queue.put_item(replace(queue.get_item(item.id), lease_end=0))
        await bench.recorder.wait_for(SessionFinished, count=2, timeout=60)
    assert bench.session_outcomes == ["lease_lost", "completed"]
    assert bench.operations.get_item(ENVIRONMENT, item.id).state == "stopped"


@in_virtual_time
async def test_abandoned_session_counts_as_stopped_if_operator_stopped_its_item() -> None:
    """Formerly the session counted as `released`, but a stopped item is not delivered again."""
    bench = PoolTestbed(FaultScript(), ignore_cancellation, lease_ttl=10)
    async with bench.supervisor as pool:
        (item,) = bench.operations.enqueue(ENVIRONMENT)
        await asyncio.sleep(1)
        bench.operations.stop_item(ENVIRONMENT, item.id, "operator", force=True)
        await asyncio.sleep(4)  # wait for a heartbeat, whose answer reports the stop
        await pool.drain(0)
    assert (bench.session_outcomes, pool.abandoned) == (["stopped"], 1)


@in_virtual_time
async def test_pool_reports_stop_request_that_arrives_in_answer_to_first_heartbeat() -> None:
    """Formerly a stop request was reported only if the answer to a later heartbeat contained it."""
    bench = PoolTestbed(FaultScript(heartbeat=[Fault(request_delay=1)]))
    async with bench.supervisor:
        (item,) = bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(AckFinished)
        await asyncio.sleep(0.5)
        bench.operations.stop_item(ENVIRONMENT, item.id, "operator", force=False)
        await bench.recorder.wait_for(SessionFinished)
    assert bench.session_outcomes == ["stopped"]
    assert len(bench.recorder.of(StopRequested)) == 1


@in_virtual_time
async def test_short_session_claimed_after_machine_pause_needs_only_one_heartbeat() -> None:
    """Formerly a pause of the machine before the claim made the pool send a second heartbeat.

    The first write for the item found a pause that the lease had not seen, and waited for a
    heartbeat.
    """
    script = FaultScript()
    bench = PoolTestbed(script)
    async with bench.supervisor:
        bench.loop.pause(60)
        await asyncio.sleep(20)
        (item,) = bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(SessionFinished)
    assert script.sent.count(("heartbeat", item.id)) == 1


@in_virtual_time
async def test_write_after_machine_pause_verifies_the_lease_at_once() -> None:
    """Formerly the write waited some seconds for the periodic heartbeat that verifies the lease."""
    bench = PoolTestbed(FaultScript())
    async with bench.supervisor:
        bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(SessionStarted)
        began = bench.loop.time()
        await asyncio.sleep(0.99)
        bench.loop.pause(5)
        await bench.recorder.wait_for(SessionFinished)
        assert bench.loop.time() - began < 2
    assert bench.session_outcomes == ["completed"]


@handler
async def hand_off_after_pause(session: Session) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.pause(5)
    with suppress(HandoverError):
        async with session.handover():
            pass


@in_virtual_time
async def test_handoff_after_machine_pause_succeeds_because_heartbeat_verifies_lease() -> None:
    """Formerly a handoff after a pause failed, although its first heartbeat verifies the lease."""
    bench = PoolTestbed(FaultScript(), hand_off_after_pause, lease_ttl=10)
    async with bench.supervisor:
        bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(SessionFinished, timeout=60)
    assert bench.session_outcomes == ["completed"]


@in_virtual_time
async def test_first_heartbeat_is_not_sent_if_machine_paused_after_the_ack() -> None:
    """Formerly the pool sent a heartbeat that could extend the lease of another worker.

    The first heartbeat of a lease names no earlier one, so the control plane accepts it.
    """
    script = FaultScript(heartbeat=[Fault(wait=3)])
    bench = PoolTestbed(script, drain_timeout=0)
    async with bench.supervisor:
        (item,) = bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(AckFinished)
        await asyncio.sleep(1)
        bench.loop.pause(60)
        bench.operations.ack_item(ENVIRONMENT, item.id, "another worker")
        await bench.recorder.wait_for(SessionFinished)
        assert not any(record.kind == "heartbeat" for record in bench.operations.history)
    assert bench.session_outcomes[0] == "lease_lost"


@in_virtual_time
async def test_handler_does_not_start_if_lease_began_before_machine_pause() -> None:
    """Formerly the handler started, although its lease had expired during the pause.

    The lease clock does not count the time of a pause.
    """
    bench = PoolTestbed(FaultScript(heartbeat=[Fault(answer_delay=3)]), drain_timeout=0)
    async with bench.supervisor:
        bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(AckFinished)
        await asyncio.sleep(1)
        bench.loop.pause(120)
        await bench.recorder.wait_for(SessionFinished)
        assert bench.recorder.of(SessionStarted) == []
    assert bench.session_outcomes[0] == "lease_lost"


class MachinePausingPlugin:
    """A plugin that suspends or pauses the machine just before the handler's first step."""

    def __init__(self, *, unseen: bool = False) -> None:
        self.unseen = unseen

    @hookimpl
    def workpool_event(self, event: Event) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        if isinstance(event, HeartbeatFinished) and not (loop.slept or loop.paused):
            loop.call_soon(loop.pause if self.unseen else loop.suspend, 120)


@in_virtual_time
async def test_handler_does_not_start_after_machine_slept_longer_than_the_lease() -> None:
    """Formerly the handler started although its lease had ended while the machine slept.

    The lease was checked only before the handler's task was created. The machine can sleep between
    the creation of the task and the start of the handler, and another worker can then run the item.
    """
    bench = PoolTestbed(FaultScript(), observer=MachinePausingPlugin())
    async with bench.supervisor:
        bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(SessionFinished)
        assert bench.recorder.of(SessionStarted) == []
    assert bench.session_outcomes[0] == "lease_lost"


@in_virtual_time
async def test_heartbeat_whose_answer_arrives_after_machine_pause_is_repeated_at_once() -> None:
    """Formerly the pool trusted the answer, although the heartbeat was sent before the pause."""
    script = FaultScript(heartbeat=[None, Fault(answer_delay=8)])
    bench = PoolTestbed(script, ignore_cancellation, lease_ttl=60)
    async with bench.supervisor as pool:
        (item,) = bench.operations.enqueue(ENVIRONMENT)
        await asyncio.sleep(20.5)  # the second heartbeat is in flight: its answer takes 8 s
        assert script.sent.count(("heartbeat", item.id)) == 2
        bench.loop.pause(5)
        await asyncio.sleep(8)
        assert script.sent.count(("heartbeat", item.id)) == 3
        await pool.drain(0)


class OperationsThatAcceptAnyHeartbeatOfStoppingItem(Operations):
    """Operations that accept outdated heartbeats of `stopping` items, as `anthropic` does."""

    def heartbeat(self, *values: Any, **named: Any) -> Item:
        return super().heartbeat(*values, **named | {"compare_on_stop": False})


@in_virtual_time
async def test_pool_does_not_stop_item_that_another_worker_took_during_machine_pause() -> None:
    """Formerly a successful heartbeat after the pause made the pool treat the item as its own.

    The other worker owns the item, and an operator has asked to stop it.
    """
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    operations = OperationsThatAcceptAnyHeartbeatOfStoppingItem(
        [ENVIRONMENT], now=lambda: START + loop.wall_time()
    )
    bench = PoolTestbed(FaultScript(), operations=operations, concurrency=1)
    async with bench.supervisor:
        (item,) = operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(SessionStarted)
        loop.pause(120)
        assert operations.poll(ENVIRONMENT, Poll(worker_id="rival")) is not None
        operations.ack_item(ENVIRONMENT, item.id, "rival")
        operations.heartbeat(ENVIRONMENT, item.id, NO_HEARTBEAT, worker_id="rival")
        operations.stop_item(ENVIRONMENT, item.id)
        await bench.recorder.wait_for(SessionFinished)
        assert operations.get_item(ENVIRONMENT, item.id).state == "stopping"
    assert bench.session_outcomes == ["lease_lost"]


@in_virtual_time
async def test_drain_after_machine_pause_writes_no_metadata_to_lost_item() -> None:
    """Formerly the drain wrote a release mark to the item, which another worker had taken over.

    A release mark says that a run was released and is no attempt, so the run of the other worker
    did not count as an attempt.
    """
    bench = PoolTestbed(FaultScript(ack=[Fault(answer_delay=7)]))
    async with bench.supervisor as pool, asyncio.TaskGroup() as group:
        (item,) = bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(ItemReceived)
        await asyncio.sleep(1)
        group.create_task(pool.drain())
        bench.loop.pause(100)
        bench.operations.ack_item(ENVIRONMENT, item.id, "another worker")
        await bench.recorder.wait_for(SessionFinished)
    assert bench.session_outcomes == ["lease_lost"]
    assert not any(record.kind == "metadata" for record in bench.operations.history)


@in_virtual_time
async def test_handler_does_not_start_after_machine_was_paused_during_claim() -> None:
    """Formerly the handler started, although its lease had expired during the pause.

    The lease clock does not count the time of a pause.
    """
    bench = PoolTestbed(FaultScript(), observer=MachinePausingPlugin(unseen=True))
    async with bench.supervisor:
        bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(SessionFinished)
        assert bench.recorder.of(SessionStarted) == []
    assert bench.session_outcomes[0] == "lease_lost"


@in_virtual_time
async def test_completion_after_machine_pause_is_sent_as_soon_as_lease_is_verified() -> None:
    """Formerly the completion was sent up to 3 s later, after the pause between two tries."""
    script = FaultScript(heartbeat=[None, Fault(request_delay=0.001, answer_delay=8)])
    bench = PoolTestbed(script, lease_ttl=60)
    async with bench.supervisor:
        (item,) = bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(SessionStarted)
        bench.loop.pause(5)
        await bench.recorder.wait_for(HeartbeatFinished, count=2)
        verified_at = bench.loop.time()
        await bench.recorder.wait_for(SessionFinished)
        assert bench.loop.time() - verified_at < 0.01
    assert bench.session_outcomes == ["completed"]
    assert bench.operations.get_item(ENVIRONMENT, item.id).state == "stopped"


@in_virtual_time
async def test_item_whose_first_ack_got_lost_is_completed_after_machine_slept() -> None:
    """Formerly the pool counted the lease from the first ack, so it gave up the acknowledged item.

    No worker could claim the item for another 60 s, and its next run was its second attempt.
    """
    bench = PoolTestbed(FaultScript(ack=[Fault(answer="reset", applied=False), Fault(wait=1)]))
    async with bench.supervisor:
        (item,) = bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(ItemReceived)
        await asyncio.sleep(0.9)  # the second ack now waits in the client before it is sent
        bench.loop.suspend(60)
        await bench.recorder.wait_for(SessionFinished, timeout=60)
        assert bench.loop.time() < 30
    assert bench.session_outcomes == ["completed"]
    assert [event.result for event in bench.recorder.of(AckFinished)] == ["error", "ok"]
    assert not bench.recorder.of(SessionFinished)[0].session.redelivered
    assert bench.operations.get_item(ENVIRONMENT, item.id).state == "stopped"


@handler
async def work_for_five_seconds(_: Session) -> dict[str, str]:
    await asyncio.sleep(5)
    return {"seen": "once"}


@in_virtual_time
async def test_unanswered_completion_request_is_retried_until_one_second_before_lease_end() -> None:
    """Formerly an invariant of the simulation wrongly reported that the retries ended too early.

    The invariant counted the lease from the time at which the heartbeat was sent. A pool counts it
    from the time before it waits for a connection, and here the machine sleeps during that wait.
    The next heartbeat follows at once, but here it gets no answer.
    """
    silence = Fault(answer="silence", applied=False)
    script = FaultScript(heartbeat=[None, Fault(wait=1), *[silence] * 20], update=[silence] * 40)
    bench = PoolTestbed(script, work_for_five_seconds, lease_ttl=10)
    async with bench.supervisor:
        bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(SessionStarted)
        started = bench.loop.machine_time()
        # The second heartbeat is due after 3 to 3.4 s, so now it waits in the client.
        await asyncio.sleep(3.5)
        bench.loop.suspend(4)
        await bench.recorder.wait_for(HeartbeatFinished, count=2)
        assert bench.loop.machine_time() - started > 8
        await bench.recorder.wait_for(SessionFinished)
        # The pool counts the lease of 10 s from the time at which the second heartbeat was due, 3
        # to 3.4 s after the start. The pool stops trying to write the result 1 s before the lease
        # ends: 12 to 12.4 s after the start.
        assert 12 <= bench.loop.machine_time() - started < 12.5
    assert bench.session_outcomes == ["lease_lost"]


@in_virtual_time
async def test_item_that_two_workers_poll_at_once_is_soon_acknowledged_by_one() -> None:
    """Formerly neither worker could acknowledge the item while both polled at the same pace.

    Each worker's poll delivered the item again before the ack of the other worker arrived, and the
    control plane refused that ack.
    """

    def make_latency_fault(request: Request) -> Fault:
        return Fault(request_delay=0.005 if request.op == "ack" else 0.001, answer_delay=0.001)

    settings: dict[str, Any] = {"concurrency": 1, "pollers": 1, "reclaim_older_than_ms": 0}
    bench = PoolTestbed(make_latency_fault, **settings)
    other_bench = PoolTestbed(make_latency_fault, operations=bench.operations, **settings)
    async with bench.supervisor:
        (item,) = bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(ItemReceived)
        await asyncio.sleep(0.002)
        async with other_bench.supervisor:
            await asyncio.sleep(30)
            assert bench.operations.get_item(ENVIRONMENT, item.id).state == "stopped"
    acks = [
        each.result
        for each in (*bench.recorder.of(AckFinished), *other_bench.recorder.of(AckFinished))
    ]
    assert acks.count("ok") == 1
    assert acks.count("conflict") < 20


@handler
async def begin_handoff_without_child(session: Session) -> None:
    async with session.handover():
        pass


@in_virtual_time
async def test_handoff_of_abandoned_session_does_not_delay_end_of_pool() -> None:
    """Formerly the handoff waited for a heartbeat that was never sent, so the lease renewer did not
    end.
    """
    silence = Fault(answer="silence", applied=False)
    bench = PoolTestbed(FaultScript(heartbeat=[None, *[silence] * 20]), begin_handoff_without_child)
    async with bench.supervisor as pool:
        bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(SessionStarted)
        # The second heartbeat, sent at about 5 s, gets no answer and fails after 10 s. The third
        # heartbeat is due at 11 s. The pool must wait for neither, or it would end late.
        await asyncio.sleep(5.5)
        await pool.drain(0)
        drained_at = bench.loop.time()
    assert pool.abandoned == 1
    assert bench.loop.time() - drained_at < 1


@in_virtual_time
async def test_pool_polls_again_after_item_of_failing_handler_could_not_be_acknowledged() -> None:
    """Formerly no poller polled again: only the end of a session ended their wait.

    The item that the failing handler may claim has no session, because its ack is refused after the
    pause of the handler.
    """

    @handler
    async def raise_error(_: Session) -> None:
        raise ValueError

    refused = Fault(answer=409, applied=False, answer_delay=5)
    bench = PoolTestbed(FaultScript(ack=[None] * FAILURES + [refused]), raise_error)
    async with bench.supervisor:
        bench.operations.enqueue(ENVIRONMENT, count=FAILURES)
        await bench.recorder.wait_for(SessionFinished, count=FAILURES)
        bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(AckFinished, lambda ack: ack.result == "conflict")
        bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(SessionFinished, count=FAILURES + 1, timeout=100)
