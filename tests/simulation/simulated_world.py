"""The execution of one schedule: machines, pools, actions, and the check of the invariants."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final, TypeVarTuple

from tests.simulation.control_planes import OperationsThatAckForAnyWorker
from tests.simulation.finished_simulation import START, FinishedSimulation
from tests.simulation.metric_totals import counter_totals
from tests.simulation.network import SimulatedClient, SimulatedNetwork
from tests.simulation.schedule import PAUSE_SECONDS, Action, PoolSettings, Schedule
from tests.simulation.scripted_handlers import (
    BEHAVIOUR,
    PLUGINS,
    SECONDS,
    SimulatedHandlers,
)
from tests.simulation.simulated_machine import (
    EVENT_LOOP,
    NETWORK,
    HaltKind,
    MultiMachineLoop,
    SimulatedMachine,
)
from tests.simulation.trace import FOREVER, LATENCY_SECONDS, PoolProcess, Trace
from workpool.errors import WorkpoolError
from workpool.pool.exit_limits import ExitLimits
from workpool.pool.handoff_child import HandoffChildSupervisor
from workpool.pool.shared_slots import SharedPoolResources, SharedSlots
from workpool.server import APIError, Operations
from workpool.server.timestamps import SECOND
from workpool.settings import Settings
from workpool.testing.fault import Fault
from workpool.testing.loop_supervisor import ThreadlessLeaseRenewer, ThreadlessSupervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from contextlib import AsyncExitStack

    from prometheus_client import CollectorRegistry

    from workpool.events import Event
    from workpool.pool.pool_context import PoolContext
    from workpool.session import HandedLease

ENVIRONMENT: Final = "env_00000000000070008000000000000001"
REST_SECONDS: Final = 25.0
"""Time from the last action until all faults end."""
DRAIN_WAIT_SECONDS: Final = 200.0
"""The longest wait for all pools to drain."""
RECOVERY_SECONDS: Final = 900
"""Within this time a fresh pool must have stopped all items."""
HALTS: Final[Mapping[str, tuple[HaltKind, float]]] = {
    "sleep": ("asleep", 0.0),
    "freeze": ("stopped", 0.0),
    "pause": ("paused", PAUSE_SECONDS),
}
"""For each action that halts a machine, the way and the shortest duration in seconds."""

Ts = TypeVarTuple("Ts")


class SimulatedRenewer(ThreadlessLeaseRenewer):
    """A lease renewer on the event loop of the simulation, instead of a thread with its own loop.

    Its callbacks run in a context with `EVENT_LOOP` "renewer". So the simulated client notices
    calls that would happen on the wrong event loop in a real pool.
    """

    def _start_thread(self) -> asyncio.Future[None]:
        self._loop = self._handlers_loop
        self._handlers_context, self._context = copy_context(), copy_context()
        self._context.run(EVENT_LOOP.set, "renewer")
        return self._loop.create_task(
            self._renew_until_stopped(), name="lease-renewer", context=self._context
        )

    def _schedule_on_renewer_loop(self, callback: Callable[..., object], *args: object) -> None:
        self._loop.call_soon(callback, *args, context=self._context)

    def _call_on_handlers_loop(self, callback: Callable[[], object]) -> None:
        self._loop.call_soon(callback, context=self._handlers_context)


class SimulatedSupervisor(ThreadlessSupervisor):
    """A supervisor on a simulated machine, whose events the trace records."""

    _renewer = SimulatedRenewer
    node: PoolProcess

    def _use_virtual_clocks(self) -> None:
        """Do nothing: the pool uses the clocks of its simulated machine."""

    async def _open_pool_context(self, stack: AsyncExitStack) -> PoolContext:
        context = await super()._open_pool_context(stack)
        original = context.observe
        loop = asyncio.get_running_loop()
        assert isinstance(loop, MultiMachineLoop)

        def record_and_forward_event(event_type: Callable[[*Ts], Event], /, *values: *Ts) -> None:
            self.node.events.append((loop.now, event_type(*values)))
            original(event_type, *values)

        return replace(context, observe=record_and_forward_event)


class SimulatedHandoffChildSupervisor(SimulatedSupervisor, HandoffChildSupervisor):
    """The supervisor of a handoff's child process on a simulated machine.

    In a real child process, `workpool hold` uses a `HandoffChildSupervisor`.
    """


def pool_settings(pool: PoolSettings) -> Settings:
    """Return a pool's settings. All pools have one `worker_id`, like restarts of one worker."""
    return _make_common_settings().replace(
        concurrency=pool.concurrency,
        prefetch=pool.prefetch,
        pollers=pool.pollers,
        lease_ttl=pool.lease_ttl,
        reclaim_older_than_ms=pool.reclaim_ms,
        drain_timeout=pool.drain_timeout,
        stop_grace=pool.stop_grace,
        session_timeout=pool.session_timeout,
        stall_timeout=pool.stall_timeout,
        request_timeout=pool.request_timeout,
        exit_after_sessions=pool.exit_after_sessions,
        exit_after_idle=pool.exit_after_idle,
        exit_after_uptime=pool.exit_after_uptime,
    )


