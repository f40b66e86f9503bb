"""One simulation: the machines, their pools, and the schedule that is carried out on them."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final, TypeVarTuple

from workpool.errors import WorkpoolError
from workpool.pool.hold import Hold
from workpool.pool.lease_renewer import LeaseRenewer
from workpool.pool.supervisor import Supervisor
from workpool.server import Operations, Refusal
from workpool.server.clock import SECOND
from workpool.settings import Settings
from workpool.testing.local import Trouble
from workpool.testing.simulation.case import START, Case
from workpool.testing.simulation.counted import totals
from workpool.testing.simulation.machine import NETWORK, Halt, Machine, MachinesLoop
from workpool.testing.simulation.network import Client, Network
from workpool.testing.simulation.schedule import PAUSE_SECONDS, Deed, Pool, Schedule
from workpool.testing.simulation.stage import PLAY, SECONDS, Stage, play
from workpool.testing.simulation.trace import FOREVER, LATENCY_SECONDS, Node, Trace
from workpool.testing.virtual import VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from contextlib import AsyncExitStack

    from prometheus_client import CollectorRegistry

    from workpool.events import Event
    from workpool.pool.context import PoolContext
    from workpool.session import HandedLease

ENVIRONMENT: Final = "env_00000000000070008000000000000001"
TICK_SECONDS: Final = 5.0
REST_SECONDS: Final = 25.0
"""From the last deed until everything heals."""
LEAVE_SECONDS: Final = 200.0
ENCORE_SECONDS: Final = 900
"""By then a fresh pool must have drained the queue."""
HALTS: Final[Mapping[str, tuple[Halt, float]]] = {
    "sleep": ("asleep", 0.0),
    "freeze": ("stopped", 0.0),
    "pause": ("paused", PAUSE_SECONDS),
}
"""What a deed does to a machine, and for how long at least."""
LATENCY_PART, LATENCIES = 0.1, 7

Ts = TypeVarTuple("Ts")


class LoopRenewer(LeaseRenewer):
    """A lease renewer on the handlers' loop: a machine has one."""

    tick_seconds = TICK_SECONDS

    def _start_thread(self) -> asyncio.Future[None]:
        self._loop = self._handlers_loop
        return self._loop.create_task(self._main(), name="lease-renewer")

    def _join_thread(self) -> None:
        """There is no thread."""


class LoopSupervisor(Supervisor):
    """A supervisor that needs no thread: its lease renewer and its lease clock are the loop's.

    For tests of one pool in virtual time; `Simulated` is for several machines.
    """

    _renewer = LoopRenewer

    async def _live(self) -> None:
        loop = asyncio.get_running_loop()
        if isinstance(loop, VirtualLoop) and not isinstance(loop, MachinesLoop):
            self._clock, self._wall = loop.machine_time, loop.wall_time
        await super()._live()


class Simulated(LoopSupervisor):
    """A supervisor on a machine; nothing else is different."""

    node: Node

    async def _open_renewer(self, stack: AsyncExitStack) -> PoolContext:
        context = await super()._open_renewer(stack)
        told = context.observe
        loop = asyncio.get_running_loop()
        assert isinstance(loop, MachinesLoop)

        def observe(event_type: Callable[[*Ts], Event], /, *values: *Ts) -> None:
            self.node.events.append((loop.now, event_type(*values)))
            told(event_type, *values)

        return replace(context, observe=observe)


class SimulatedHold(Simulated, Hold):
    """A child on a machine, as `workpool hold` runs it."""


def settings_of(pool: Pool) -> Settings:
    """Make the pool's settings. All have one configured `worker_id`, as after a restart."""
    return _usual_settings().model_copy(
        update={
            "concurrency": pool.concurrency,
            "prefetch": pool.prefetch,
            "pollers": pool.pollers,
            "lease_ttl": pool.lease_ttl,
            "reclaim_older_than_ms": pool.reclaim_ms,
            "drain_timeout": pool.drain_timeout,
            "stop_grace": pool.stop_grace,
            "session_timeout": pool.session_timeout,
            "request_timeout": pool.request_timeout,
        }
    )


@cache
def _usual_settings() -> Settings:
    return Settings(
        environment_id=ENVIRONMENT,
        base_url="http://127.0.0.1:1",
        token=ENVIRONMENT,
        worker_id="worker",
        stats_interval=0,
    )


