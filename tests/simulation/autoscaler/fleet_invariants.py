"""The invariants of an autoscaled fleet of workers; the counts of removed pods and cut sessions.

A session is *cut* if its pod is removed while its handler runs, and the handler is cancelled or
killed for that reason. A session that ends by itself before its pod stops is not cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from tests.simulation.trace import FOREVER
from workpool.events import SessionFinished
from workpool_kubernetes.plugin import Kubernetes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.simulation.autoscaler.fleet_schedule import FleetSettings
    from tests.simulation.autoscaler.kubernetes_cluster import PodDeletion, RecordedFleetChanges
    from tests.simulation.trace import HandlerRun, Trace

INSTANT_SECONDS: Final = 0.01
KNOWN_COST_SECONDS: Final = Kubernetes.interval + 1.0
"""After so many seconds a change of the deletion cost has been written, unless writes fail."""
FAILED_COST_SECONDS: Final = 310.0
"""The longest pause after a write of the deletion cost that failed, with a margin."""


class FinishedFleet(NamedTuple):
    """One finished simulation of a fleet: its trace, pod deletions and settings."""

    trace: Trace
    record: RecordedFleetChanges
    settings: FleetSettings


class RemovalCounts(NamedTuple):
    """Counts of removed pods, and of the sessions that were cancelled or killed with them.

    Attributes:
        sessions: Items.
        pods: Pods that the autoscaler removed.
        busy_pods: Removed pods that ran sessions.
        drained: The sessions that these pods ran.
        cut: The sessions of them that were cancelled or killed before their end.
        evictions: Pods whose node went with a notice of two minutes.
        cut_by_evictions: Their sessions that were cancelled or killed before their end.
    """

    sessions: int = 0
    pods: int = 0
    busy_pods: int = 0
    drained: int = 0
    cut: int = 0
    evictions: int = 0
    cut_by_evictions: int = 0

    def add_counts(self, other: RemovalCounts) -> RemovalCounts:
        """Return the sums of the counts of this object and of `other`."""
        return RemovalCounts(*(one + two for one, two in zip(self, other, strict=True)))

    def __str__(self) -> str:
        """Return the counts as two lines of text."""
        return (
            f"{self.sessions} sessions; the autoscaler removed {self.pods} pods, {self.busy_pods} "
            f"of them with {self.drained} sessions: {self.cut} cut\n"
            f"{self.evictions} evictions with two minutes' notice: {self.cut_by_evictions} cut"
        )


def count_removed_pods(fleet: FinishedFleet, sessions: int) -> RemovalCounts:
    """Count the removed pods of a simulation, and the sessions cancelled or killed with them."""
    trace, record, _ = fleet
    voluntary = [each for each in record.deletions if each.kind == "scale-down"]
    evictions = [each for each in record.deletions if each.kind == "eviction"]
    return RemovalCounts(
        sessions=sessions,
        pods=len(voluntary),
        busy_pods=sum(each.busy > 0 for each in voluntary),
        drained=sum(each.busy for each in voluntary),
        cut=sum(1 for each in voluntary for _ in find_cut_sessions(trace, each)),
        evictions=len(evictions),
        cut_by_evictions=sum(1 for each in evictions for _ in find_cut_sessions(trace, each)),
    )


def find_cut_sessions(trace: Trace, deletion: PodDeletion) -> Iterator[HandlerRun]:
    """Yield the handler runs that were cancelled or killed because their pod was deleted.

    The drain cancels and releases them, or they are killed with their process.
    """
    process = deletion.process
    if process is None:
        return
    deadline = deletion.at + process.pool.drain_timeout - INSTANT_SECONDS
    released = {
        event.session.item.id
        for at, event in process.events
        if isinstance(event, SessionFinished) and event.outcome == "released" and at >= deletion.at
    }
    for run in trace.runs:
        if run.node is process and run.ended >= deletion.at:
            cancelled = deletion.at <= run.cancelled_at < FOREVER
            drained = cancelled and (run.cancelled_at >= deadline or run.work_id in released)
            killed = run.result == "crashed" and process.crashed == deletion.killed
            if drained or killed:
                yield run


def scale_down_cuts_no_session(fleet: FinishedFleet) -> Iterator[str]:
    """Invariant F1: no session is cancelled or killed because the autoscaler removes its pod."""
    for deletion in fleet.record.deletions:
        if deletion.kind == "scale-down":
            for run in find_cut_sessions(fleet.trace, deletion):
                seconds = run.time_of_end_or_cancellation - run.started
                yield (
                    f"{run.work_id} was cut after {seconds:.1f} s;"
                    f" its pod was removed at {deletion.at:.3f}"
                )


def idle_pods_are_removed_first(fleet: FinishedFleet) -> Iterator[str]:
    """Invariant F2: no pod with sessions is removed while an idle pod is kept.

    Exceptions: one of them has been busy or idle for less than the time of a write of its cost, or
    a write of the removed pod failed.
    """
    for choice in fleet.record.choices:
        idle = max(choice.idle_seconds, default=0.0)
        failed = choice.cost_failed > choice.at - FAILED_COST_SECONDS
        if min(choice.busy_seconds, idle) > KNOWN_COST_SECONDS and not failed:
            yield (
                f"a pod was removed at {choice.at:.3f} that had been busy for"
                f" {choice.busy_seconds:.1f} s, and one kept that had been idle for {idle:.1f} s"
            )


def enough_pods_are_kept(fleet: FinishedFleet) -> Iterator[str]:
    """Invariant F3: the number of pods is never reduced to fewer than the unfinished items need."""
    settings = fleet.settings
    for at, replicas, items in fleet.record.lowered:
        needed = min(settings.rules.maximum, -(-items // settings.pool.concurrency))
        if replicas < needed:
            yield f"{replicas} pods are left at {at:.3f} for {items} items, which need {needed}"


FLEET_INVARIANTS: Final[tuple[Callable[[FinishedFleet], Iterator[str]], ...]] = (
    scale_down_cuts_no_session,
    idle_pods_are_removed_first,
    enough_pods_are_kept,
)
"""The invariants that hold with the documented settings."""


def check_fleet_invariants(fleet: FinishedFleet) -> list[str]:
    """Return a description of each violation; empty if every invariant holds."""
    return [f"{each.__name__}: {text}" for each in FLEET_INVARIANTS for text in each(fleet)]
