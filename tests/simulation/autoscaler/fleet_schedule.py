"""Schedules of autoscaled fleets: settings, work and incidents, generated at random from a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from tests.simulation.autoscaler.horizontal_autoscaler import (
    SCALE_DOWN,
    AutoscalerSpec,
    ScalingPolicy,
    ScalingRules,
)
from tests.simulation.schedule import Action, PoolSettings, Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from random import Random

IncidentKind = Literal["evict", "kill", "cut", "blind"]
INCIDENTS: Final[tuple[IncidentKind, ...]] = ("evict", "evict", "kill", "cut", "blind")
BEHAVIOURS: Final = (
    "work",
    "work",
    "work",
    "raise_error",
    "write_metadata",
    "report_progress",
    "clean_up",
)
"""Behaviours of handlers that end by themselves and obey a cancellation."""
FAULT_KINDS: Final = (
    "late",
    "slow",
    "silence",
    "silence-applied",
    "reset",
    "500",
    "503",
    "garbled",
)
LONGEST_SECONDS: Final = (60.0, 900.0, 1_800.0)
"""The durations of the longest sessions: `session_timeout` and `drain_timeout`."""
METRICS: Final = ("recommended_replicas", "unfinished", "busy_slots")
WINDOW_SECONDS: Final = (300.0, 600.0)
"""Stabilization windows: the default of Kubernetes, and that of workpool/deploy/kubernetes."""
ONE_PER_MINUTE: Final = ScalingPolicy("Pods", 1, 60.0)
SHORT_SHARE: Final = 0.4
"""The share of sessions that end within seconds."""
GRACE_SECONDS: Final = 30.0
"""Seconds of the grace period beyond `drain_timeout`."""
DEFAULT_DRAIN_SECONDS: Final = 20.0
"""The default of `drain_timeout`."""
DEFAULT_GRACE_SECONDS: Final = 30.0
"""The default of `terminationGracePeriodSeconds`."""
NOTICE_SECONDS: Final = 120.0
"""The time between the notice of an eviction and the end of the node."""


@dataclass(frozen=True, slots=True)
class FleetIncident:
    """A disturbance of a pod, or of the queue's statistics that the autoscaler reads.

    Attributes:
        kind: `evict`: the pod's node ends, with a notice of two minutes. `kill`: the pod's process
            is killed. `cut`: the pod is without network for `seconds`. `blind`: the autoscaler
            cannot read the queue for `seconds`.
        target: Index of the pod, modulo their number.
    """

    at: float
    kind: IncidentKind
    target: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """The settings of the autoscaler and of the pods.

    Attributes:
        rules: The specification of the HorizontalPodAutoscaler.
        metric: The key of `/scale` that it reads, or `busy_slots`: it adds the busy slots of all
            workers to the items that wait, as overlays/autoscaled does with Prometheus.
        to_zero: Without work there is no pod (`minReplicaCount: 0`).
        cooldown: `cooldownPeriod` of KEDA, in seconds.
        polling: `pollingInterval` of KEDA, in seconds.
        grace: `terminationGracePeriodSeconds`.
        deletion_cost: The pods write their deletion cost.
        start_seconds: The shortest and the longest time from the creation of a pod to the start of
            its process.
    """

    rules: AutoscalerSpec
    pool: PoolSettings
    metric: str
    grace: float
    to_zero: bool
    cooldown: float = 300.0
    polling: float = 15.0
    deletion_cost: bool = True
    start_seconds: tuple[float, float] = (2.0, 20.0)

    @property
    def pod_count_without_work(self) -> int:
        """The number of pods that the autoscaler keeps if there is no work."""
        return 0 if self.to_zero else self.rules.minimum


@dataclass(frozen=True, slots=True)
class FleetSchedule:
    """The work, settings and incidents of one simulated fleet.

    Attributes:
        world: The seed, the faults and the work.
        incidents: In the order of their times.
        api_failures: The share of the writes to the API server of Kubernetes that fail.
    """

    world: Schedule
    settings: FleetSettings
    incidents: tuple[FleetIncident, ...]
    api_failures: float


def _set_default_drain_and_grace_periods(settings: FleetSettings) -> FleetSettings:
    pool = replace(settings.pool, drain_timeout=DEFAULT_DRAIN_SECONDS)
    return replace(settings, pool=pool, grace=DEFAULT_GRACE_SECONDS)


def _scale_by_queued_items_only(settings: FleetSettings) -> FleetSettings:
    rules = replace(settings.rules, target=float(settings.pool.concurrency))
    return replace(settings, metric="queued", rules=rules)


def _scale_down_without_delay_or_limit(settings: FleetSettings) -> FleetSettings:
    rules = replace(settings.rules, down=ScalingRules(0.0, SCALE_DOWN.policies))
    return replace(settings, rules=rules, cooldown=0.0)


WITHOUT: Final[Mapping[str, Callable[[FleetSettings], FleetSettings]]] = {
    "deletion-cost": lambda settings: replace(settings, deletion_cost=False),
    "grace-period": _set_default_drain_and_grace_periods,
    "running": _scale_by_queued_items_only,
    "stabilization": _scale_down_without_delay_or_limit,
}
"""The replacement of each documented setting.