@cache
def _make_common_settings() -> Settings:
    return Settings(
        environment_id=ENVIRONMENT,
        base_url="http://127.0.0.1:1",
        token=ENVIRONMENT,
        worker_id="worker",
        stats_interval=0,
    )


class SimulatedWorld:
    """Runs one schedule; must be created and used inside `run_machines`."""

    def __init__(self, schedule: Schedule, registry: CollectorRegistry) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, MultiMachineLoop)
        self.loop = loop
        self.schedule = schedule
        self.trace = Trace()
        self.operations = self._open_control_plane()
        self.items: list[str] = []
        self._registry = registry
        generator = random.Random(schedule.seed)
        self._network = SimulatedNetwork(schedule, generator, self.operations, self.trace)
        self._supervisors: dict[PoolProcess, SimulatedSupervisor] = {}
        self._tasks: dict[asyncio.Task[None], PoolProcess] = {}
        self._handlers: list[SimulatedHandlers] = []
        total = schedule.shared_slots
        self._slots = None if total is None else SharedSlots(total)
        self.trace.shared_slots = total

    def _open_control_plane(self) -> Operations:
        kind, loop = self.schedule.control_plane, self.loop

        def control_plane_time() -> float:
            return START + loop.now

        if kind == "strict":
            return Operations([ENVIRONMENT], now=control_plane_time, history_limit=None)
        poll_leases = kind == "poll leases"
        return OperationsThatAckForAnyWorker(
            [ENVIRONMENT], now=control_plane_time, history_limit=None, poll_leases=poll_leases
        )

    async def run_simulation(
        self, check_invariants: Callable[[FinishedSimulation], list[str]]
    ) -> tuple[FinishedSimulation, list[str]]:
        """Run the schedule, finish its work without faults, and check the invariants."""
        before = counter_totals(self._registry)
        async with asyncio.TaskGroup() as self._group:
            try:
                await self._run_scheduled_actions()
                counted = counter_totals(self._registry)
                counted.subtract(before)
                history = [
                    each._replace(time=each.time - START) for each in self.operations.history
                ]
                case = FinishedSimulation(history, self.trace, counted)
                violations = check_invariants(case)
            finally:
                self._discard_machines()
        return case, violations

    async def _run_scheduled_actions(self) -> None:
        for pool in self.schedule.pools:
            self._start_pool(pool)
        for action in self.schedule.actions:
            await asyncio.sleep(action.at - self.loop.now)
            self._perform_action(action)
        await self._end_faults_and_finish_items()

    async def _end_faults_and_finish_items(self) -> None:
        """End all faults, and let a new pool finish the remaining work."""
        await asyncio.sleep(REST_SECONDS)
        self._end_all_faults()
        await self._drain_all_pools()
        self._start_pool(PoolSettings(concurrency=4, lease_ttl=30, drain_timeout=60), healed=True)
        await self._wait_until_items_stopped()
        await self._drain_all_pools()

    def _start_pool(self, pool: PoolSettings, *, healed: bool = False) -> PoolProcess:
        node = self._create_pool_process(pool)
        node.machine.handlers.healed = healed
        supervisor = SimulatedSupervisor(pool_settings(pool), **self._supervisor_arguments(node))
        if self._slots is not None and not healed:
            node.share = self._slots.add_environment_share()
            supervisor.shared = SharedPoolResources(
                node.share, ExitLimits(supervisor.settings), None
            )
        self._spawn_task(node, self._run_pool(node, supervisor))
        return node

    def _start_handoff_child(self, parent: PoolProcess, lease: HandedLease, delay: float) -> None:
        """Start a child process after `delay` seconds, even if the parent's machine halts."""
        begin = partial(self._run_child_process_of_handoff, parent, lease)
        self.loop.call_at(self.loop.now + delay, begin, context=NETWORK)

    def _run_child_process_of_handoff(self, parent: PoolProcess, lease: HandedLease) -> None:
        if self._network.over:
            return
        pool = replace(parent.pool, session_timeout=None, stall_timeout=None, lease_ttl=lease.ttl)
        node = self._create_pool_process(pool)
        node.child = True
        child = SimulatedHandoffChildSupervisor(
            pool_settings(node.pool),
            lease.work_id,
            lease.last_heartbeat,
            **self._supervisor_arguments(node),
        )
        self._spawn_task(node, self._run_pool(node, child))

    def _create_pool_process(self, pool: PoolSettings) -> PoolProcess:
        machine = self._create_machine(f"{len(self.trace.nodes)}", pool.rate)
        node = PoolProcess(machine, pool, self.loop.now)
        node.no_fault = Fault(request_delay=LATENCY_SECONDS, answer_delay=LATENCY_SECONDS)
        self.trace.nodes.append(node)
        machine.max_sessions = pool.max_sessions
        machine.handlers = SimulatedHandlers(
            self.trace, node, lambda: self.loop.now, self._start_handoff_child
        )
        self._handlers.append(machine.handlers)
        return node

    def _create_machine(self, name: str, rate: float) -> SimulatedMachine:
        return SimulatedMachine(self.loop, name, rate)

    def _supervisor_arguments(self, node: PoolProcess) -> dict[str, Any]:
        connect = partial(SimulatedClient, self._network, node)
        return {"plugins": PLUGINS, "registry": self._registry, "connect": connect}

    def _spawn_task(self, node: PoolProcess, coroutine: Coroutine[object, object, None]) -> None:
        context = node.machine.make_context_of_machine()
        task = self._group.create_task(coroutine, context=context)
        self._tasks[task] = node

    async def _run_pool(self, node: PoolProcess, supervisor: SimulatedSupervisor) -> None:
        supervisor.node = node
        supervisor._clock, supervisor._wall = node.machine.lease_clock, node.machine.wall_clock
        self._supervisors[node] = supervisor
        try:
            async with supervisor:
                await supervisor.wait()
        except WorkpoolError as error:
            node.error = error
        finally:
            if node.crashed == FOREVER:
                node.closed = self.loop.now
                node.abandoned = supervisor.abandoned
                if node.share is not None:
                    node.share.release_reserved_slot()

    async def _drain_pool(self, node: PoolProcess, timeout: float) -> None:
        await self._supervisors[node].drain(timeout)
        if node.crashed == FOREVER:
            node.drained = self.loop.now

    def _running_pools(self) -> list[PoolProcess]:
        return [
            node for node in self.trace.nodes if node.crashed == FOREVER and node.closed == FOREVER
        ]

    def _perform_action(self, action: Action) -> None:
        self.trace.actions += 1
        match action.kind:
            case "work":
                self._enqueue_items(action)
            case "stop" | "force" | "expire":
                if self.items:
                    self._perform_operator_action_on_item(
                        action, self.items[action.target % len(self.items)]
                    )
            case _:
                if living := self._running_pools():
                    self._perform_action_on_pool_or_machine(
                        action, living[action.target % len(living)]
                    )

    def _enqueue_items(self, action: Action) -> None:
        session_id = None
        if action.count < 0 and self.items:
            session_id = self.operations.get_item(ENVIRONMENT, self.items[-1]).session_id
        items = self.operations.enqueue(
            ENVIRONMENT,
            count=abs(action.count),
            metadata={BEHAVIOUR: action.behaviour, SECONDS: f"{action.seconds:.3f}"},
            session_id=session_id,
        )
        self.items += [item.id for item in items]

    def _perform_operator_action_on_item(self, action: Action, work_id: str) -> None:
        """Carry out an operator's action on an item."""
        if action.kind == "expire":
            queue = self.operations.get_queue(ENVIRONMENT)
            item = queue.get_item(work_id)
            now = int((START + self.loop.now) * SECOND)
            # Do not expire a lease in the second in which the item was acknowledged: pools compare
            # `acknowledged_at`, in whole seconds, to notice that another worker has taken the item.
            if item.lease_end is not None and now // SECOND > (item.acknowledged_at or 0) // SECOND:
                self.trace.broken.append((self.loop.now, work_id))
                queue.put_item(replace(item, lease_end=min(item.lease_end, now)))
                self.operations.get_queue(ENVIRONMENT)
                self.operations.wake_all_polls()
            return
        with suppress(APIError):
            self.operations.stop_item(
                ENVIRONMENT, work_id, "operator", force=action.kind == "force"
            )

    def _perform_action_on_pool_or_machine(self, action: Action, node: PoolProcess) -> None:
        """Carry out an action on a pool or its machine."""
        now, machine = self.loop.now, node.machine
        match action.kind:
            case "crash" | "restart":
                self._crash_machine(node)
                if action.kind == "restart" and not node.child:
                    self._start_pool(node.pool)
            case "cut" | "deny":
                times = node.cuts if action.kind == "cut" else node.denials
                times.append((now, now + action.seconds))
            case "sleep" | "freeze" | "pause":
                how, least = HALTS[action.kind]
                machine.halt(how, max(least, action.seconds))
            case "refrain":
                self._pause_claiming(node, action.seconds)
            case "drain":
                self._begin_drain(node, action.seconds)
                if action.target % 2 and not node.child:
                    self._start_pool(node.pool)

    def _pause_claiming(self, node: PoolProcess, seconds: float) -> None:
        node.refrains.append((self.loop.now, self.loop.now + seconds))
        until = datetime.fromtimestamp(node.machine.wall_clock() + seconds, UTC)
        self._supervisors[node].pause("operator", until)

    def _crash_machine(self, node: PoolProcess) -> None:
        node.machine.halt("crashed")
        node.crashed = self.loop.now
        if node.share is not None:
            node.share.release_reserved_slot()
        for run in self.trace.runs:
            if run.node is node and run.result is None:
                run.ended, run.result = node.crashed, "crashed"

    def _begin_drain(self, node: PoolProcess, timeout: float) -> None:
        if node.drain is None:
            node.drain = (self.loop.now, timeout)
            self._spawn_task(node, self._drain_pool(node, timeout))

    def _end_all_faults(self) -> None:
        self._network.healed = True
        for handlers in self._handlers:
            handlers.healed = True
        for node in self._running_pools():
            node.cuts = [(since, min(until, self.loop.now)) for since, until in node.cuts]
            node.machine.resume()

    async def _drain_all_pools(self) -> None:
        """Drain all pools, each with its own drain timeout, and wait until all pools have ended."""
        for node in self._running_pools():
            self._begin_drain(node, node.pool.drain_timeout)
        alive = [task for task, node in self._tasks.items() if node.crashed == FOREVER]
        if alive:
            await asyncio.wait(alive, timeout=DRAIN_WAIT_SECONDS)

    async def _wait_until_items_stopped(self) -> None:
        for _ in range(RECOVERY_SECONDS):
            if self._all_items_stopped():
                return
            await asyncio.sleep(1)

    def _all_items_stopped(self) -> bool:
        self.operations.get_queue(ENVIRONMENT)
        return all(
            self.operations.get_item(ENVIRONMENT, work_id).state == "stopped"
            for work_id in self.items
        )

    def _discard_machines(self) -> None:
        self._network.over = True
        for node in self.trace.nodes:
            node.machine.shut_down()
        for task in [*self._tasks, *self._network.serving]:
            task.cancel()