class World:
    """Carries one schedule out; made and used inside `run_machines`."""

    def __init__(self, schedule: Schedule, registry: CollectorRegistry) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, MachinesLoop)
        self.loop = loop
        self.schedule = schedule
        self.trace = Trace()
        self.operations = Operations(
            [ENVIRONMENT], now=lambda: START + loop.now, history_limit=None
        )
        self.items: list[str] = []
        self._registry = registry
        chance = random.Random(schedule.seed)
        self._network = Network(schedule, chance, self.operations, self.trace)
        self._supervisors: dict[Node, Simulated] = {}
        self._tasks: dict[asyncio.Task[None], Node] = {}
        self._stages: list[Stage] = []

    async def live(self, judge: Callable[[Case], list[str]]) -> tuple[Case, list[str]]:
        """Carry the schedule out, heal everything, let a fresh pool finish the work."""
        before = totals(self._registry)
        async with asyncio.TaskGroup() as self._group:
            try:
                await self._act()
                counted = totals(self._registry)
                counted.subtract(before)
                history = [
                    each._replace(time=each.time - START) for each in self.operations.history
                ]
                case = Case(history, self.trace, counted)
                verdict = judge(case)
            finally:
                self._bury()
        return case, verdict

    async def _act(self) -> None:
        for pool in self.schedule.pools:
            self._start(pool)
        for deed in self.schedule.deeds:
            await asyncio.sleep(deed.at - self.loop.now)
            self._do(deed)
        await asyncio.sleep(REST_SECONDS)
        self._heal()
        await self._leave()
        self._start(Pool(concurrency=4, lease_ttl=30, drain_timeout=60), healed=True)
        await self._encore()
        await self._leave()

    def _start(self, pool: Pool, *, healed: bool = False) -> None:
        node = self._node(pool)
        node.machine.stage.healed = healed
        supervisor = Simulated(settings_of(pool), **self._surroundings(node))
        self._spawn(node, self._life(node, supervisor))

    def _start_child(self, parent: Node, lease: HandedLease, delay: float) -> None:
        """It starts wherever that is, whatever befalls its parent until then."""
        begin = partial(self._begin_child, parent, lease)
        self.loop.call_at(self.loop.now + delay, begin, context=NETWORK)

    def _begin_child(self, parent: Node, lease: HandedLease) -> None:
        if self._network.over:
            return
        node = self._node(replace(parent.pool, session_timeout=None, lease_ttl=lease.ttl))
        node.child = True
        child = SimulatedHold(
            settings_of(node.pool), lease.work_id, lease.last_heartbeat, **self._surroundings(node)
        )
        self._spawn(node, self._life(node, child))

    def _node(self, pool: Pool) -> Node:
        machine = Machine(self.loop, f"{len(self.trace.nodes)}", pool.rate)
        node = Node(machine, pool, self.loop.now)
        # Not the same for all: two pools in step could take an item from each other for ever.
        latency = LATENCY_SECONDS * (1 + LATENCY_PART * (len(self.trace.nodes) % LATENCIES))
        node.calm = Trouble(there=latency, back=latency)
        self.trace.nodes.append(node)
        machine.stage = Stage(self.trace, node, lambda: self.loop.now, self._start_child)
        self._stages.append(machine.stage)
        return node

    def _surroundings(self, node: Node) -> dict[str, Any]:
        connect = partial(Client, self._network, node)
        return {"plugins": [play], "registry": self._registry, "connect": connect}

    def _spawn(self, node: Node, coroutine: Coroutine[object, object, None]) -> None:
        context = node.machine.context()
        task = self._group.create_task(coroutine, context=context)
        self._tasks[task] = node

    async def _life(self, node: Node, supervisor: Simulated) -> None:
        supervisor.node = node
        supervisor._clock, supervisor._wall = node.machine.clock, node.machine.wall
        self._supervisors[node] = supervisor
        try:
            async with supervisor:
                await supervisor.wait()
        except WorkpoolError as error:
            node.error = error
        finally:
            if node.crashed == FOREVER:
                node.closed = self.loop.now
                node.left_behind = supervisor.left_behind

    async def _drain(self, node: Node, timeout: float) -> None:
        await self._supervisors[node].drain(timeout)
        if node.crashed == FOREVER:
            node.drained = self.loop.now

    # Deeds.

    def _living(self) -> list[Node]:
        return [
            node for node in self.trace.nodes if node.crashed == FOREVER and node.closed == FOREVER
        ]

    def _do(self, deed: Deed) -> None:
        self.trace.deeds += 1
        match deed.kind:
            case "work":
                self._enqueue(deed)
            case "stop" | "force" | "expire":
                if self.items:
                    self._interfere(deed, self.items[deed.target % len(self.items)])
            case _:
                if living := self._living():
                    self._strike(deed, living[deed.target % len(living)])

    def _enqueue(self, deed: Deed) -> None:
        session_id = None
        if deed.count < 0 and self.items:
            session_id = self.operations.get(ENVIRONMENT, self.items[-1]).session_id
        items = self.operations.enqueue(
            ENVIRONMENT,
            count=abs(deed.count),
            metadata={PLAY: deed.play, SECONDS: f"{deed.seconds:.3f}"},
            session_id=session_id,
        )
        self.items += [item.id for item in items]

    def _interfere(self, deed: Deed, work_id: str) -> None:
        """An operator does something to an item."""
        if deed.kind == "expire":
            queue = self.operations.queue(ENVIRONMENT)
            item = queue.get(work_id)
            now = int((START + self.loop.now) * SECOND)
            # Not in the second of its ack: protocol §4 tells owners apart by whole seconds, which
            # is safe as no lease lapses so early.
            if item.lease_end is not None and now // SECOND > (item.acknowledged_at or 0) // SECOND:
                self.trace.broken.append((self.loop.now, work_id))
                queue.put(replace(item, lease_end=min(item.lease_end, now)))
                self.operations.queue(ENVIRONMENT)
                self.operations.wake()
            return
        with suppress(Refusal):
            self.operations.stop(ENVIRONMENT, work_id, "operator", force=deed.kind == "force")

    def _strike(self, deed: Deed, node: Node) -> None:
        """Something befalls a pool."""
        now, machine = self.loop.now, node.machine
        match deed.kind:
            case "crash" | "restart":
                self._crash(node)
                if deed.kind == "restart" and not node.child:
                    self._start(node.pool)
            case "cut":
                node.cuts.append((now, now + deed.seconds))
            case "deny":
                node.denials.append((now, now + deed.seconds))
            case "sleep" | "freeze" | "pause":
                how, least = HALTS[deed.kind]
                machine.halt(how, max(least, deed.seconds))
            case "drain":
                self._begin_drain(node, deed.seconds)
                if deed.target % 2 and not node.child:
                    self._start(node.pool)

    def _crash(self, node: Node) -> None:
        node.machine.halt("crashed")
        node.crashed = self.loop.now
        for run in self.trace.runs:
            if run.node is node and run.result is None:
                run.ended, run.result = node.crashed, "crashed"

    def _begin_drain(self, node: Node, timeout: float) -> None:
        if node.drain is None:
            node.drain = (self.loop.now, timeout)
            self._spawn(node, self._drain(node, timeout))

    # The end.

    def _heal(self) -> None:
        self._network.healed = True
        for stage in self._stages:
            stage.healed = True
        for node in self._living():
            node.cuts = [(since, min(until, self.loop.now)) for since, until in node.cuts]
            node.machine.go_on()

    async def _leave(self) -> None:
        """All pools drain, each with its own timeout."""
        for node in self._living():
            self._begin_drain(node, node.pool.drain_timeout)
        alive = [task for task, node in self._tasks.items() if node.crashed == FOREVER]
        if alive:
            await asyncio.wait(alive, timeout=LEAVE_SECONDS)

    async def _encore(self) -> None:
        for _ in range(ENCORE_SECONDS):
            if self._all_stopped():
                return
            await asyncio.sleep(1)

    def _all_stopped(self) -> bool:
        self.operations.queue(ENVIRONMENT)
        return all(
            self.operations.get(ENVIRONMENT, work_id).state == "stopped" for work_id in self.items
        )

    def _bury(self) -> None:
        self._network.over = True
        for node in self.trace.nodes:
            node.machine.bury()
        for task in [*self._tasks, *self._network.serving]:
            task.cancel()