`deletion-cost`: pods write none. `grace-period`: `drain_timeout` and the grace period have their
defaults. `running`: the autoscaler reads the queued items only. `stabilization`: no window, no
cooldown and no limit of the pods that go at once.
"""


def generate_fleet_schedule(seed: int, random: Random, without: frozenset[str]) -> FleetSchedule:
    """Generate a schedule with the documented settings, except those that `without` names."""
    settings = _generate_fleet_settings(random)
    longest = settings.pool.drain_timeout
    work = _generate_waves_of_sessions(random, settings, longest)
    until = work[-1].at + longest
    incidents = tuple(
        sorted(
            (
                _generate_fleet_incident(random, until)
                for _ in range(random.choice((0, 0, 1, 2, 3)))
            ),
            key=lambda each: each.at,
        )
    )
    kinds = tuple(random.sample(FAULT_KINDS, random.randint(1, 4)))
    share = random.choice((0.0, 0.0, 0.02, 0.05))
    api_failures = random.choice((0.0, 0.0, 0.2))
    for name in sorted(without):
        settings = WITHOUT[name](settings)
    world = Schedule(seed, (), work, share, kinds)
    return FleetSchedule(world, settings, incidents, api_failures)


def _generate_fleet_settings(random: Random) -> FleetSettings:
    """Generate settings that workpool/docs/operating.md allows."""
    longest = random.choice(LONGEST_SECONDS)
    minimum = random.choice((0, 0, 1, 2))
    concurrency = random.choice((1, 2, 2, 3))
    metric = random.choice(METRICS)
    if metric == "busy_slots":
        # Require one worker. Only workers report this metric, so an empty fleet would never grow.
        minimum = max(1, minimum)
    down = ScalingRules(random.choice(WINDOW_SECONDS), (ONE_PER_MINUTE,))
    rules = AutoscalerSpec(
        target=1.0 if metric == "recommended_replicas" else float(concurrency),
        minimum=max(1, minimum),  # KEDA never creates an autoscaler with a minimum of 0
        maximum=random.choice((2, 3, 4, 6)),
        down=down,
    )
    pool = PoolSettings(
        concurrency=concurrency,
        prefetch=random.choice((0, 0, 1)),
        lease_ttl=60,
        drain_timeout=longest,
        session_timeout=longest,
    )
    return FleetSettings(
        rules,
        pool,
        metric,
        grace=longest + GRACE_SECONDS,
        to_zero=minimum == 0,
    )


def _generate_waves_of_sessions(
    random: Random, settings: FleetSettings, longest: float
) -> tuple[Action, ...]:
    """Generate waves of sessions, some of which need more slots than the largest fleet has."""
    slots = settings.rules.maximum * settings.pool.concurrency
    work: list[Action] = []
    at = random.uniform(0, 30)
    for _ in range(random.choice((1, 2, 2, 3, 4))):
        for _ in range(random.randint(1, round(slots * 1.3))):
            short = random.random() < SHORT_SHARE
            seconds = random.uniform(0.1, 10) if short else random.uniform(0.2, 0.95) * longest
            moment = at + random.choice((0.0, random.uniform(0, 60)))
            work.append(
                Action(
                    round(moment, 3),
                    "work",
                    seconds=round(seconds, 3),
                    behaviour=random.choice(BEHAVIOURS),
                )
            )
        at += random.uniform(30, 900)
    return tuple(sorted(work, key=lambda each: each.at))


def _generate_fleet_incident(random: Random, until: float) -> FleetIncident:
    return FleetIncident(
        round(random.uniform(0, until), 3),
        random.choice(INCIDENTS),
        random.randrange(8),
        round(random.choice((5.0, 40.0, 200.0)) * random.uniform(0.8, 1.2), 3),
    )
