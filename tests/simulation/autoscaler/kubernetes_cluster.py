"""The simulated Kubernetes cluster, which starts, probes and deletes the pods of a ReplicaSet."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from tests.simulation.autoscaler.fleet_schedule import NOTICE_SECONDS
from tests.simulation.autoscaler.replica_set import PodState, pods_to_delete
from tests.simulation.simulated_machine import NETWORK
from tests.simulation.trace import FOREVER
from workpool_kubernetes.api_server import APIServerError

if TYPE_CHECKING:
    from random import Random

    from tests.simulation.autoscaler.fleet_schedule import FleetSchedule
    from tests.simulation.autoscaler.fleet_world import FleetWorld
    from tests.simulation.trace import PoolProcess

PROBE_SECONDS: Final = 5.0
"""The period of the readiness probe."""
PROBE_FAILURES: Final = 3
"""The failures in a row after which a pod is not ready."""
RESTART_SECONDS: Final = (10.0, 300.0)
"""The shortest and the longest wait before a container is started again."""
HOSTS: Final = 3
"""The number of nodes of the cluster."""
CALL_SECONDS: Final = (0.005, 0.2)
"""The shortest and the longest latency of the API server."""


@dataclass(slots=True, eq=False)
class PodDeletion:
    """The deletion of a pod, by a scale-down or an eviction.

    Attributes:
        kind: `scale-down`: the autoscaler wants fewer pods. `eviction`: the pod's node ends.
        at: The time of SIGTERM.
        process: The process that got it; None: none had started.
        busy: The sessions that ran then.
        killed: The time of SIGKILL; infinite if the process ended before.
    """

    kind: Literal["scale-down", "eviction"]
    at: float
    process: PoolProcess | None
    busy: int
    killed: float = FOREVER


@dataclass(slots=True, eq=False)
class Pod:
    """One pod of the simulated cluster.

    Attributes:
        process: The last process of its container; None before the first.
        failed_probes: Failures of the readiness probe in a row.
        cost_failed: The time of the last write of its cost that failed.
        deletion: Its deletion, once it has begun.
    """

    uid: str
    created: float
    host: str
    process: PoolProcess | None = None
    ready_since: float | None = None
    failed_probes: int = 0
    cost: int = 0
    cost_failed: float = -FOREVER
    restarts: int = 0
    deletion: PodDeletion | None = None

    def to_pod_state(self) -> PodState:
        """Return the pod's state as the ReplicaSet's controller sees it."""
        return PodState(
            self.uid,
            self.created,
            self.host,
            running=self.process is not None or self.restarts > 0,
            ready_since=self.ready_since,
            cost=self.cost,
            restarts=self.restarts,
        )


@dataclass(frozen=True, slots=True)
class RemovalOfBusyPod:
    """The record of a scale-down that removed a ready pod with running sessions.

    Attributes:
        busy_seconds: The seconds for which the pod had run sessions.
        idle_seconds: The seconds for which each ready pod that was kept had been idle.
        cost_failed: The time of the last write of the pod's cost that failed.
    """

    at: float
    busy_seconds: float
    idle_seconds: tuple[float, ...]
    cost_failed: float


@dataclass(slots=True)
class RecordedFleetChanges:
    """The record of all deletions and scale-downs of one simulated fleet.

    Attributes:
        deletions: The pods that were deleted.
        choices: The pods with sessions that were removed because there were too many pods.
        lowered: For each reduction of the number of pods: its time, the new number, and the number
            of unfinished items that the autoscaler must have known.
    """

    deletions: list[PodDeletion] = field(default_factory=list)
    choices: list[RemovalOfBusyPod] = field(default_factory=list)
    lowered: list[tuple[float, int, int]] = field(default_factory=list)


class SimulatedCluster:
    """The pods of one ReplicaSet.

    Attributes:
        replicas: The number of pods in its specification.
        record: The record of the simulation.
        closed: Pods are neither started nor deleted anymore.
    """

    def __init__(self, world: FleetWorld, schedule: FleetSchedule, random: Random) -> None:
        self.replicas = 0
        self.record = RecordedFleetChanges()
        self._world = world
        self._schedule = schedule
        self._random = random
        self._pods: list[Pod] = []
        self.closed = False

    @property
    def active_pods(self) -> list[Pod]:
        """The pods that are not being deleted."""
        return [pod for pod in self._pods if pod.deletion is None]

    @property
    def now(self) -> float:
        """The seconds since the start of the simulation."""
        return self._world.loop.now

    def close(self) -> None:
        """Stop starting and deleting pods."""
        self.closed = True

    def set_replicas(self, replicas: int) -> None:
        """Set the wanted number of pods, and create or delete pods accordingly."""
        self.replicas = replicas
        self._reconcile_pods()

    async def probe_pods(self) -> None:
        """Repeatedly probe the readiness of all pods, and restart containers that have ended."""
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            for pod in self.active_pods:
                self._probe_pod(pod)
            self._pods = [pod for pod in self._pods if not self._pod_is_gone(pod)]
            self._reconcile_pods()

    def evict_pod(self, pod: Pod) -> None:
        """Evict a pod whose node ends in two minutes."""
        self._delete_pod(pod, "eviction", min(NOTICE_SECONDS, self._schedule.settings.grace))

    async def write_deletion_cost(self, pod: Pod, cost: int) -> None:
        """Simulate the API call that writes a pod's deletion cost. The call is slow and may fail.

        Raises:
            APIServerError: The call failed; it may have been applied.
        """
        fails = self._random.random() < self._schedule.api_failures
        applied = not fails or self._random.random() < 0.5
        await asyncio.sleep(self._random.uniform(*CALL_SECONDS))
        if applied:
            pod.cost = cost
        if fails:
            pod.cost_failed = self.now
            raise APIServerError("on purpose")

    def _reconcile_pods(self) -> None:
        if self.closed:
            return
        active = self.active_pods
        for _ in range(self.replicas - len(active)):
            self._create_pod()
        superfluous = len(active) - self.replicas
        if superfluous > 0:
            by_uid = {pod.uid: pod for pod in active}
            states = [pod.to_pod_state() for pod in active]
            chosen = [by_uid[each.uid] for each in pods_to_delete(states, superfluous, self.now)]
            self._record_removals_of_busy_pods(chosen, [pod for pod in active if pod not in chosen])
            for pod in chosen:
                self._delete_pod(pod, "scale-down", self._schedule.settings.grace)

    def _record_removals_of_busy_pods(self, removed: list[Pod], kept: list[Pod]) -> None:
        """Record each removed pod that runs sessions, with the idle times of the kept pods."""
        for pod in removed:
            if pod.process is None or pod.ready_since is None:
                continue
            busy = self._world.busy_seconds_of_process(pod.process)
            idle = tuple(
                self._world.idle_seconds_of_process(each.process)
                for each in kept
                if each.process is not None and each.ready_since is not None
            )
            if busy > 0:
                self.record.choices.append(RemovalOfBusyPod(self.now, busy, idle, pod.cost_failed))

    def _create_pod(self) -> None:
        uid = f"{self._random.getrandbits(64):016x}"
        pod = Pod(uid, self.now, f"host-{self._random.randrange(HOSTS)}")
        self._pods.append(pod)
        self._start_container_later(
            pod, self._random.uniform(*self._schedule.settings.start_seconds)
        )

    def _start_container_later(self, pod: Pod, seconds: float) -> None:
        def start_container() -> None:
            if not self.closed and pod.deletion is None:
                pod.process = self._world.start_process(pod)

        self._world.loop.call_at(self.now + seconds, start_container, context=NETWORK)

    def _probe_pod(self, pod: Pod) -> None:
        process = pod.process
        if process is None:
            return
        if _process_has_ended(process):
            self._restart_container(pod)
        elif self._world.is_ready(process):
            pod.failed_probes = 0
            if pod.ready_since is None:
                pod.ready_since = self.now
        else:
            pod.failed_probes += 1
            if pod.failed_probes >= PROBE_FAILURES:
                pod.ready_since = None

    def _restart_container(self, pod: Pod) -> None:
        """Restart the container of a pod whose process has ended by itself."""
        shortest, longest = RESTART_SECONDS
        pod.process, pod.ready_since = None, None
        self._start_container_later(pod, min(longest, shortest * 2.0**pod.restarts))
        pod.restarts += 1

    def _delete_pod(self, pod: Pod, kind: Literal["scale-down", "eviction"], grace: float) -> None:
        process = (
            pod.process if pod.process is None or not _process_has_ended(pod.process) else None
        )
        busy = 0 if process is None else self._world.count_running_handlers(process)
        deletion = PodDeletion(kind, self.now, process, busy)
        pod.deletion = deletion
        self.record.deletions.append(deletion)
        if process is None:
            return
        self._world.terminate_process(process)

        def kill_process_if_running() -> None:
            if not self.closed and not _process_has_ended(process):
                deletion.killed = self.now
                self._world.kill_process(process)

        self._world.loop.call_at(self.now + grace, kill_process_if_running, context=NETWORK)

    @staticmethod
    def _pod_is_gone(pod: Pod) -> bool:
        deletion = pod.deletion
        return deletion is not None and (
            deletion.process is None or _process_has_ended(deletion.process)
        )


def _process_has_ended(process: PoolProcess) -> bool:
    return min(process.closed, process.crashed) < FOREVER
