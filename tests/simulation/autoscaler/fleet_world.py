"""The simulation of an autoscaled fleet: a cluster that starts and removes simulated pools.

The pools, the control plane and its network are those of `tests.simulation.simulated_world`. The
number of pods comes from `workpool scale`'s reader and the recommendation of `workpool.scaling`,
which read the queue through the same network; the deletion costs come from the plugin of
plugins/kubernetes/README.md.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from tests.simulation.autoscaler.fleet_schedule import FleetIncident
from tests.simulation.autoscaler.horizontal_autoscaler import HorizontalAutoscaler, KedaScaler
from tests.simulation.autoscaler.kubernetes_cluster import SimulatedCluster
from tests.simulation.finished_simulation import START
from tests.simulation.network import SimulatedClient, SimulatedNetwork
from tests.simulation.schedule import PoolSettings
from tests.simulation.scripted_handlers import PLUGINS
from tests.simulation.simulated_machine import NETWORK, SimulatedMachine, current_machine
from tests.simulation.simulated_world import ENVIRONMENT, SimulatedWorld, pool_settings
from tests.simulation.trace import FOREVER, LATENCY_SECONDS, PoolProcess, Trace
from workpool import Supervisor, hookimpl
from workpool.cli.fleet_reader import FleetReader
from workpool.pool.status import compute_worker_scaling_numbers
from workpool.scaling import ReplicaRule, calculate_scaling_numbers
from workpool.server.timestamps import SECOND
from workpool.testing.fault import Fault
from workpool.wire.protocol import STOPPED
from workpool_kubernetes.cost_writer import CostWriter, running_cost_writer
from workpool_kubernetes.plugin import Kubernetes, running_sessions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prometheus_client import CollectorRegistry

    from tests.simulation.autoscaler.fleet_schedule import FleetSchedule
    from tests.simulation.autoscaler.kubernetes_cluster import Pod
    from tests.simulation.schedule import Action
    from workpool.events import AckFinished, SessionFinished, StopFinished

SYNC_SECONDS: Final = 15.0
"""The interval of the HorizontalPodAutoscaler."""
READ_SECONDS: Final = 15.0
"""`--interval` of `workpool scale`."""
AGE_SECONDS: Final = 120.0
"""`--max-age` of `workpool scale`."""
KNOWN_SECONDS: Final = AGE_SECONDS + READ_SECONDS
"""An item that is older is in every reading that the autoscaler uses."""
PATIENCE_MS: Final = 60_000
LOOK_SECONDS: Final = 30.0
SETTLED_LOOKS: Final = 100
"""The longest wait, after the last work, for its end and for the removal of the pods."""


class MachineInPod(SimulatedMachine):
    """The simulated machine of a process in a pod.

    Attributes:
        pod: The pod.
        cluster: The cluster of the pod, to which it writes its deletion cost; None: it does not.
        writer: Writes the deletion cost while the pool runs.
    """

    pod: Pod
    cluster: SimulatedCluster | None = None
    writer: CostWriter | None = None


class DeletionCostPlugin:
    """The plugin `kubernetes`, which writes deletion costs to the simulated API server."""

    @hookimpl
    @asynccontextmanager
    async def workpool_lifespan(self, supervisor: Supervisor) -> AsyncIterator[None]:
        machine = current_machine()
        if not isinstance(machine, MachineInPod) or machine.cluster is None:
            yield
            return
        write = partial(machine.cluster.write_deletion_cost, machine.pod)
        writer = CostWriter(partial(running_sessions, supervisor), write, Kubernetes.interval)
        async with running_cost_writer(writer) as machine.writer:
            yield

    @hookimpl
    def workpool_event(self, event: AckFinished | SessionFinished | StopFinished) -> None:  # noqa: ARG002 - its annotation selects the events
        machine = current_machine()
        if isinstance(machine, MachineInPod) and machine.writer is not None:
            machine.writer.request_deletion_cost_update()


FLEET_PLUGINS: Final = (*PLUGINS, DeletionCostPlugin())
"""The plugins of every pod."""


class FleetWorld(SimulatedWorld):
    """Runs one schedule of a fleet; must be created and used inside `run_machines`."""

    def __init__(self, schedule: FleetSchedule, registry: CollectorRegistry) -> None:
        super().__init__(schedule.world, registry)
        self._fleet = schedule
        self._network.patience_ms = PATIENCE_MS
        self.cluster = SimulatedCluster(self, schedule, random.Random(schedule.world.seed))
        settings = schedule.settings
        self._rule = ReplicaRule(settings.pool.concurrency, 0, settings.rules.maximum)
        self._reader: FleetReader | None = None
        self._reader_network = SimulatedNetwork(
            schedule.world, random.Random(schedule.world.seed), self.operations, Trace()
        )
        self._reader_node = PoolProcess(SimulatedMachine(self.loop, "scale"), PoolSettings(), 0.0)
        self._reader_node.no_fault = Fault(
            request_delay=LATENCY_SECONDS, answer_delay=LATENCY_SECONDS
        )

    async def _run_scheduled_actions(self) -> None:
        context = self._reader_node.machine.make_context_of_machine()
        services = [
            self._group.create_task(self._read_queue_repeatedly(), context=context),
            *(
                self._group.create_task(service, context=NETWORK)
                for service in (
                    self._run_horizontal_autoscaler(),
                    self._run_keda_activation(),
                    self.cluster.probe_pods(),
                )
            ),
        ]
        self.cluster.set_replicas(self._fleet.settings.pod_count_without_work)
        await self._perform_scheduled_events()
        await self._wait_for_scale_down()
        self.cluster.close()
        for service in services:
            service.cancel()
        await self._end_faults_and_finish_items()

    async def _perform_scheduled_events(self) -> None:
        """Create the work and cause the incidents of the schedule, at their times."""
        events: list[Action | FleetIncident] = [*self.schedule.actions, *self._fleet.incidents]
        for event in sorted(events, key=lambda each: each.at):
            await asyncio.sleep(max(0.0, event.at - self.loop.now))
            if isinstance(event, FleetIncident):
                self._cause_incident(event)
            else:
                self._perform_action(event)

    def _cause_incident(self, incident: FleetIncident) -> None:
        self.trace.actions += 1
        until = self.loop.now + incident.seconds
        if incident.kind == "blind":
            self._reader_node.cuts.append((self.loop.now, until))
            return
        pods = self.cluster.active_pods
        if not pods:
            return
        pod = pods[incident.target % len(pods)]
        if incident.kind == "evict":
            self.cluster.evict_pod(pod)
        elif pod.process is not None and pod.process in self._running_pools():
            if incident.kind == "kill":
                self.kill_process(pod.process)
            else:
                pod.process.cuts.append((self.loop.now, until))

    async def _wait_for_scale_down(self) -> None:
        """Wait until all items are stopped and the autoscaler has removed the superfluous pods."""
        least = self._fleet.settings.pod_count_without_work
        for _ in range(SETTLED_LOOKS):
            if self.cluster.replicas <= least and self._all_items_stopped():
                return
            await asyncio.sleep(LOOK_SECONDS)

    async def _read_queue_repeatedly(self) -> None:
        """Read the queue repeatedly, as `workpool scale` does."""
        connect: Any = SimulatedClient(
            self._reader_network, self._reader_node, pool_settings(PoolSettings())
        )
        async with connect as client:
            self._reader = FleetReader(
                client,
                interval=READ_SECONDS,
                max_age=AGE_SECONDS,
                clock=self._reader_node.machine.lease_clock,
            )
            await self._reader.read_load_periodically()

    def _read_scaling_metric(self) -> float | None:
        """Return the metric that the autoscaler reads from `/scale`; None if the answer is 503."""
        load = None if self._reader is None else self._reader.latest_load
        if load is None:
            return None
        if self._fleet.settings.metric == "busy_slots":
            supervisors = [self._supervisors[node] for node in self._started_processes()]
            busy = sum(
                compute_worker_scaling_numbers(each.status())["busy"] for each in supervisors
            )
            return busy + load.queued + load.pending
        return calculate_scaling_numbers(load, self._rule)[self._fleet.settings.metric]

    def _started_processes(self) -> list[PoolProcess]:
        """Return the running processes whose supervisor has started."""
        return [node for node in self._running_pools() if node in self._supervisors]

    async def _run_horizontal_autoscaler(self) -> None:
        scaler = HorizontalAutoscaler(self._fleet.settings.rules)
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            if self.cluster.replicas > 0:
                pods = len(self.cluster.active_pods)
                now, metric = self.loop.now, self._read_scaling_metric()
                self._scale_cluster(
                    scaler.compute_replicas_at_sync(now, self.cluster.replicas, pods, metric)
                )

    async def _run_keda_activation(self) -> None:
        settings = self._fleet.settings
        keda = KedaScaler(settings.pod_count_without_work, settings.cooldown)
        while True:
            await asyncio.sleep(settings.polling)
            self._scale_cluster(
                keda.compute_replicas_after_poll(
                    self.loop.now, self.cluster.replicas, self._read_scaling_metric()
                )
            )

    def _scale_cluster(self, replicas: int) -> None:
        if replicas < self.cluster.replicas:
            lowered = (self.loop.now, replicas, self._count_items_that_autoscaler_knows())
            self.cluster.record.lowered.append(lowered)
        if replicas != self.cluster.replicas:
            self.cluster.set_replicas(replicas)

    def _count_items_that_autoscaler_knows(self) -> int:
        """Return the number of unfinished items that are older than `KNOWN_SECONDS`.

        Each reading of the load that the autoscaler uses counts these items.
        """
        known = self.loop.now - KNOWN_SECONDS
        items = [self.operations.get_item(ENVIRONMENT, work_id) for work_id in self.items]
        return sum(
            item.state != STOPPED and item.created_at / SECOND - START <= known for item in items
        )

    def start_process(self, pod: Pod) -> PoolProcess:
        """Start a pool as the process of a pod."""
        self._pod = pod
        return self._start_pool(self._fleet.settings.pool)

    def _create_machine(self, name: str, rate: float) -> SimulatedMachine:
        machine = MachineInPod(self.loop, name, rate)
        if self._fleet.settings.deletion_cost and not self.cluster.closed:
            machine.pod, machine.cluster = self._pod, self.cluster
        return machine

    def terminate_process(self, process: PoolProcess) -> None:
        """Simulate a SIGTERM to the process of a pod: the drain of the process begins."""
        self._begin_drain(process, process.pool.drain_timeout)

    def kill_process(self, process: PoolProcess) -> None:
        """Simulate a SIGKILL to the process of a pod: the process crashes."""
        self._crash_machine(process)

    def is_ready(self, process: PoolProcess) -> bool:
        """Return whether the readiness probe of a process succeeds."""
        return process in self._started_processes() and self._supervisors[process].status().ready

    def count_running_handlers(self, process: PoolProcess) -> int:
        """Return the number of handlers that run in the given process."""
        return sum(run.node is process and run.ended == FOREVER for run in self.trace.runs)

    def busy_seconds_of_process(self, process: PoolProcess) -> float:
        """Return for how many seconds a process has been running sessions; 0 if it runs none."""
        runs = [run for run in self.trace.runs if run.node is process and run.ended == FOREVER]
        return self.loop.now - min((run.started for run in runs), default=self.loop.now)

    def idle_seconds_of_process(self, process: PoolProcess) -> float:
        """Return for how many seconds a process has run no session; 0 if it runs one."""
        return self._supervisors[process].status().idle_seconds
